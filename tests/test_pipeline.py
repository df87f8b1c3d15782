"""Which passes run where, and where the dumps go."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.config import Config
from qcompile.pipeline import Pipeline


class TestDumpFolder:
    def test_the_environment_names_it_where_the_config_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QCOMPILE_DUMP", raising=False)
        assert Pipeline.of(Config()).dump is None
        monkeypatch.setenv("QCOMPILE_DUMP", "from/environment")
        assert Pipeline.of(Config()).dump == Path("from/environment")

    def test_the_config_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QCOMPILE_DUMP", "from/environment")
        assert Pipeline.of(Config(dump=Path("from/config"))).dump == Path("from/config")

    def test_empty_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QCOMPILE_DUMP", "")
        assert Pipeline.of(Config()).dump is None
