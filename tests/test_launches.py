"""launches: which kernels are compiled ahead, and that none of it can break a program."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from qcompile import launches
from qcompile.graph.capture import export
from qcompile.launches import Launch, Zeros, compiled_meanwhile
from qcompile.ops.registry import opaque

SEEN: list[tuple[Any, ...]] = []


@opaque(lambda x, other, factor: x.new_empty(x.shape))
def launches_test(x: Tensor, other: Tensor | None, factor: float) -> Tensor:
    if factor < 0:
        raise ValueError("no")
    SEEN.append((x, other, factor, threading.current_thread().name))
    return x * factor


@pytest.fixture(autouse=True)
def _cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_calls_of_one_kind_are_one() -> None:
    graph = Graph()
    with torch.device("meta"):
        types = [torch.empty(3, 4).t(), torch.empty(3, 4).t(), torch.empty(3, 4)]
    for index, val in enumerate(types):
        x = graph.placeholder(f"x{index}")
        x.meta["val"] = val
        graph.call_function(launches_test, (x, None, 2.0)).meta["val"] = val
        graph.call_function(torch.ops.aten.relu.default, (x,)).meta["val"] = val
    assert launches.launches(graph) == [], "only kernels on a GPU"
    for node in graph.find_nodes(op="placeholder"):
        node.meta["val"] = _OnGpu(node.meta["val"])
    found = launches.launches(graph)
    gpu = torch.device("cuda", 0)
    assert found == [
        Launch("launches_test", (Zeros((4, 3), (1, 4), torch.float32, gpu), None, 2.0)),
        Launch("launches_test", (Zeros((3, 4), (4, 1), torch.float32, gpu), None, 2.0)),
    ]


class _OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Any:
        return Tensor._make_subclass(cls, like)  # type: ignore[attr-defined]

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def test_they_run_on_zeros_in_other_threads() -> None:
    zeros = Zeros((2, 3), (1, 2), torch.float16, torch.device("cpu"))
    with compiled_meanwhile([Launch("launches_test", (zeros, None, 3.0))]):
        pass
    ((x, other, factor, thread),) = SEEN
    assert x.shape == (2, 3) and x.stride() == (1, 2) and x.dtype == torch.float16 and not x.any()
    assert (other, factor) == (None, 3.0) and thread.startswith("qcompile")


def test_one_that_fails_is_left_to_the_program() -> None:
    zeros = Zeros((1,), (1,), torch.float32, torch.device("cpu"))
    with compiled_meanwhile([Launch("launches_test", (zeros, None, factor)) for factor in (-1.0, 1.0)]):
        pass
    assert len(SEEN) == 1


def test_a_symbolic_size_is_as_it_was_traced() -> None:
    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return launches_test(tensors[0], None, 1.0)

    graph = export(Model(), [torch.zeros(5, 3)]).gm.graph
    (node,) = graph.find_nodes(op="call_function", target=launches_test)
    assert launches._argument(node.args[0].meta["val"]).sizes == (5, 3)


def test_sizes_that_data_decide_are_left_to_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return launches_test(tensors[0][tensors[0][:, 0].nonzero()[:, 0]], None, 1.0)

    graph = export(Model(), [torch.ones(5, 3)]).gm.graph
    assert launches.launches(graph) == []
    of_cpu = launches._argument
    on_gpu = torch.device("cuda", 0)

    def argument(val: Any) -> Any:
        found = of_cpu(val)
        return replace(found, device=on_gpu) if isinstance(found, Zeros) else found

    monkeypatch.setattr(launches, "_argument", argument)
    assert launches.launches(graph) == []
    (node,) = graph.find_nodes(op="call_function", target=launches_test)
    node.args = (graph.find_nodes(op="placeholder")[0], None, 1.0)
    assert launches.launches(graph) == [
        Launch("launches_test", (Zeros((5, 3), (3, 1), torch.float32, on_gpu), None, 1.0))
    ]
