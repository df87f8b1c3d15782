"""awq."""

from collections.abc import Callable

import pytest
import torch


@pytest.mark.parametrize("name", ["awq-gemm-g128", "awq-gemm-notconvert"])
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name, torch.float16)
