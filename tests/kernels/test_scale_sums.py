"""Sums of one or several parts against what they stand for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels.scale_sums import scale_sums


@pytest.mark.parametrize("kind", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize(("parts", "rows", "outputs"), [(1, 1, 8), (1, 5, 1030), (3, 3, 130)])
@pytest.mark.parametrize("shared", [False, True])
def test_meaning(
    kind: torch.dtype, parts: int, rows: int, outputs: int, shared: bool,
    dtype: torch.dtype, random_tensor: Callable[..., Tensor], assert_close: Callable[..., None],
) -> None:  # fmt: skip
    bias = random_tensor(outputs) if rows > 1 else None
    sums = torch.randint(-(10**6), 10**6, (parts, rows, outputs)).to(random_tensor(1).device, kind)
    step, scale = (torch.rand(1 if shared else n, device=sums.device) * 1e-3 for n in (rows, outputs))
    scale = scale.to(dtype)
    around = random_tensor(rows, outputs + 7)
    out, beside = around[:, 3 : 3 + outputs], around.clone()
    scale_sums(sums, step, scale, bias, out, "relu")
    want = sums.double().sum(0) * step.double()[:, None] * scale.double()
    assert_close(out.contiguous(), (want if bias is None else want + bias.double()).relu())
    assert torch.equal(around[:, :3], beside[:, :3]) and torch.equal(around[:, -4:], beside[:, -4:])


def test_integers_are_added_exactly(device: str) -> None:
    sums = torch.tensor([2**24 + 1, -(2**24)], dtype=torch.int32, device=device).view(2, 1, 1)
    one, out = torch.ones(1, device=device), torch.empty(1, 1, device=device)
    scale_sums(sums, one, one, None, out, None)
    assert out.item() == 1


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_what_codes_stand_for(
    code: torch.dtype, dtype: torch.dtype, random_tensor: Callable[..., Tensor], device: str
) -> None:
    if device == "cuda" and code != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU does not know fp8_e4m3")
    codes = (random_tensor(3, 1030) * 40).to(code)
    step, out = torch.rand(3, device=device), torch.empty(3, 1030, dtype=dtype, device=device)
    scale_sums(codes[None], step, None, None, out, None)
    assert torch.equal(out, (codes.float() * step[:, None]).to(dtype))
