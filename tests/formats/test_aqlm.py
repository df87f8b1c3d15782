"""AQLM."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.errors import CheckpointError

CONFIG = {"quant_method": "aqlm"}


def test_weights_and_logits(check_compiled: Callable) -> None:
    model = check_compiled("aqlm-1x10-int16")
    specs = {str(entry.spec) for entry in qcompile.explain(model).plan.entries if entry.spec}
    assert specs == {"codebook/1x8/1024"}


def test_the_model_is_copied_saved_and_moved(check: Callable) -> None:
    model = check("aqlm-1x10-int16")
    projection = model.model.layers[0].self_attn.q_proj
    weight = projection.weight.clone()
    file = io.BytesIO()
    torch.save(projection, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin.weight, weight) and torch.equal(copy.deepcopy(projection).weight, weight)
    twin.packed_weight.data.zero_()
    assert not torch.equal(twin.weight, weight)
    twin.load_state_dict(projection.state_dict())
    assert torch.equal(twin.weight, weight)
    projection.to(torch.bfloat16)
    assert torch.equal(projection.weight, weight.bfloat16()) and projection.packed_weight.scale.dtype == torch.float16


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes of 0 … 2^bits - 1 as the signed integers that they are stored as."""
    wrapped = [code - 2**bits if code >= 2 ** (bits - 1) else code for code in codes.flatten().tolist()]
    dtype = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
    return torch.tensor(wrapped, dtype=dtype).reshape(codes.shape)


def tensors(stages: int, bits: int, height: int, width: int, down: int = 5, across: int = 3) -> dict[str, Tensor]:
    codes = torch.randint(0, 2**bits, (down, across, stages))
    codes[0, 0] = 2**bits - 1
    return {
        "m.codes": packed(codes, bits),
        "m.codebooks": torch.randn(stages, 2**bits, height, width).half(),
        "m.scales": torch.rand(down, 1, 1, 1).half() + 0.1,
        "codes": codes,
    }


@pytest.mark.parametrize(
    ("stages", "bits", "height", "width"),
    [(2, 8, 1, 8), (1, 16, 1, 8), (1, 12, 1, 16), (3, 5, 2, 4), (1, 17, 1, 4)],
)
def test_layout(weights_of: Callable, stages: int, bits: int, height: int, width: int) -> None:
    written = tensors(stages, bits, height, width)
    codes = written.pop("codes")
    got = weights_of(written, CONFIG)["m.weight"].dequantize(torch.float64)
    assert got.shape == (5 * height, 3 * width)
    books, scales = written["m.codebooks"].double(), written["m.scales"].double()
    for row in range(5 * height):
        for column in range(3 * width):
            tile = codes[row // height, column // width]
            total = sum(books[k, tile[k], row % height, column % width] for k in range(stages))
            assert got[row, column] == total * scales[row // height].squeeze()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes": None}, "m.codes is missing"),
        ({"scales": None}, "m.scales is missing"),
        (
            {"codes": torch.zeros(5, 3, 1, dtype=torch.int8)},
            "m.codes names entries of 1 codebooks",
        ),
        ({"codes": torch.zeros(5, 3, 2)}, "m.codes is float32, not int8 or int16 or int32"),
        (
            {"codes": torch.full((5, 3, 2), 256, dtype=torch.int16)},
            "m.codes holds 256 … 256; codebooks have 256",
        ),
        ({"codes": torch.full((5, 3, 2), -129, dtype=torch.int16)}, "m.codes holds -129"),
        ({"codebooks": torch.zeros(2, 255, 1, 8)}, "255 entries, which is no power of two"),
        ({"codebooks": torch.zeros(2, 256, 8)}, "which is not of 4 dimensions"),
        ({"codebooks": torch.full((2, 256, 1, 8), torch.nan)}, "m.codebooks holds numbers that are infinite or NaN"),
        ({"scales": torch.ones(4, 1, 1, 1)}, r"m.scales is \(4, 1, 1, 1\); 5 rows of tiles"),
        ({"scales": torch.full((5, 1, 1, 1), torch.inf)}, "m.scales holds numbers that are infinite"),
    ],
)
def test_errors(weights_of: Callable, change: dict[str, Any], says: str) -> None:
    written = tensors(2, 8, 1, 8) | {f"m.{kind}": tensor for kind, tensor in change.items()}
    del written["codes"]
    with pytest.raises(CheckpointError, match=says):
        weights_of({name: tensor for name, tensor in written.items() if tensor is not None}, CONFIG)
