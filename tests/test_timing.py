"""Processes that compile, and weights that are timed; times themselves need a GPU and are part of test_tune.py."""

import io
import json
import queue
import subprocess
import sys

import pytest
import torch

from qcompile import timing
from qcompile.kernels._tuning import GemmTile
from qcompile.kernels._ways import Choice, Product
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import dequantize

# Says what it is asked by rows: 1 compiles, 2 ends the process, 3 fails, 4 has no memory, 5 hangs.
OTHER = """
import json, sys, time
for line in sys.stdin:
    rows = json.loads(line)[0][1]
    if rows == 2:
        sys.exit(1)
    if rows == 5:
        time.sleep(60)
    print({1: "compiled", 3: "CompilationError", 4: "OutOfMemoryError"}[rows], flush=True)
"""


def trial(rows: int, outputs: int = 64, splits: int = 1) -> timing.Trial:
    tile = GemmTile(rows=16, outputs=32, chunks=2, splits=splits, warps=4, stages=2)
    return Product("u4/g64/asym", rows, outputs, 64, torch.bfloat16, False), Choice("gemm", tile)


def test_what_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(device: torch.device) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", OTHER], **pipes))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(timing, "_start", start)
    monkeypatch.setattr(timing, "PATIENCE", 2)
    todo: queue.SimpleQueue[tuple[int, timing.Trial]] = queue.SimpleQueue()
    idle: list[subprocess.Popen[str]] = []
    ticks: list[int] = []

    def compiled(*rows: int) -> list[tuple[int, bool]]:
        for each in rows:
            todo.put((each, trial(each)))
        return list(timing._compile_apart(todo, torch.device("cpu"), idle, lambda: ticks.append(1)))

    assert compiled(1, 2, 1, 3, 4, 5, 1) == [
        (1, True),
        (2, False),
        (1, True),
        (3, False),
        (4, True),
        (5, False),
        (1, True),
    ]
    assert len(ticks) == 7 and len(started) == 3 and idle == started[2:]
    assert compiled(1) == [(1, True)] and len(started) == 3  # the idle one did it
    assert compiled(2) == [(2, False)] and not idle
    assert all(process.poll() is not None for process in started)


def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[timing.Trial] = []

    def ask(process: object, trial: timing.Trial) -> str:
        asked.append(trial)
        return "compiled" if trial[0].rows < 10 else "CompilationError"

    monkeypatch.setattr(timing, "_ask", ask)
    monkeypatch.setattr(timing, "_start", lambda device: subprocess.Popen(["true"]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    bench, ticks = timing.Bench(torch.device("cpu")), []
    trials = [trial(3), trial(5), trial(16), trial(3, splits=2)]
    assert bench.compile(trials, lambda: ticks.append(1)) == {trials[0], trials[1], trials[3]}
    assert len(asked) == 3 and len(ticks) == 4
    assert bench.compile([*trials, trial(7)], lambda: ticks.append(1)) == {trials[0], trials[1], trials[3], trial(7)}
    assert len(asked) == 3
    bench.close()
    assert not bench.idle


def test_serving(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []

    class Bench:
        def __init__(self, device: torch.device, copies: int) -> None:
            assert copies == 1

        def run(self, *trial: object) -> None:
            ran.append(trial)
            if len(ran) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "Bench", Bench)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    lines = []
    for product, (way, tile) in (trial(3), trial(5, splits=2)):
        lines.append(json.dumps([[*product[:4], "bfloat16", False], way, vars(tile)]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    timing.serve("cpu")
    assert ran == [trial(3), trial(5, splits=2)]
    assert capsys.readouterr().out == "compiled\nOutOfMemoryError\n"


def test_a_server_without_a_context_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps([[*trial(3)[0][:4], "bfloat16", False], "gemm", vars(trial(3)[1].tile)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):  # there is no GPU, or none of this name
        timing.serve("cpu")
    assert capsys.readouterr().out == ""


def test_equal_kernels_are_compiled_once() -> None:
    def kernel(*args: int) -> tuple[object, ...]:
        return timing._kernel(*trial(*args))

    assert kernel(17) == kernel(19) == kernel(19, 128)
    assert kernel(19, 64, 2) == kernel(19, 64, 4)
    assert len({kernel(17), kernel(16), kernel(1), kernel(17, 63), kernel(17, 64, 2)}) == 5


@pytest.mark.parametrize(
    "spec",
    [
        "u4/g64/asym",
        "u3/row/asym_int",
        "u4/g64/asym/scale(u8/o4/asym)",
        "i8/tensor/sym",
        "fp8_e4m3/b128x128/sym",
        "nf4/g64/sym",
        "u2/g32/shift",
    ],
)
def test_weights_are_finite_and_of_size_one(spec: str) -> None:
    first, second = timing._random_weights(spec, 1300, 256, torch.float32, torch.device("cpu"), 2)
    assert (first.rows, first.columns) == (1300, 256) and first.pointers[0].data_ptr() != second.pointers[0].data_ptr()
    data, scale, zero, _ = first.pointers
    weight = dequantize(data.view(torch.uint8), scale, zero, QSpec.parse(spec), (1300, 256), torch.float32)
    y = weight @ torch.randn(256)
    assert y.isfinite().all() and 0.1 < y.square().mean().sqrt() < 10
