"""MXFP4, as gpt-oss has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.errors import CheckpointError

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
CONFIG = {"quant_method": "mxfp4"}


def test_weights_and_logits(check: Callable) -> None:
    model = check("mxfp4-gptoss")
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 64, 64) and experts.down_proj.shape == (4, 32, 64)
    assert experts.down_proj_bias.dtype == torch.float32


def test_optimized(check_compiled: Callable) -> None:
    model = check_compiled("mxfp4-gptoss")
    paths = {entry.path: str(entry.spec) for entry in qcompile.explain(model).plan.entries}
    assert paths["model.layers.1.mlp.experts.down_proj"] == "fp4_e2m1/g32/sym/scale(e8m0/tensor/sym)"


def tensors(experts: int = 3, rows: int = 5, groups: int = 2) -> dict[str, Tensor]:
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (experts, rows, groups), dtype=torch.uint8)
    return {"m.experts.up_blocks": blocks, "m.experts.up_scales": scales}


def test_layout(weights_of: Callable) -> None:
    written = tensors()
    got = weights_of(written, CONFIG)["m.experts.up"].dequantize()
    blocks, scales = written.values()
    assert got.shape == (3, 5, 64)
    for e in range(3):
        for row in range(5):
            for column in range(64):
                byte = int(blocks[e, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                assert got[e, row, column] == E2M1[code] * 2.0 ** (int(scales[e, row, column // 32]) - 127)


def test_the_configuration_may_say_nothing(weights_of: Callable) -> None:
    assert set(weights_of(tensors(), {})) == {"m.experts.up"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks": torch.zeros(3, 5, 2, 8, dtype=torch.uint8)}, "blocks of 8 bytes; 32 codes of 4 bits have 16"),
        ({"blocks": torch.zeros(3, 5, 2, 16)}, "up_blocks is float32, not uint8"),
        ({"blocks": torch.zeros(3, 5, 32, dtype=torch.uint8)}, "which is not of 4 dimensions"),
        ({"scales": torch.zeros(3, 5, 1, dtype=torch.uint8)}, r"up_scales is \(3, 5, 1\), not \(3, 5, 2\)"),
        ({"scales": torch.zeros(3, 5, 2)}, "up_scales is float32, not uint8"),
        ({"scales": torch.full((3, 5, 2), 255, dtype=torch.uint8)}, "up_scales holds numbers that are infinite or NaN"),
    ],
)
def test_errors(weights_of: Callable, change: dict[str, Tensor], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        weights_of(tensors() | {f"m.experts.up_{kind}": tensor for kind, tensor in change.items()}, CONFIG)
