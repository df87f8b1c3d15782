"""quark."""

from collections.abc import Callable

import pytest

FIXTURES = [
    "quark-fp4-pergroup",
    "quark-fp8-kvcache",
    "quark-fp8-perchannel-dynamic",
    "quark-fp8-pertensor-static",
    "quark-int4-perchannel",
    "quark-int4-pergroup",
    "quark-int8-pergroup",
    "quark-int8-pertensor-static",
    "quark-mxfp4",
    "quark-mxfp6-e2m3",
]


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name)


def test_compiled(check_compiled: Callable) -> None:
    check_compiled("quark-uint4-pergroup")
