"""The op, and layers that the real libraries computed with rounded activations (tests/checkpoints, act.*)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qcompile.ops.activation_rounding import round_activation

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "spec", ["i8/token/dynamic", "u8/g32/dynamic", "i8/token/dynamic/outliers(1.0)", "fp8_e4m3/tensor/dynamic"]
)
def test_dynamic(symbolic: Callable, spec: str) -> None:
    x = torch.randn(3, 5, 48)
    torch.library.opcheck(round_activation.overload, (x, None, None, spec))
    symbolic(lambda x: round_activation(x, None, None, spec), (x,), (torch.randn(7, 5, 48),))


def test_static() -> None:
    args = torch.randn(3, 48), torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8), "u8/tensor/static"
    torch.library.opcheck(round_activation.overload, args)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("i8", "i8/token/dynamic"),
        ("outliers", "i8/token/dynamic/outliers(2.0)"),
        ("fp8", "fp8_e4m3/token/dynamic"),
        ("mx", "fp4_e2m1/g32/dynamic/scale(e8m0)"),
    ],
)
def test_compiled_as_eager(name: str, spec: str) -> None:
    compiled = torch.compile(lambda x: round_activation.meaning(x, None, None, spec))
    x = torch.randn(6, 64)
    assert torch.equal(compiled(x), round_activation(x, None, None, spec))


def layer(name: str, rows: str = "") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The tensors of a layer, an input, and what its library made of it."""
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    expected = load_file(CHECKPOINTS / name / "expected.safetensors")
    mine = {key.removeprefix(f"{LAYER}."): tensor for key, tensor in tensors.items() if key.startswith(LAYER)}
    return mine, expected[f"act.{LAYER}.{rows}x"], expected[f"act.{LAYER}.{rows}y"]


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.abs().max())


@pytest.mark.parametrize("rows", ["rows5.", "rows1."])
def test_bitsandbytes(rows: str) -> None:
    mine, x, want = layer("bnb-int8", rows)
    weight = mine["weight"].float() * mine["SCB"][:, None] / 127
    got = round_activation(x, None, None, "i8/token/dynamic/outliers(6.0)") @ weight.T
    assert off(got, want) < 2**-10  # its result is float16
    assert off(round_activation(x, None, None, "i8/token/dynamic") @ weight.T, want) > 2**-8


@pytest.mark.parametrize(
    ("name", "spec", "unlike"),
    [
        ("torchao-int8dyn-int8", "i8/token/dynamic/half", "i8/token/dynamic"),
        ("torchao-int8dyn-int4", "u8/token/dynamic", "i8/token/dynamic"),
        ("torchao-float8dyn-row", "fp8_e4m3/token/dynamic", "fp8_e4m3/token/dynamic/max(1.0)"),
    ],
)
def test_torchao(name: str, spec: str, unlike: str) -> None:
    mine, x, want = layer(name)
    data, scale = mine["_weight_qdata"].float(), mine["_weight_scale"].float()
    weight = (data.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)

    def run(spec: str) -> Tensor:
        # It computes in bfloat16, scales of activations included.
        return round_activation(x.to(torch.bfloat16), None, None, spec).float() @ weight.T

    assert off(run(spec), want) < 2**-7
    assert off(run(spec), want) < off(run(unlike), want)


def test_fbgemm() -> None:
    mine, x, want = layer("fbgemm-fp8")
    weight = mine["weight"].float() * mine["weight_scale"]
    got = round_activation(x, None, None, "fp8_e4m3/token/dynamic/max(1200.0)") @ weight.T
    assert off(got, want) < 2**-8
