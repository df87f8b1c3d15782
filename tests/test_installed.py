"""installed: what of a package's files changes the digest."""

import os
from pathlib import Path

import pytest

from qcompile import installed as files
from qcompile.installed import installed


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "installed_test"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/code.py", "inner/data.txt"):
        (folder / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(files, "STARTED", float("inf"))
    return folder


def digest() -> str:
    installed.cache_clear()
    return installed(("installed_test", "installed_nowhere"))


def test_an_edited_file(package: Path) -> None:
    before = digest()
    (package / "inner/data.txt").write_text("x = 2, longer\n")
    assert digest() == before
    code, times = package / "inner/code.py", os.stat(package / "inner/code.py")
    os.utime(code, ns=(0, times.st_mtime_ns - 1))
    touched = digest()
    code.write_text("x = 10\n")
    os.utime(code, ns=(0, times.st_mtime_ns))
    assert len({before, touched, digest()}) == 3


def test_a_file_that_was_edited_after_it_was_imported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "STARTED", os.stat(package / "inner/code.py").st_mtime - 1)
    with pytest.raises(RuntimeError, match=r"changed after this process began: .*installed_test"):
        digest()
