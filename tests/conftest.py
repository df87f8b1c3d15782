"""Fixtures that every test may use: fixed seeds, golden texts, shared test data; and the marker `cuda`."""

import difflib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _each_test_starts_alike() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    yield
    # Past a number of recompilations Dynamo runs eagerly without an error: count for each test from zero.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """`golden("passes/fuse_siblings", text)` compares with tests/golden/passes/fuse_siblings.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if os.environ.get("QCOMPILE_ACCEPT") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        label = path.relative_to(ROOT).as_posix()
        if not path.exists():
            pytest.fail(f"{label} does not exist; QCOMPILE_ACCEPT=1 writes it. The text is:\n{text}", pytrace=False)
        if (want := path.read_text(encoding="utf-8")) != text:
            diff = difflib.unified_diff(want.splitlines(), text.splitlines(), label, "this run", lineterm="")
            hint = f"{label} differs; if the change is meant, QCOMPILE_ACCEPT=1 rewrites it."
            pytest.fail("\n".join([hint, *diff]), pytrace=False)

    return check


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and models, kept beside the repository and not in it."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with checkpoints and models")
    return SHARED
