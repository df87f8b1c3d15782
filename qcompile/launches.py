"""Kernels of a GPU compiled before the program that launches them runs, beside one another and beside Inductor.

A kernel of ours is compiled at its first launch, and a program would launch its kernels one after the other: each takes
seconds, most of them outside of Python. Here each is launched once on zeros, in threads of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.node import map_arg

from qcompile.graph.match import value

log = logging.getLogger(__name__)

# Threads share Python's lock, which they need for a part of the work.
THREADS = 8


@dataclass(frozen=True)
class Zeros:
    """An argument that was a tensor, of the sizes that the traced call had."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device).zero_()


@dataclass(frozen=True)
class Launch:
    """A call of one of our opaque ops, by its name in torch.ops.qcompile_kernels."""

    op: str
    args: tuple[Any, ...]

    def run(self) -> None:
        try:
            with torch.no_grad():
                op = getattr(torch.ops.qcompile_kernels, self.op)
                op(*(arg.make() if isinstance(arg, Zeros) else arg for arg in self.args))
        except Exception as error:  # the program itself will say it, if it comes to that
            log.info("qcompile: %s was not compiled ahead: %s", self.op, error)


def launches(graph: Graph) -> list[Launch]:
    """The calls of our kernels on a GPU, those of one kind once."""
    found: dict[str, Launch] = {}
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") == "qcompile_kernels":
            args = map_arg(node.args, lambda arg: _argument(value(arg)))
            zeros = [arg for arg in args if isinstance(arg, Zeros)]
            if any(arg.device.type == "cuda" for arg in zeros) and not any(None in arg.sizes for arg in zeros):
                found.setdefault(repr((node.target, args)), Launch(node.target._opname, args))
    return list(found.values())


def _argument(val: Any) -> Any:
    if isinstance(val, Tensor):
        return Zeros(tuple(map(_hint, val.shape)), tuple(map(_hint, val.stride())), val.dtype, val.device)
    return _hint(val)


def _hint(size: Any) -> Any:
    """A symbolic size as it was in the traced call; None for one that only data decide."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


@contextmanager
def compiled_meanwhile(calls: Sequence[Launch]) -> Iterator[None]:
    """Compile kernels while what is inside runs, and wait for them at the end."""
    if not calls:
        yield
        return
    torch.cuda.synchronize()  # sets up what the threads share
    with ThreadPoolExecutor(THREADS, "qcompile-launch") as pool:
        for call in calls:
            pool.submit(call.run)
        yield
