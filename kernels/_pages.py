"""Weights in pages of 2 MiB, where Linux may give them: decoding reads all of them for every token.

A page of 4 KiB ends what the processor reads ahead by itself. GB/s of one and of two threads, Zen 4: 20 and 35 from
pages of 4 KiB, 31 and 60 from those of 2 MiB.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

PAGE = 2 << 20
COLLAPSE = 25  # madvise(2) since Linux 6.1: what lies there is moved into one page, now
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages(tensors: Iterable[Tensor]) -> int:
    """Move the memory behind these tensors to large pages, where they fill at least half of one; how many those are.

    Addresses and contents stay. Does nothing where the machine's owner switched such pages off, or without Linux.
    """
    if sys.platform != "linux" or not ENABLED.exists() or "[never]" in ENABLED.read_text():
        return 0
    storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"}
    spans = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
    filled: Counter[int] = Counter()
    for start, size in spans.items():
        for page in range(start // PAGE, -(-(start + size) // PAGE)):
            filled[page] += min(start + size, (page + 1) * PAGE) - max(start, page * PAGE)
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def move(first: int, count: int) -> int:
        """How many of these pages became large. One call for all is much faster, and fails for all where a part of one
        is not ours."""
        if madvise(first * PAGE, count * PAGE, COLLAPSE) == 0:
            return count
        return move(first, count // 2) + move(first + count // 2, count - count // 2) if count > 1 else 0

    pages = sorted(page for page, size in filled.items() if 2 * size >= PAGE)
    # Pages that follow one another differ as much as their places in the list do.
    runs = Counter(page - index for index, page in enumerate(pages))
    starts = itertools.accumulate(runs.values(), initial=0)
    return sum(move(pages[start], count) for start, count in zip(starts, runs.values(), strict=False))
