"""shelf: what is kept on disk comes back, and nothing else does."""

import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile import program, roles
from qcompile.runtime import runner_of
from qcompile.shelf import MOST, Shelf


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_kept_comes_back(folder: Path) -> None:
    Shelf("things", 1).keep({"a": 2})
    assert list(Shelf("things", 1).entries()) == [{"a": 2}]
    for other in (Shelf("things", 2), Shelf("others", 1), Shelf("things", 1, off=True)):
        assert list(other.entries()) == []
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_entry_is_used_as_it_will_be_read() -> None:
    entry = ["x"]
    read = Shelf("things", 1).as_read(entry)
    assert read == entry and read is not entry
    assert Shelf("things", 1, off=True).as_read(entry) is entry
    unkept = lambda: None  # noqa: E731
    assert Shelf("things", 1).as_read(unkept) is unkept


def test_recall() -> None:
    assert [Shelf("things", 1).recall(lambda made=made: made) for made in ("first", "second")] == ["first", "first"]


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]])
def test_a_damaged_entry_is_dropped(spoil: Any, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf("things", 1)
    shelf.keep("good")
    assert shelf.place is not None
    (file,) = shelf.place.glob("*.bin")
    file.write_bytes(spoil(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert list(shelf.entries()) == []
    assert len(caplog.records) == 1 and "dropped" in caplog.text
    assert not file.exists()


def test_a_folder_of_others_is_not_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    shelf = Shelf("things", 1)
    shelf.keep("good")
    assert list(shelf.entries()) == [] and not list(folder.iterdir())
    assert "others may write to it" in caplog.text


def test_what_cannot_be_kept_is_no_error(folder: Path) -> None:
    Shelf("things", 1).keep(lambda: None)
    Shelf("things", torch.ones(2)).keep("good")
    assert not list(folder.rglob("*.bin"))


def test_the_oldest_go(folder: Path) -> None:
    for number in range(MOST + 3):
        Shelf("things", 1).keep(number)
    assert sorted(Shelf("things", 1).entries()) == list(range(3, MOST + 3))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_disk_that_refuses(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    Shelf("things", 1).keep("good")


def test_a_disk_that_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf("things", 1)
    written = Path.write_bytes

    def fill(path: Path, data: bytes) -> int:
        written(path, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with caplog.at_level(logging.INFO):
        shelf.keep("good")
    assert "No space left" in caplog.text and not [path for path in folder.rglob("*") if path.is_file()]


def test_many_write_and_read_at_once(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf("things", 1)
    work = [lambda number=number: shelf.keep(["an entry"] * (1000 + number)) for number in (0, 1) for _ in range(20)]
    with ThreadPoolExecutor(4) as writers:
        done = [writers.submit(each) for each in work]
        while not all(each.done() for each in done):
            assert all(entry[0] == "an entry" for entry in shelf.entries())
    assert "dropped" not in caplog.text and len(list(shelf.entries())) == 2


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_second_process_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    cold = qcompile.optimize(llama(), "u4/g32/asym", disk_cache=True, progress=False)
    with torch.no_grad():
        want = cold(tokens)
    grown = cold.generate(tokens, max_new_tokens=4, do_sample=False)  # type: ignore[operator]

    def refuse(*args: Any) -> Any:
        raise AssertionError("captured again")

    monkeypatch.setattr(program, "capture_unrolled", refuse)
    monkeypatch.setattr(roles, "capture_call", refuse)
    warm = qcompile.optimize(llama(), "u4/g32/asym", disk_cache=True, progress=False)
    with torch.no_grad():
        got = warm(tokens)
        longer = warm(torch.arange(21).reshape(3, 7))
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0)
    for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=0)
    assert longer.logits.shape == (3, 7, 100)
    assert torch.equal(warm.generate(tokens, max_new_tokens=4, do_sample=False), grown)  # type: ignore[operator]
    runners = runner_of(cold), runner_of(warm)
    assert [runner.recalled for runner in runners if runner] == [0, 3]
    reports = [str(qcompile.explain(model)) for model in (cold, warm)]
    assert reports[1].replace("\n\ncache       3 of 3 programs were on disk", "") == reports[0]


def test_why_nothing_is_kept_is_reported() -> None:
    model = qcompile.optimize(llama(), "u4/g32/asym", disk_cache=True, progress=False)
    model.extra = [torch.ones(3)]  # type: ignore[assignment]
    with torch.no_grad():
        model(torch.arange(12).reshape(2, 6))
    report = qcompile.explain(model)
    why = "the model has a tensor of shape (3,) that is no parameter and no buffer"
    assert f"\ncache       programs are not kept on disk: {why}\n" in f"{report}\n"
    assert report.to_dict()["not_on_disk"] == why


def test_another_model_is_captured() -> None:
    tokens = torch.arange(12).reshape(2, 6)
    models = [qcompile.optimize(llama(), "u4/g32/asym", disk_cache=True, progress=False) for _ in range(3)]
    models[1].config._attn_implementation = "eager"  # type: ignore[union-attr]
    models.append(qcompile.optimize(llama(), "u4/g64/asym", disk_cache=True, progress=False))
    with torch.no_grad():
        for model in models:
            model(tokens)
    runners = [runner_of(model) for model in models]
    assert [runner.recalled for runner in runners if runner] == [0, 0, 1, 0]


def test_an_entry_that_does_not_compile_is_made_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    models = [qcompile.optimize(llama(), "u4/g32/asym", disk_cache=True, progress=False) for _ in range(2)]
    compiled, failures = program.Draft.compile, [RuntimeError("no such kernel")]

    def fail_once(draft: Any, model: nn.Module) -> Any:
        if failures:
            raise failures.pop()
        return compiled(draft, model)

    with torch.no_grad():
        want = models[0](tokens).logits
        monkeypatch.setattr(program.Draft, "compile", fail_once)
        assert torch.equal(models[1](tokens).logits, want)
    assert "does not compile: no such kernel" in caplog.text
    runner = runner_of(models[1])
    assert runner is not None and runner.recalled == 0


def test_whatever_a_fingerprint_raises_is_no_error() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert Shelf("things", deep).place is None


def test_a_dump_is_written_by_passes_that_run(tmp_path: Path) -> None:
    for name in ("cold", "warm"):
        model = qcompile.optimize(llama(), "u4/g32/asym", dump=tmp_path / name, disk_cache=True, progress=False)
        with torch.no_grad():
            model(torch.arange(12).reshape(2, 6))
    assert len(list((tmp_path / "warm").rglob("*.txt"))) == len(list((tmp_path / "cold").rglob("*.txt"))) > 3
