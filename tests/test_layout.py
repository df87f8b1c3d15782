"""passes/ and kernels/ lie at the top of the repository, are imported as part of qcompile, and are shipped whole."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("passes", "kernels")


@pytest.mark.parametrize("name", LINKS)
def test_links_and_names(name: str) -> None:
    assert os.readlink(ROOT / "qcompile" / name) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would hide the PyPI package {name}"


def test_no_package_under_tests() -> None:
    found = [p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("__init__.py")]
    assert not found, "a package under tests/ can hide the installed package of its name"


def files_in_git() -> list[Path]:
    """What a commit of everything would hold."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [Path(name) for name in sorted(set(names)) if name and os.path.lexists(ROOT / name)]


def test_wheel_is_whole(tmp_path: Path) -> None:
    files = files_in_git()
    # Built from a copy: building in place would leave build/ behind, and ship what an earlier build left there.
    source = tmp_path / "source"
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, source / file, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    links = {Path("qcompile", name) for name in LINKS}
    wanted = {file.as_posix() for file in files if file.parts[0] == "qcompile" and file not in links}
    wanted |= {f"qcompile/{file.as_posix()}" for file in files if file.parts[0] in LINKS}
    assert sorted(shipped - wanted) == [], "shipped, but not in git"
    assert sorted(wanted - shipped) == [], "in git, but not shipped"
