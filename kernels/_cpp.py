"""Our own C++ through the compiler, flags and disk cache that Inductor uses."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qcompile import _torch

log = logging.getLogger(__name__)


def load_cpp(source: str) -> ctypes.CDLL:
    """`source` compiled for this machine. Raises RuntimeError, with the reason in a line, where that does not work."""
    # The flags say march=native, and Inductor's key does not say which machine: one cache may serve several.
    source = f"// {platform.machine()}: {' '.join(sorted(processor_features()))}\n{source}"
    try:
        return _torch.cpp_library(source)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
        raise RuntimeError(reason) from error


def compile_ahead(work: Sequence[Callable[[], object]]) -> None:
    """Begin to compile what these functions load, one after the other, in a thread: who needs it waits for the rest.

    What fails is left to who needs it, who will see why.
    """

    def run() -> None:
        for each in work:
            try:
                each()
            except Exception as error:
                log.debug("qcompile: not compiled ahead: %s", error)

    threading.Thread(target=run, name="qcompile-cpp", daemon=True).start()


def text_of(*names: str) -> str:
    """These files of kernels/cpu, one after the other."""
    folder = Path(__file__).parent / "cpu"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


@functools.cache
def processor_features() -> frozenset[str]:
    """What this processor can do, as the kernel names it, such as avx2 or amx_bf16."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        found = ""
    return frozenset(found.partition(":")[2].split() or [torch.backends.cpu.get_cpu_capability()])
