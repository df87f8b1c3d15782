"""What `tune` measures, keeps and says; times are made up here, and a GPU's own at the end."""

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile import cli, doctor, timing
from qcompile.errors import QCompileError, UnsupportedError
from qcompile.kernels import _tables, _ways
from qcompile.kernels._tuning import Device
from qcompile.kernels._ways import Choice, Product, by_formula
from qcompile.tune import RANGES, _Tuner, linears_of, tune
from qcompile.tuned import Linear, Tuning, account

GPU = torch.device("cuda", 0)
LINEAR = "u4/g64/asym", 4096, 4096
H100 = Device()


class Clock:
    """Times by a function of product and choice; what it raises, a launch raises."""

    def __init__(self, us: Callable[[Product, Choice], float]):
        self.times = us
        self.wrong: set[Choice] = set()
        self.broken: set[Choice] = set()
        self.released = 0
        self.alive = True

    def compile(self, trials: Sequence[timing.Trial], tick: Callable[[], object]) -> set[timing.Trial]:
        return {(product, choice) for product, choice in trials if choice not in self.broken}

    def us(self, product: Product, choice: Choice) -> float:
        return self.times(product, choice)

    def agree(self, product: Product, one: Choice, other: Choice) -> bool:
        return other not in self.wrong

    def check(self) -> None:
        if not self.alive:
            raise RuntimeError("illegal address")

    def release(self) -> None:
        self.released += 1

    def close(self) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuning]:
    """`run(clock, linears, ranges)` on a GPU that is not there."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(_ways._gluon, "refuses", lambda x, layout: "floats" if layout.exponent else None)
    _tables.forget()

    def tuned(
        clock: Clock, linears: Sequence[Linear] = (LINEAR,), ranges: Sequence[tuple[int, int]] = RANGES
    ) -> Tuning:
        return _Tuner(clock, GPU, ranges).tune(linears)

    return tuned


def by_size(product: Product, choice: Choice) -> float:
    """The formula's choice is the best."""
    return 10 + product.rows / 100 + (choice != by_formula(product, H100))


def favouring(way: str, gain: float = 0.5, **sizes: int) -> Callable[[Product, Choice], float]:
    """Tiles of these sizes take `gain` of the time."""

    def us(product: Product, choice: Choice) -> float:
        liked = choice.way == way and sizes.items() <= vars(choice.tile).items()
        return by_size(product, choice) * (gain if liked else 1)

    return us


def asked(rows: int) -> Product:
    return Product(LINEAR[0], rows, *LINEAR[1:], torch.bfloat16, True)


def test_ranges_leave_nothing_out() -> None:
    assert [row for first, last in RANGES for row in range(first, last + 1)] == list(range(1, 2049))


def test_formulas_that_are_the_best_need_no_entry(run: Callable[..., Tuning]) -> None:
    tuning = run(Clock(by_size))
    assert [(row.first, row.last.rows) for row in tuning.rows] == list(RANGES)
    assert not any(row.changed for row in tuning.rows)
    assert _tables.read(Path(tuning.path), {}).entries == ()
    assert str(tuning).splitlines()[-2] == f"0 of {len(RANGES)} choices changed on Test GPU; kept in {tuning.path}"


def test_what_is_faster_is_kept_and_chosen(run: Callable[..., Tuning]) -> None:
    tuning = run(Clock(favouring("mma", warps=8, together=2)), ranges=[(17, 32), (49, 64), (129, 192)])
    assert [row.changed for row in tuning.rows] == [True, True, False]
    first, second, _ = tuning.rows
    assert first.before == pytest.approx((11.17, 11.32), abs=1) and first.after[1] < 0.6 * first.before[1]
    for rows in (17, 32, 49, 64):
        chosen = _tables.choose(asked(rows), GPU)
        assert (chosen.way, chosen.tile.warps, chosen.tile.together) == ("mma", 8, 2)
    assert _tables.choose(asked(33), GPU) == by_formula(asked(33), H100)
    assert "u4/g64/asym  4096x4096  17-32" in str(tuning) and "mma tokens 32" in str(tuning)
    data = json.loads(json.dumps(tuning.to_dict()))
    assert data["rows"][1]["tile"] == vars(second.choice.tile) and data["rows"][1]["rows"] == [49, 64]


@pytest.mark.parametrize(("gain", "kept"), [(0.98, False), (0.96, True)])
def test_three_percent_count(run: Callable[..., Tuning], gain: float, kept: bool) -> None:
    def us(product: Product, choice: Choice) -> float:
        return 10 * (1 if choice == by_formula(product, H100) else gain if choice.tile.warps == 8 else 2)

    assert run(Clock(us), ranges=[(49, 64)]).rows[0].changed == kept


