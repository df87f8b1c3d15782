"""One compiled program: a model's forward for one kind of call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import _guards, calls
from qcompile.graph.alias import is_written
from qcompile.graph.dump import type_text
from qcompile.launches import Launch, compiled_meanwhile, launches
from qcompile.pipeline import Outcome, Pipeline
from qcompile.regions import Parts, cut
from qcompile.replay import Form, Replay
from qcompile.step import Forward
from qcompile.unroll import capture_unrolled

# Where a module keeps a tensor: the dictionary of its parameters or buffers, and the name.
Place = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Program:
    """A compiled graph, the weights it gathers from the model at each call, and the shapes it accepts; `written` are
    the places among the caller's tensors that it writes to, `replay` records it on a GPU, `bind` is `run` on inputs
    that are given once (see driver.py). `ties` are weights of two names, which the graph reads under one of them."""

    run: Callable[..., Sequence[Any]]
    weights: list[Place]
    ties: list[tuple[Place, Place]]
    build: calls.Build
    accepts: Callable[[Sequence[Tensor]], bool]
    outcome: Outcome
    types: list[tuple[torch.dtype, torch.device]]
    written: frozenset[int] = frozenset()
    replay: Replay | None = None
    bind: Callable[..., Callable[[], Sequence[Any]] | None] | None = None

    def gather(self) -> list[Tensor]:
        """The model's weights as they are now, never a stale copy."""
        return [owner[name] for owner, name in self.weights]

    @property
    def is_tied(self) -> bool:
        """Whether what was one tensor still is."""
        return all(a[name] is b[other] for (a, name), (b, other) in self.ties)

    def takes(self, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
        """Whether it was made for tensors of these shapes, and for weights of these dtypes on these devices."""
        return (
            self.accepts(tensors)
            and self.is_tied
            and all((weight.dtype, weight.device) == kind for weight, kind in zip(weights, self.types, strict=True))
        )

    def __call__(self, weights: Sequence[Tensor], tensors: Sequence[Tensor], caches: Sequence[Any], form: Form) -> Any:
        """The caller's result. `form` says what weights, caches and written tensors are like (see Replay)."""
        given = (*weights, *tensors)
        with torch.no_grad():
            outputs = self.run(*given) if self.replay is None else self.replay(given, form)
        return self.build(outputs, tensors, caches)

    def calls(
        self, weights: Sequence[Tensor], tensors: Sequence[Tensor], caches: Sequence[Any], form: Form
    ) -> BoundProgram | Callable[[], Any]:
        """Calls of the program on these very tensors, whose memory stays theirs meanwhile; by one thread."""
        with torch.no_grad():
            bound = None if self.bind is None or self.replay is not None else self.bind(*weights, *tensors)
        if bound is None:
            return lambda: self(weights, tensors, caches, form)
        return BoundProgram(bound, self.build, tensors, caches)


class BoundProgram:
    """Calls of a program that is bound to its tensors."""

    def __init__(self, bound: Any, build: calls.Build, tensors: Sequence[Tensor], caches: Sequence[Any]):
        self.bound, self.build, self.tensors, self.caches = bound, build, tensors, caches
        self.ungraded = torch.no_grad()(bound)

    def __call__(self) -> Any:
        return self.build(self.run(), self.tensors, self.caches)

    def run(self) -> Sequence[Any]:
        # Where gradients are off already, as in generate(), they are not switched for each token.
        return (self.ungraded if torch.is_grad_enabled() else self.bound)()

    def let_follow(self, name: str, follower: Any) -> bool:
        """Whether each call ends with this, too, on what its result has under this name."""
        place = self.build.place_of(name)
        let_follow = getattr(None if place is None else self.bound.makers[place], "let_follow", None)
        return let_follow is not None and let_follow(follower)


@dataclass(frozen=True)
class Draft:
    """A program without a model and not compiled yet: it can be kept on disk. `weights` are paths in a model, or
    constants that its code makes."""

    parts: Parts
    weights: list[str | Tensor]
    build: calls.Build
    accepts: Callable[[Sequence[Tensor]], bool]
    outcome: Outcome
    types: list[tuple[torch.dtype, torch.device]]
    written: frozenset[int]
    launches: list[Launch]

    def compile(self, model: nn.Module) -> Program:
        """The program that reads the weights of `model`."""
        weights = [_place(model, each) if isinstance(each, str) else ({"": each}, "") for each in self.weights]
        with compiled_meanwhile(self.launches):
            (run, bind), ties = self.parts.compile(), _ties(model)
        return Program(run, weights, ties, self.build, self.accepts, self.outcome, self.types, self.written, bind=bind)


def draft_call(model: nn.Module, forward: Forward, kwargs: Mapping[str, Any], pipeline: Pipeline) -> Draft:
    """Capture and transform `forward(**kwargs)`. Raises CaptureError or UnsupportedError where it cannot."""
    captured, _, build = capture_unrolled(model, forward, kwargs)
    given = [each.constant if each.path is None else each.path for each in captured.inputs]
    weights = [each for each in given if each is not None]
    # torch.export lists weights first and the caller's tensors last, in the order they were given.
    fakes = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is not None]
    kept = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is None]
    types = [(fake.dtype, fake.device) for fake in kept]
    accepts = _guards.shape_guards(fakes)
    outcome = pipeline.transform(captured.gm, describe(kwargs, fakes))
    places = zip(captured.gm.graph.find_nodes(op="placeholder"), captured.inputs, strict=True)
    written = frozenset(given.user for node, given in places if given.user is not None and is_written(node))
    parts, kernels = cut(captured.gm, captured.fakes), launches(captured.gm.graph)
    return Draft(parts, weights, build, accepts, outcome, types, written, kernels)


def _place(model: nn.Module, path: str) -> Place:
    path, _, name = path.rpartition(".")
    owner = model.get_submodule(path)
    return owner._parameters if name in owner._parameters else owner._buffers, name


def _ties(model: nn.Module) -> list[tuple[Place, Place]]:
    first: dict[int, Place] = {}
    ties = []
    names = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for path, tensor in itertools.chain(*names):
        place = _place(model, path)
        known = first.setdefault(id(tensor), place)
        if known[0] is not place[0] or known[1] != place[1]:  # else a module of two names
            ties.append((known, place))
    return ties


def preview_call(model: nn.Module, forward: Forward, kwargs: Mapping[str, Any], pipeline: Pipeline) -> Outcome:
    """What the passes make of `forward(**kwargs)`, without compiling it."""
    captured, _, _ = capture_unrolled(model, forward, kwargs)
    fakes = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is not None]
    return pipeline.transform(captured.gm, describe(kwargs, fakes))


def describe(kwargs: Mapping[str, Any], fakes: Sequence[Any]) -> str:
    """A call by the types of its tensor arguments: `input_ids i64[s0,s1]`, caches as `past_key_values StaticLayer`."""
    symbols: dict[str, str] = {}
    given = iter(fakes)
    words = []
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor):
            words.append(f"{name} {type_text(next(given), symbols)}")
        elif calls.is_cache(argument):
            words.append(f"{name} {type(next(iter(argument.layers), argument)).__name__}")
            for _ in calls.flatten(argument)[0].tensors:
                next(given)
    return ", ".join(words)
