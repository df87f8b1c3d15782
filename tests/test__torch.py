"""_torch: what is mended in torch itself."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


def test_loops_of_symbolic_length() -> None:
    def spread(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale.repeat_interleave(12)[: x.shape[0]]

    torch._dynamo.reset()
    _torch._mend_loop_split()
    run = torch.compile(spread, dynamic=True, options={"fx_graph_cache": False})
    for length in (70, 71, 84):
        x, scale = torch.randn(length), torch.arange(1.0, 8.0)
        assert torch.equal(run(x, scale), spread(x, scale))
