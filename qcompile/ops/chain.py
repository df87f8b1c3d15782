"""Several ops, one after the other, as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qcompile.ops.registry import OPS, op_with_fake


@dataclass(frozen=True)
class Given:
    """The tensor of this index."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Cache:
    """The cache of this index, which a step may write to."""

    index: int

    def __str__(self) -> str:
        return f"&{self.index}"


@dataclass(frozen=True)
class Result:
    """What the step of this index makes, which is dense, in a view."""

    step: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"#{self.step}@{self.offset}:{','.join(map(str, self.sizes))}:{','.join(map(str, self.strides))}"


@dataclass(frozen=True)
class Step:
    """A call of the op of this name. Its arguments are Given, Cache, Result and plain values.

    Its text is the name and the arguments with blanks in between, as in `attention #1@0:1,9,1,64:576,64,64,1 &0 &1 %8
    False 0.125 none`.
    """

    op: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join([self.op, *("none" if a is None else str(a) for a in self.arguments)])

    @staticmethod
    def parse(text: str) -> Step:
        name, *words = text.split(" ")
        return Step(name, tuple(map(_argument, words)))


def _argument(word: str) -> Any:
    if word[0] == "%":
        return Given(int(word[1:]))
    if word[0] == "&":
        return Cache(int(word[1:]))
    if found := re.fullmatch(r"#(\d+)@(\d+):([\d,]+):([\d,]+)", word):
        sizes, strides = (tuple(map(int, numbers.split(","))) for numbers in found.groups()[2:])
        return Result(int(found[1]), int(found[2]), sizes, strides)
    if word in (plain := {"none": None, "True": True, "False": False}):
        return plain[word]
    try:
        return float(word)
    except ValueError:
        return word


def run(
    tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str, call: Callable[[str, list[Any]], Tensor]
) -> Tensor:
    """The last of the results of `call(op, arguments)` for all steps."""
    results: list[Tensor] = []

    def value(argument: Any) -> Any:
        if isinstance(argument, Given):
            return tensors[argument.index]
        if isinstance(argument, Cache):
            return caches[argument.index]
        if isinstance(argument, Result):
            return results[argument.step].as_strided(argument.sizes, argument.strides, argument.offset)
        return argument

    for step in map(Step.parse, steps.split("\n")):
        results.append(call(step.op, [value(argument) for argument in step.arguments]).contiguous())
    return results[-1]


def _fake(tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str) -> Tensor:
    return run(tensors, caches, steps, lambda op, arguments: OPS[op].fake(*arguments))


@op_with_fake(_fake, writes=("caches",))
def chain(tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str) -> Tensor:
    """What the last of `steps` makes: calls of ops, one a line (see Step), of `tensors`, of `caches`, which a step may
    write to, and of what earlier steps made."""
    return run(tensors, caches, steps, lambda op, arguments: OPS[op].meaning(*arguments))
