"""A model's forward as a module of flat tensors: what capture takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qcompile import calls
from qcompile.errors import UnsupportedError
from qcompile.graph.capture import Captured, Input, export

Forward = Callable[..., Any]


class _Step(nn.Module):
    def __init__(self, model: nn.Module, run: Callable[[Sequence[Any]], list[Any]]):
        super().__init__()
        self.model = model  # so that weights are inputs of the graph, under their own names
        self._run = run

    def forward(self, *tensors: Any) -> list[Any]:
        return self._run(tensors)


def capture_call(
    model: nn.Module, forward: Forward, kwargs: Mapping[str, Any], without: Collection[int] = ()
) -> tuple[Captured, list[Tensor], Any]:
    """Capture `forward(**kwargs)`, a forward of `model`.

    Returns the graph, the call's flat tensors in the order of the graph's user inputs, and `build`, which makes the
    caller's result from the graph's outputs (see calls.record). Raises CaptureError or UnsupportedError.

    The flat tensors at the places `without` are no inputs of the graph; the forward finds None where it looks for one.
    """
    flat, rebuild = calls.flatten(dict(kwargs))
    places = [place for place in range(len(flat.tensors)) if place not in without]
    results: list[calls.Result] = []

    def run(inputs: Sequence[Any]) -> list[Any]:
        given = dict(zip(places, inputs, strict=True))
        tensors = [given.get(place) for place in range(len(flat.tensors))]
        call = rebuild(tensors)
        shells = [value for value in call.values() if calls.is_cache(value)]
        if len(shells) != len(flat.caches):
            raise UnsupportedError("a cache inside another argument")
        result = forward(**call)
        # By closure: torch.export takes back what a forward assigns to its module.
        results.append(calls.record(result, tensors, shells))
        return results[-1].tensors

    given = [flat.tensors[place] for place in places]
    captured = export(_Step(model, run), given, prefix="model.", name=type(model).__name__)
    inputs = (each if each.user is None else Input(user=places[each.user]) for each in captured.inputs)
    return Captured(captured.gm, tuple(inputs)), flat.tensors, results[-1].build
