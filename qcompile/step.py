"""A model's forward as a module of flat tensors: what capture takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qcompile import calls
from qcompile.errors import UnsupportedError
from qcompile.graph.capture import Captured, export

Forward = Callable[..., Any]


class _Step(nn.Module):
    def __init__(self, model: nn.Module, run: Callable[[Sequence[Any]], list[Any]]):
        super().__init__()
        self.model = model  # so that weights are inputs of the graph, under their own names
        self._run = run

    def forward(self, *tensors: Any) -> list[Any]:
        return self._run(tensors)


def capture_call(model: nn.Module, forward: Forward, kwargs: Mapping[str, Any]) -> tuple[Captured, list[Tensor], Any]:
    """Capture `forward(**kwargs)`, a forward of `model`.

    Returns the graph, the call's flat tensors in the order of the graph's user inputs, and `build`, which makes the
    caller's result from the graph's outputs (see calls.record). Raises CaptureError or UnsupportedError.
    """
    flat, rebuild = calls.flatten(dict(kwargs))
    results: list[calls.Result] = []

    def run(tensors: Sequence[Any]) -> list[Any]:
        call = rebuild(tensors)
        shells = [value for value in call.values() if calls.is_cache(value)]
        if len(shells) != len(flat.caches):
            raise UnsupportedError("a cache inside another argument")
        result = forward(**call)
        # By closure: torch.export takes back what a forward assigns to its module.
        results.append(calls.record(result, tensors, shells))
        return results[-1].tensors

    captured = export(_Step(model, run), flat.tensors, prefix="model.", name=type(model).__name__)
    return captured, flat.tensors, results[-1].build
