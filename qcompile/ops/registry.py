"""Ops, their meanings, and the implementations that kernels sign up.

An op is a few lines of plain torch: the documentation, the fake, the fallback on every device and the oracle of every
kernel's test. `@op` registers it as `torch.ops.qcompile.<name>`. A kernel signs up with `<op>.implementation(name,
refuses)`; the first one that does not refuse is chosen, and if all refuse the meaning runs.

An implementation is a plain function that `lower` traces into the graph, so torch code in it fuses with its
neighbours. What a compiler must not look into (a C++ call, a kernel with a launcher of its own) goes behind `@opaque`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_OPS = torch.library.Library("qcompile", "FRAGMENT")
_KERNELS = torch.library.Library("qcompile_kernels", "FRAGMENT")

Function = Callable[..., Any]
Refuses = Callable[..., str | None]


@dataclass(frozen=True)
class Implementation:
    """A kernel behind an op. `refuses` takes the op's arguments, fake tensors with possibly symbolic shapes.

    `device` is the type of device that it is for, None for any."""

    name: str
    function: Function
    refuses: Refuses
    device: str | None = None


@dataclass(frozen=True)
class Choice:
    """What `Op.choose` decided: the function to trace, its name, and why the ones before it refused."""

    name: str
    function: Function
    refusals: tuple[tuple[str, str], ...]


MEANING = "MEANING"


def known(size: Any) -> int | None:
    """A size as a number if it is one; torch leaves numbers wrapped where a symbol was found to be one."""
    text = str(size)
    return int(text) if text.isdigit() else None


@dataclass
class Op:
    """A registered op; calling it runs the meaning through the dispatcher. `fake` gives its result empty."""

    name: str
    meaning: Function
    fake: Function
    overload: torch._ops.OpOverload
    implementations: list[Implementation] = field(default_factory=list)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def implementation(self, name: str, refuses: Refuses, device: str | None = None) -> Callable[[Function], Function]:
        """Sign up a kernel. Raises TypeError unless function and `refuses` take the op's own arguments."""

        def sign_up(function: Function) -> Function:
            want = list(inspect.signature(self.meaning).parameters)
            for candidate in (function, refuses):
                got = list(inspect.signature(candidate).parameters)
                if got != want:
                    raise TypeError(f"{name}: {candidate.__name__} takes {got}, {self.name} takes {want}")
            self.implementations.append(Implementation(name, function, refuses, device))
            return function

        return sign_up

    def serves(self, device: torch.device) -> bool:
        """Has a kernel signed up for devices of this type?"""
        return any(one.device in (None, device.type) for one in self.implementations)

    def choose(self, *args: Any) -> Choice:
        """The first implementation that does not refuse these arguments, else the meaning."""
        refusals = []
        for implementation in self.implementations:
            reason = implementation.refuses(*args)
            if reason is None:
                return Choice(implementation.name, implementation.function, tuple(refusals))
            refusals.append((implementation.name, reason))
        return Choice(MEANING, self.meaning, tuple(refusals))


OPS: dict[str, Op] = {}


def op(meaning: Function, fake: Function | None = None, writes: Sequence[str] = ()) -> Op:
    """Register `meaning`, a function of tensors and plain values in plain torch, as `torch.ops.qcompile.<its name>`.

    `fake`, where the meaning is slow on fake tensors, gives an empty result of the same type and strides. `writes`
    names the parameters that it writes to.
    """
    name = meaning.__name__
    OPS[name] = Op(name, meaning, fake or meaning, _define(_OPS, meaning, fake or meaning, writes))
    OPS[name].__doc__ = meaning.__doc__
    return OPS[name]


def op_with_fake(fake: Function, writes: Sequence[str] = ()) -> Callable[[Function], Op]:
    """`op` with a fake of its own."""
    return lambda meaning: op(meaning, fake, writes)


def opaque(fake: Function, writes: Sequence[str] = ()) -> Callable[[Function], torch._ops.OpOverload]:
    """Register a function as `torch.ops.qcompile_kernels.<its name>`, which compilers call and never look into.

    `fake` takes the same arguments and gives empty tensors of the right shape, dtype and strides. `writes` names the
    parameters that the function writes to.
    """
    return lambda function: _define(_KERNELS, function, fake, writes)


@dataclass(frozen=True)
class Binder:
    """How calls of an op are bound to tensors which many of them have in common.

    `bind` takes the op's arguments, with None in place of each tensor that is another one at every call, and gives a
    function of those alone, in the order of the arguments, that calls the op; or None where it cannot. If it `pays`, a
    graph is cut at the call.
    """

    bind: Function
    pays: bool


_BINDERS: dict[torch._ops.OpOverload, Binder] = {}


def binder(overload: torch._ops.OpOverload, pays: bool) -> Callable[[Function], Function]:
    """Sign up `bind` of the Binder of this op."""

    def sign_up(function: Function) -> Function:
        _BINDERS[overload] = Binder(function, pays)
        return function

    return sign_up


def binder_of(target: Any) -> Binder | None:
    """How calls of an op are bound, if they can be."""
    return _BINDERS.get(target)


def declare(schema: str) -> torch._ops.OpOverload:
    """`torch.ops.qcompile_kernels.<name>` of this schema, whose function is in C++ alone."""
    _KERNELS.define(schema)
    return getattr(getattr(torch.ops, _KERNELS.ns), schema.partition("(")[0]).default


def _define(
    library: torch.library.Library, function: Function, fake: Function, writes: Sequence[str]
) -> torch._ops.OpOverload:
    name = function.__name__
    library.define(name + torch.library.infer_schema(function, mutates_args=tuple(writes)))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, library.ns), name).default
