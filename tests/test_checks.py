"""Single values of a config."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qcompile import checks
from qcompile.errors import ConfigError


def test_hint() -> None:
    assert checks.hint("hqqq", ["rtn", "hqq"]) == "; did you mean 'hqq'?"
    assert checks.hint("gptq", ["rtn", "hqq"]) == "; known: hqq, rtn"
    assert checks.hint(3, ["rtn"]) == "; known: rtn"


def test_names() -> None:
    assert checks.names("include", "lm_head") == ("lm_head",)
    assert checks.names("include", ["b", "a"]) == ("b", "a")
    assert checks.names("keep", {"b", "a"}) == ("a", "b")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "include=3 is not a list of names"),
        ({"a": 1}, "include={'a': 1} is not a list of names"),
        (["a", ""], "include holds '', which is not a name"),
    ],
)
def test_what_is_no_list_of_names(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        checks.names("include", value)


def test_positive_and_flag() -> None:
    checks.positive("size", 3)
    checks.positive("theta", 1e4, (int, float))
    checks.flag("strict", False)
    for value in (0, -1, True, 2.0, "3"):
        with pytest.raises(ConfigError, match="is not a positive int"):
            checks.positive("size", value)
    with pytest.raises(ConfigError, match="theta=inf is not a positive int or float"):
        checks.positive("theta", float("inf"), (int, float))
    with pytest.raises(ConfigError, match="strict=1 is neither True nor False"):
        checks.flag("strict", 1)
