"""_torch: what is mended in torch itself."""

import threading
import time
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from qcompile import _torch


@pytest.mark.parametrize(("rows", "columns", "size"), [(32, 64, 48), (3, 100, 16), (4, 96, 48), (5, 70, 33)])
def test_loops_over_what_is_cut_off(rows: int, columns: int, size: int) -> None:
    def spread(x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return [x * scale.reshape(1, -1, 1).expand(rows, -1, size).reshape(rows, -1)[:, :columns]]

    inputs = torch.randn(rows, columns), torch.arange(1.0, -(-columns // size) + 1)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
    run = _torch.inductor(_torch.trace(spread, fakes), fakes, {"fx_graph_cache": False})
    assert torch.equal(run(*inputs)[0], spread(*inputs)[0])


def test_what_was_compiled_without_the_mend_is_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = []

    def compile_fx(gm: GraphModule, *_: Any, **__: Any) -> GraphModule:
        tags.append(torch.compiler.config.cache_key_tag)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    gm = _torch.trace(lambda x: [x + 1], [torch.ones(2)])
    with torch.compiler.config.patch(cache_key_tag="mine"):
        _torch.inductor(gm, [torch.ones(2)])
        _torch.inductor_training(gm, [torch.ones(2)], {})
        assert torch.compiler.config.cache_key_tag == "mine"
    assert tags == ["mine+qcompile"] * 2


def test_the_processor_is_looked_at_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    inside, most = [0], []

    def look() -> None:
        inside[0] += 1
        most.append(inside[0])
        time.sleep(0.02)
        inside[0] -= 1

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", look)
    threads = [threading.Thread(target=_torch.know_processor) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_nodes_have_no_stack_traces() -> None:
    from qcompile.graph.capture import export

    class Model(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return tensors[0].relu() * 2

    graph = export(Model(), [torch.ones(2, 4)]).gm.graph
    assert not any(node.stack_trace for node in graph.nodes)
