"""_foreach_add_ of lengths of caches on the CPU, bound: one call of C++ (cpu/likeliest.h).

Inductor's kernel is called with all of them, twice: 30 lengths take 50 us after a model's step has emptied the caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels import linear_cpu
from qcompile.kernels._follower_cpu import Follower
from qcompile.ops.registry import binder


class Lengths(Follower):
    def __call__(self) -> None:
        self.op.run_follower(self.bound, None, 0, 0, 0, 0)


@binder(torch.ops.aten._foreach_add_.Scalar, pays=False)
def bind_lengths(lengths: Sequence[Tensor | None], added: int) -> Lengths | None:
    """Adds `added` to each of these numbers, in the memory that they have now."""
    op = linear_cpu.without_python()
    mine = [length.detach() for length in lengths if length is not None]
    if op is None or len(mine) < len(lengths) or not all(map(_is_number, mine)):
        return None
    places = (ctypes.c_void_p * len(mine))(*(length.data_ptr() for length in mine))
    return Lengths(op, op.bind_lengths(places, len(places), added), mine)


def _is_number(length: Tensor) -> bool:
    return length.device.type == "cpu" and length.dtype == torch.int64 and length.numel() == 1