def test_both_ends_count(run: Callable[..., Tuning]) -> None:
    def us(product: Product, choice: Choice) -> float:
        return 10 if choice == by_formula(product, H100) else 5 if product.rows == 64 else 10.5

    row = run(Clock(us), ranges=[(49, 64)]).rows[0]
    assert not row.changed and row.after == row.before == (10, 10)


def test_what_is_wrong_or_does_not_compile_is_not_kept(run: Callable[..., Tuning]) -> None:
    clock = Clock(favouring("mma", warps=8, together=2))
    best = run(clock, ranges=[(49, 64)]).rows[0].choice
    clock.wrong = {best}
    assert run(clock, ranges=[(49, 64)]).rows[0].choice == by_formula(asked(64), H100)
    assert _tables.choose(asked(64), GPU) == by_formula(asked(64), H100)  # what was there before is gone
    clock.broken = {best}
    assert run(clock, ranges=[(49, 64)]).rows[0].choice not in (best, by_formula(asked(64), H100))


def test_what_does_not_launch_is_not_kept(run: Callable[..., Tuning], caplog: pytest.LogCaptureFixture) -> None:
    def us(product: Product, choice: Choice) -> float:
        if choice.tile.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return by_size(product, choice)

    with caplog.at_level(logging.INFO):
        assert run(Clock(us), ranges=[(49, 64)]).rows[0].choice == by_formula(asked(64), H100)
    assert "out of resource" in caplog.text


def test_a_formula_that_does_not_run_is_replaced(run: Callable[..., Tuning]) -> None:
    clock = Clock(by_size)
    clock.broken = {by_formula(asked(rows), H100) for rows in (49, 64)}
    row = run(clock, ranges=[(49, 64)]).rows[0]
    assert row.changed and row.before == (math.inf, math.inf)
    assert _tables.choose(asked(64), GPU) == row.choice
    clock.broken = set(_ways.candidates(asked(64), H100))
    assert run(clock, ranges=[(49, 64)]).skipped == (("u4/g64/asym 4096x4096, 64 rows", "nothing runs"),)


def test_without_memory_a_weight_is_skipped(run: Callable[..., Tuning]) -> None:
    def us(product: Product, choice: Choice) -> float:
        if product.outputs > 100_000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More.")
        return favouring("mma", warps=8)(product, choice)

    clock = Clock(us)
    tuning = run(clock, [("u4/g64/asym", 128256, 4096), LINEAR], [(17, 32), (49, 64)])
    assert tuning.skipped == (("u4/g64/asym 128256x4096", "out of GPU memory (CUDA out of memory)"),)
    assert "u4/g64/asym 128256x4096: skipped: out of GPU memory" in str(tuning)
    assert [row.last.outputs for row in tuning.rows] == [4096, 4096] and clock.released == 1


def test_a_broken_context_ends_it(run: Callable[..., Tuning]) -> None:
    def us(product: Product, choice: Choice) -> float:
        if product.inputs == 8192:
            clock.alive = False
            raise RuntimeError("illegal address")
        return favouring("mma", warps=8)(product, choice)

    clock = Clock(us)
    with pytest.raises(UnsupportedError, match=r"u4/g64/asym 4096x8192, 32 rows, .* broke the GPU's context"):
        run(clock, [LINEAR, ("u4/g64/asym", 4096, 8192)], [(17, 32)])
    assert _tables.choose(asked(32), GPU).tile.warps == 8 != by_formula(asked(32), H100).tile.warps


def test_weights_without_kernels_are_skipped(run: Callable[..., Tuning]) -> None:
    wrong = [("u4/o64/asym", 64, 64), ("u4/g64/asym", 64, 96), ("u4/g24/asym", 64, 96)]
    tuning = run(Clock(by_size), [*wrong, LINEAR], [(17, 32)])
    assert [reason.partition(": ")[2][:20] for _, reason in tuning.skipped] == [
        "groups along the out",
        "groups run on over t",
        "the group size must ",
    ]
    assert len(tuning.rows) == 1


def test_the_largest_step(run: Callable[..., Tuning]) -> None:
    def us(product: Product, choice: Choice) -> float:
        return 10 if product.rows <= 32 else 12 if product.rows <= 48 else 13

    tuning = run(Clock(us))
    step, a, b = tuning.steps[0]
    assert (step, a.last.rows, b.first) == (1.2, 32, 33)
    assert str(tuning).endswith("1.20 times, from 32 to 33 rows of u4/g64/asym 4096x4096")


