"""Large pages behind weights."""

from pathlib import Path

import pytest
import torch

from qcompile.kernels import _pages


def test_contents_and_addresses_stay() -> None:
    whole = torch.arange(3 * _pages.PAGE // 4, dtype=torch.int32)
    part = whole[100:]
    copies, places = [whole.clone(), part.clone()], [whole.data_ptr(), part.data_ptr()]
    # Three pages of memory hold two whole ones, wherever they begin; not every machine has them to give.
    assert 0 <= _pages.use_large_pages([whole, part]) <= 4
    assert [whole.data_ptr(), part.data_ptr()] == places
    assert torch.equal(whole, copies[0]) and torch.equal(part, copies[1])


def test_small_tensors_stay_where_they_are() -> None:
    assert _pages.use_large_pages([torch.ones(1000), torch.empty(0), torch.empty(5 << 20, device="meta")]) == 0


@pytest.mark.parametrize("said", [None, "always madvise [never]"])
def test_switched_off(said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pages, "ENABLED", tmp_path / "enabled")
    if said is not None:
        _pages.ENABLED.write_text(said)
    assert _pages.use_large_pages([torch.ones(2 << 20)]) == 0
