"""One compiled program: a model's forward for one kind of call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import _torch, calls
from qcompile.graph.alias import is_written
from qcompile.graph.dump import type_text
from qcompile.pipeline import Outcome, Pipeline
from qcompile.regions import compile_graph
from qcompile.step import Forward, capture_call


@dataclass(frozen=True)
class Program:
    """A compiled graph, the weights it gathers from the model at each call, and the shapes it accepts; `written` are
    the places among the caller's tensors that it writes to."""

    run: Callable[..., Sequence[Any]]
    weights: list[tuple[dict[str, Any], str] | Tensor]
    build: Callable[..., Any]
    accepts: Callable[[Sequence[Tensor]], bool]
    outcome: Outcome
    types: list[tuple[torch.dtype, torch.device]]
    written: frozenset[int] = frozenset()

    def gather(self) -> list[Tensor] | None:
        """The model's weights as they are now, never a stale copy; None if some changed their dtype or device."""
        weights = [place if isinstance(place, Tensor) else place[0][place[1]] for place in self.weights]
        fits = all((w.dtype, w.device) == kind for w, kind in zip(weights, self.types, strict=True))
        return weights if fits else None

    def __call__(self, weights: Sequence[Tensor], tensors: Sequence[Tensor], caches: Sequence[Any]) -> Any:
        with torch.no_grad():
            outputs = self.run(*weights, *tensors)
        return self.build(outputs, tensors, caches)


def compile_call(model: nn.Module, forward: Forward, kwargs: Mapping[str, Any], pipeline: Pipeline) -> Program:
    """Capture, transform and compile `forward(**kwargs)`. Raises CaptureError or UnsupportedError where it cannot."""
    captured, _, build = capture_call(model, forward, kwargs)
    weights: list[tuple[dict[str, Any], str] | Tensor] = []
    for given in captured.inputs:
        if given.path is not None:
            path, _, name = given.path.rpartition(".")
            owner = model.get_submodule(path)
            weights.append((owner._parameters if name in owner._parameters else owner._buffers, name))
        elif given.constant is not None:
            weights.append(given.constant)
    # torch.export lists weights first and the caller's tensors last, in the order they were given.
    fakes = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is not None]
    kept = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is None]
    types = [(fake.dtype, fake.device) for fake in kept]
    accepts = _torch.shape_guards(fakes)
    outcome = pipeline.transform(captured.gm, describe(kwargs, fakes))
    places = zip(captured.gm.graph.find_nodes(op="placeholder"), captured.inputs, strict=True)
    written = frozenset(given.user for node, given in places if given.user is not None and is_written(node))
    run = compile_graph(captured.gm, captured.fakes)
    return Program(run, weights, build, accepts, outcome, types, written)


def preview_call(model: nn.Module, forward: Forward, kwargs: Mapping[str, Any], pipeline: Pipeline) -> Outcome:
    """What the passes make of `forward(**kwargs)`, without compiling it."""
    captured, _, _ = capture_call(model, forward, kwargs)
    fakes = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is not None]
    return pipeline.transform(captured.gm, describe(kwargs, fakes))


def describe(kwargs: Mapping[str, Any], fakes: Sequence[Any]) -> str:
    """A call by the types of its tensor arguments: `input_ids i64[s0,s1]`, caches as `past_key_values`."""
    symbols: dict[str, str] = {}
    given = iter(fakes)
    words = []
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor):
            words.append(f"{name} {type_text(next(given), symbols)}")
        elif calls.is_cache(argument):
            words.append(f"{name} {type(argument.layers[0]).__name__}")
            for _ in calls.flatten(argument)[0].tensors:
                next(given)
    return ", ".join(words)