def test_what_explain_and_the_doctor_say(run: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch) -> None:
    assert account(torch.device("meta")) is None
    assert account(GPU) == "by formula; `qcompile tune` measures"
    other = ("u4/g64/asym", 4096, 8192)
    path = Path(run(Clock(favouring("mma", warps=8)), [LINEAR, other], [(17, 32), (49, 64)]).path)
    assert account(GPU) == f"measured choices: 4 in {path}"
    assert account(GPU, [LINEAR]) == f"measured choices: 2 in {path}"
    assert account(GPU, []) == "by formula; `qcompile tune` measures"
    shipped = path.parent.parent / "shipped" / "test-gpu.json"
    shipped.parent.mkdir()
    path.rename(shipped)
    monkeypatch.setattr(_tables, "SHIPPED", shipped.parent)
    _tables.forget()
    assert account(GPU, [LINEAR]) == "measured choices: 2 shipped"
    assert "cuda:0 tiles" in str(doctor.Findings({}, {}, None, (), tiles={"cuda:0": "measured choices: 2 shipped"}))


def test_what_is_shipped_is_where_tuning_begins(run: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(run(Clock(favouring("mma", warps=8)), ranges=[(17, 32)]).path)
    shipped = path.parent.parent / "shipped" / "test-gpu.json"
    shipped.parent.mkdir()
    path.rename(shipped)
    monkeypatch.setattr(_tables, "SHIPPED", shipped.parent)
    _tables.forget()
    assert not run(Clock(favouring("mma", warps=8)), ranges=[(17, 32)]).rows[0].changed
    assert run(Clock(by_size), ranges=[(17, 32)]).rows[0].choice == by_formula(asked(32), H100)
    assert _tables.choose(asked(32), GPU) == by_formula(asked(32), H100)


# What is asked for


def test_the_linears_of_a_plan(tiny_llama: Callable[..., torch.nn.Module]) -> None:
    plan = qcompile.plan(tiny_llama(), "u4/g32/asym", include=["lm_head", "embed_tokens"])
    spec = "u4/g32/asym"
    found = [(spec, 128, 64), (spec, 64, 64), (spec, 256, 64), (spec, 64, 128), (spec, 100, 64)]
    assert linears_of(plan) == found  # q, k and v are one weight, and so are gate and up; each once


def test_nothing_to_tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="there is nothing to tune on cpu"):
        tune(linears=[LINEAR], device="cpu")
    assert cli.main(["tune", "nowhere", "--device", "cpu"]) == cli.FAILED
    assert "nothing to tune on cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for options, message in (
        ({}, "no weight is quantized"),
        ({"linears": [LINEAR], "rows": (4096, 8192)}, "from 1 to 2048"),
        ({"linears": [LINEAR]}, "QCOMPILE_CACHE is 0"),
    ):
        monkeypatch.setattr(_tables, "versions", lambda device: {"gpu": "Test GPU"})
        with pytest.raises(QCompileError, match=message):
            tune(**options)


def test_command_line(
    run: Callable[..., Tuning],
    tiny_chat: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys.modules["qcompile.tune"], "Bench", lambda device: Clock(by_size))
    shape = ["tune", "--device", "cuda:0", "--shape", "4096", "1024", "--rows", "1-8"]
    assert cli.main([*shape, "--spec", "u4/g64/asym", "--spec", "i8/row/sym", "--json"]) == cli.OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["spec"], row["rows"]) for row in rows] == [
        (spec, [first, last]) for spec in ("u4/g64/asym", "i8/row/sym") for first, last in RANGES[:3]
    ]
    assert cli.main(["tune", str(tiny_chat), "--device", "cuda:0", "--weights", "u4/g32/asym", "--rows", "2"]) == cli.OK
    text = capsys.readouterr().out
    assert "u4/g32/asym  128x64" in text and "0 of 4 choices changed on Test GPU" in text
    for wrong in (["tune", "--device", "cuda:0"], [*shape, str(tiny_chat)]):
        assert cli.main(wrong) == cli.FAILED
        assert "give a MODEL, or --shape" in capsys.readouterr().err
    for wrong in ("8-1", "0", "x"):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--rows", wrong])


@pytest.mark.cuda
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.ops.linear import linear

    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    _tables.forget()
    monkeypatch.setattr(sys.modules["qcompile.tune"], "WORTH", 0.5)  # whatever is the fastest is chosen
    monkeypatch.setattr(sys.modules["qcompile.tune"], "NEAR_ENOUGH", 9.0)
    tuning = tune(linears=[("u4/g64/asym", 512, 1024)], rows=(9, 16), progress=False)
    assert len(tuning.rows) == 1 and not tuning.skipped and 0 < tuning.rows[0].after[1] < 1000
    assert Path(tuning.path).exists()
    weight = timing._random_weights("u4/g64/asym", 512, 1024, torch.bfloat16, torch.device("cuda"), 1)[0]
    data, scale, zero, _ = weight.pointers
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    given = (x, data.view(torch.uint8), scale, zero, None, "u4/g64/asym", None)
    want = linear.meaning(x.double(), *given[1:])
    got = torch.ops.qcompile_kernels.linear_cuda(*given)
    assert (got.double() - want).norm() < 4e-3 * want.norm()
