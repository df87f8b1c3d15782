"""Programs in clusters: how they are launched; and on a GPU that has them, that each gets what all have given."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcompile.kernels import _clusters, _tuning
from qcompile.kernels._tiles import tl, triton

CLUSTERS = torch.cuda.is_available() and _clusters.has_clusters(_tuning.Device.of(torch.device("cuda", 0)))


def test_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's arguments in their order, and as many programs to a cluster as are wanted, however often."""
    launched: list[Any] = []

    class Compiled:
        packed_metadata = 4, 1, 1000

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: launched.append((grid, self.packed_metadata, args))

    compiled, asked = Compiled(), []
    kernel = SimpleNamespace(
        arg_names=["x_ptr", "count", "BLOCK", "PDL"],
        warmup=lambda *args, **options: (asked.append((args, options)), compiled)[1],
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.ones(3)
    for _ in range(2):
        _clusters.launch_clusters(kernel, 8, (5, 2), x, 3, PDL=True, BLOCK=16, num_warps=4)
    assert launched == [((5, 2, 1), (4, 8, 1000), (x, 3, 16, True))] * 2
    args, options = asked[0]
    assert args == (x, 3)
    assert options == {"grid": (5, 2), "PDL": True, "BLOCK": 16, "num_warps": 4, "launch_pdl": True}


def test_where_the_driver_launches_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **constants: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    asked = _clusters.are_launched.__wrapped__
    monkeypatch.setattr(_clusters, "launch_clusters", refuse)
    assert not asked(torch.device("cpu"), 8)
    monkeypatch.setattr(_clusters, "launch_clusters", lambda *args, **constants: None)
    assert asked(torch.device("cpu"), 8)


def test_where_there_are_none() -> None:
    assert not _clusters.has_clusters(_tuning.Device(8))


@triton.jit
def _sums(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """out[cluster, i] is the sum of x[cluster, :, i], of which each program has a row and makes some columns."""
    WIDTH: tl.constexpr = BLOCK // SIZE
    _clusters.enter(BLOCK)
    cluster, rank = tl.program_id(0) // SIZE, tl.program_id(0) % SIZE
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + i)
    _clusters.meet()
    _clusters.give(x, rank * WIDTH + i % WIDTH, i // WIDTH, i >= 0)
    _clusters.exchange()
    i = tl.arange(0, WIDTH)
    y = tl.sum(_clusters.take(tl.arange(0, SIZE)[:, None] * WIDTH + i[None, :]), 0)
    tl.store(out_ptr + cluster * BLOCK + rank * WIDTH + i, y)


@pytest.mark.cuda
@pytest.mark.skipif(not CLUSTERS, reason="needs a GPU of compute capability 9")
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("columns", [64, 1024])
def test_sums(size: int, columns: int) -> None:
    """Of more clusters than there are at once, again and again."""
    assert _clusters.are_launched(torch.device("cuda", 0), size)
    x = torch.randn(300, size, columns, device="cuda")
    x[0, 0, 0], x[1, 1, 3] = float("nan"), float("inf")
    for _ in range(5):
        out = torch.full((300, columns), 7.0, device="cuda")
        _clusters.launch_clusters(_sums, size, (300,), x, out, SIZE=size, BLOCK=columns, num_warps=4)
        torch.testing.assert_close(out, x.sum(1), equal_nan=True)


@pytest.mark.cuda
@pytest.mark.skipif(not CLUSTERS, reason="needs a GPU of compute capability 9")
def test_in_a_graph() -> None:
    x, out = torch.randn(9, 4, 64, device="cuda"), torch.empty(9, 64, device="cuda")

    def call() -> None:
        _clusters.launch_clusters(_sums, 4, (9,), x, out, SIZE=4, BLOCK=64, num_warps=4)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(20):
        x.normal_()
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, x.sum(1))
