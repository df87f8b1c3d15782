"""Tables of choices: found by shape, spec and rows; kept whole by several processes; left aside when they are wrong."""

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.errors import UnsupportedError
from qcompile.kernels import _tables
from qcompile.kernels._tables import Entry
from qcompile.kernels._tuning import Device
from qcompile.kernels._ways import TILES, Choice, Product, by_formula, candidates, tile_of

GPU = torch.device("cuda", 0)
H100 = Device()


def product(rows: int, spec: str = "u4/g64/asym", outputs: int = 4096, inputs: int = 14336) -> Product:
    return Product(spec, rows, outputs, inputs, torch.bfloat16, True)


def other(asked: Product) -> Choice:
    return candidates(asked, H100)[-1]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU of which nothing is shipped, and a folder for its table; where the table will be."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU (80 GB)")
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: H100))
    monkeypatch.setattr(_tables, "product_of", lambda spec, rows, n, k: product(rows, spec, n, k))
    _tables.forget()
    path = _tables.user_path(GPU)
    assert path is not None and path.parent == tmp_path / "tuned" and path.name.startswith("test-gpu-80-gb-")
    return path


def test_a_choice_holds_for_its_rows_and_weight() -> None:
    assert other(product(64)).way == by_formula(product(64), H100).way == "mma"
    entry = Entry.of(product(64), 49, other(product(64)), us=9, before=10)
    assert _tables.keep([entry], [], GPU).exists()
    assert _tables.choose(product(64), GPU) == other(product(64)) != by_formula(product(64), H100)
    for asked in (product(48), product(65), product(64, "u4/g32/asym"), product(64, outputs=4032)):
        assert _tables.choose(asked, GPU) == by_formula(asked, H100)
    floats = product(64)._replace(dtype=torch.float32, integers=False)
    assert _tables.choose(floats, GPU) == by_formula(floats, H100)
    unaligned = product(64)._replace(integers=False)
    assert _tables.choose(unaligned, GPU) == by_formula(unaligned, H100)
    assert _tables.untuned(product(64), GPU) == by_formula(product(64), H100)


def test_the_rows_of_a_tile_follow_the_call() -> None:
    tile = replace(tile_of("mma", product(192), H100), splits=2)
    _tables.keep([Entry.of(product(192), 129, Choice("mma", tile), us=9, before=10)], [], GPU)
    chosen = [_tables.choose(product(rows), GPU).tile for rows in (129, 192)]
    assert chosen == [replace(tile, tokens=160), tile]


def test_what_is_measured_again_replaces_what_was() -> None:
    first = [Entry.of(product(rows), rows // 2 + 1, other(product(rows)), us=9, before=10) for rows in (32, 64)]
    path = _tables.keep(first, [], GPU)
    again = replace(first[0], us=8.0)
    _tables.keep([again], [("u4/g64/asym", 4096, 14336, 17, 32)], GPU)
    assert _tables.read(path, {}).entries == (again, first[1])
    _tables.keep([], [("u4/g64/asym", 4096, 14336, 1, 2048)], GPU)
    assert _tables.read(path, {}).entries == ()


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = _tables.choose(product(64), GPU)
    monkeypatch.setattr(_tables, "by_formula", None)
    assert _tables.choose(product(64), GPU) is chosen


def broken(text: str) -> list[tuple[str, str]]:
    """Texts of tables that cannot be used, made of a good one, with the reason."""
    good = json.loads(text)
    first = good["entries"][0]

    def entry(**changes: Any) -> str:
        return json.dumps({**good, "entries": [{**first, **changes}]})

    return [
        ("", "no table"),
        (text[: len(text) // 2], "no table"),
        ("[]", "no table"),
        (json.dumps({**good, "entries": 3}), "no table"),
        (json.dumps({**good, "entries": [[]]}), "no table"),
        (entry(more=1), "no table"),
        (json.dumps({**good, "format": 2}), "it is for format 2, here is 1"),
        (json.dumps({**good, "gpu": "Other"}), "it is for gpu Other, here is Test GPU"),
        (json.dumps({**good, "kernels": "0"}), "it is for kernels 0"),
        (entry(way="fly"), "the way 'fly' is none of dot"),
        (entry(tile={**first["tile"], "stages": "4"}), "positive numbers"),
        (entry(tile={**first["tile"], "warps": -4}), "positive numbers"),
        (entry(tile={"warps": 4}), "mma has codes, "),
        (entry(first=65), "positive numbers"),
        (entry(inputs=1 << 40), "positive numbers of 31 bits"),
        (entry(spec="u9"), "u9"),
        (entry(spec=None), "no table"),
    ]


def test_broken_tables_are_left_aside(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = Entry.of(product(64), 49, other(product(64)), us=9, before=10)
    _tables.keep([entry], [], GPU)
    for text, reason in broken(machine.read_text()):
        machine.write_text(text)
        _tables.forget()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert _tables.choose(product(64), GPU) == by_formula(product(64), H100), reason
        assert reason in caplog.text and str(machine) in caplog.text, text
    _tables.keep([entry], [], GPU)
    assert "is written anew" in caplog.text
    assert _tables.choose(product(64), GPU) == other(product(64))


def test_tiles_that_do_not_run_here_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    huge = other(product(64))
    huge = huge._replace(tile=replace(huge.tile, stages=100))
    entries = [Entry.of(product(64), 49, huge, us=9, before=10), Entry.of(product(32), 17, other(product(32)), 9, 10)]
    _tables.keep(entries, [], GPU)
    assert _tables.choose(product(64), GPU) == by_formula(product(64), H100)
    assert _tables.choose(product(32), GPU) == other(product(32))
    assert caplog.text.count("1 choices of") == 1


def test_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", "0")
    assert _tables.user_path(GPU) is None
    assert _tables.choose(product(64), GPU) == by_formula(product(64), H100)
    with pytest.raises(UnsupportedError, match="QCOMPILE_CACHE is 0"):
        _tables.keep([], [], GPU)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UnsupportedError, match="cannot be kept there"):
        _tables.keep([], [], GPU)
    monkeypatch.setenv("QCOMPILE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = _tables.user_path(GPU)
    assert path is not None and path.parent == tmp_path / "qcompile" / "tuned"


def keep_one(rows: int) -> None:
    """In a process of its own."""
    torch.cuda.get_device_name = lambda device=None: "Test GPU (80 GB)"  # type: ignore[method-assign]
    asked = product(rows)
    for _ in range(10):
        entry = Entry.of(asked, rows, candidates(asked, H100)[-1], us=9, before=10)
        _tables.keep([entry], [(*asked[:1], *asked[2:4], rows, rows)], GPU)


def test_processes_lose_nothing(machine: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=keep_one, args=(rows,)) for rows in (16, 32, 64, 128)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [entry.last for entry in _tables.read(machine, _tables.versions(GPU)).entries] == [16, 32, 64, 128]
    assert sorted(file.suffix for file in machine.parent.iterdir()) == [".json", ".lock"]


def test_what_is_shipped_can_be_used() -> None:
    for path in _tables.SHIPPED.glob("*.json"):
        table = _tables.read(path, {"gpu": json.loads(path.read_text())["gpu"]})
        assert path.stem == _tables._slug(json.loads(path.read_text())["gpu"])
        assert table.entries == _tables._usable(table, H100).entries
        assert all(entry.us * 1.03 <= entry.before and entry.way in TILES for entry in table.entries)
        for one in table.entries:
            span = one.spec, one.outputs, one.inputs, one.first, one.last
            assert sum(entry.overlaps(span) for entry in table.entries) == 1
