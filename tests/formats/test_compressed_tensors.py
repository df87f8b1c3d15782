"""compressed-tensors."""

from collections.abc import Callable

import pytest
import torch

FIXTURES = [
    "ct-fp8-block",
    "ct-fp8-dynamic",
    "ct-fp8-static-kvcache",
    "ct-int8-w4a8-int-quantized",
    "ct-int8-w8a8-dynamic",
    "ct-int8-w8a8-static",
    "ct-mixed-precision",
    "ct-mxfp4",
    "ct-naive-fp8-weightonly",
    "ct-nvfp4",
    "ct-pack-w3-g32-oldpacking",
    "ct-pack-w3-g32-sym",
    "ct-pack-w4-channel-sym",
    "ct-pack-w4-g32-actorder-group",
    "ct-pack-w4-g32-sym",
]


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name, torch.bfloat16)


def test_compiled(check_compiled: Callable) -> None:
    check_compiled("ct-pack-w4-g32-asym", torch.bfloat16)
