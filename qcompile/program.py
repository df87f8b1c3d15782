"""One compiled program: a model's forward for one kind of call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import _torch, calls
from qcompile.graph import capture
from qcompile.pipeline import Outcome, Pipeline


class Step(nn.Module):
    """A model's forward as a module of flat tensors, for capture."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], rebuild: Callable[[Sequence[Any]], Any], results: list):
        super().__init__()
        self.model = model
        self._forward = forward
        self._rebuild = rebuild
        # By closure, because torch.export takes back what a forward does to its module.
        self._keep = lambda result: results.append(result)

    def forward(self, *tensors: Any) -> list[Any]:
        kwargs = self._rebuild(tensors)
        shells = sorted((v for v in kwargs.values() if calls.is_cache(v)), key=lambda shell: shell._qcompile_place)
        result = self._forward(**kwargs)
        recorded = calls.record(result, tensors, shells)
        self._keep(recorded)
        return recorded.tensors


@dataclass
class Program:
    """A compiled graph, the inputs it gathers from the model, and the shapes it accepts."""

    run: Callable[..., Sequence[Any]]
    weights: list[tuple[dict[str, Any], str] | Tensor]
    build: Callable[..., Any]
    accepts: Callable[[Sequence[Tensor]], bool]
    outcome: Outcome

    def __call__(self, tensors: Sequence[Tensor], caches: Sequence[Any]) -> Any:
        weights = [place if isinstance(place, Tensor) else place[0][place[1]] for place in self.weights]
        with torch.no_grad():
            outputs = self.run(*weights, *tensors)
        return self.build(outputs, tensors, caches)


def compile_call(model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], pipeline: Pipeline) -> Program:
    """Capture, transform and compile `forward(**kwargs)`. Raises CaptureError if it cannot be captured."""
    flat, rebuild = calls.flatten(kwargs)
    results: list[calls.Result] = []
    step = Step(model, forward, rebuild, results)
    captured = capture.export(step, flat.tensors, prefix="model.")
    weights: list[Any] = []
    for given in captured.inputs:
        if given.path is not None:
            path, _, name = given.path.rpartition(".")
            owner = model.get_submodule(path)
            weights.append((owner._parameters if name in owner._parameters else owner._buffers, name))
        elif given.constant is not None:
            weights.append(given.constant)
    # The caller's tensors come last, in the order they were given; torch.export keeps that order.
    fakes = [fake for given, fake in zip(captured.inputs, captured.fakes, strict=True) if given.user is not None]
    outcome = pipeline.transform(captured.gm)
    run = _torch.inductor(captured.gm, captured.fakes, pipeline.inductor_options)
    return Program(run, weights, results[-1].build, _torch.shape_guards(fakes), outcome)
