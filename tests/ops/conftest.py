"""What every op test needs: tensors of all kinds, torch's own check of an op, and a comparison with exact numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.ops.registry import Op

# Half a unit in the last place for one rounding at the end, and as much again for sums in float32.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture
def agrees() -> Callable[..., None]:
    """`agrees(op, *args, exact=…)`: the op passes opcheck, and what it gives rounds from the exact float64 numbers."""

    def check(op: Op, *args: Any, exact: Any, opcheck: bool = True) -> None:
        if opcheck:
            torch.library.opcheck(op.overload, args)
        results = op(*args)
        pairs = zip(results, exact, strict=True) if isinstance(results, tuple) else [(results, exact)]
        for got, want in pairs:
            assert got.shape == want.shape and not torch.isnan(got).any()
            torch.testing.assert_close(got.double(), want.double(), rtol=RTOL[got.dtype], atol=ATOL[got.dtype])

    return check


@pytest.fixture
def symbolic() -> Callable[..., None]:
    """`symbolic(function, small, large)`: captured once on small inputs, the op runs on large ones, with equal numbers.

    The first dimension of every input is symbolic.
    """

    def check(function: Callable[..., Any], small: tuple[Tensor, ...], large: tuple[Tensor, ...]) -> None:
        class Module(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Any:
                return function(*tensors)

        shapes = (tuple({0: torch.export.Dim.DYNAMIC} for _ in small),)
        program = torch.export.export(Module(), small, dynamic_shapes=shapes, strict=False)
        torch.testing.assert_close(program.module()(*large), function(*large))

    return check
