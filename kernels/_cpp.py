"""Our own C++ through the compiler, flags and disk cache that Inductor uses."""

from __future__ import annotations

import ctypes
import functools
import platform

import torch


@functools.lru_cache(maxsize=64)
def load_cpp(source: str) -> ctypes.CDLL:
    """`source` compiled for this machine. Raises RuntimeError, in a line, where that does not work."""
    from torch._inductor.codecache import CppCodeCache

    # The flags say march=native: a cache that several machines share must tell them apart.
    source = f"// {platform.machine()}: {_processor()}\n{source}"
    try:
        return CppCodeCache.load(source)
    except Exception as error:
        raise RuntimeError(str(error).strip().partition("\n")[0]) from error


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = ""
    return " ".join(sorted(set(flags.split()))) or torch.backends.cpu.get_cpu_capability()
