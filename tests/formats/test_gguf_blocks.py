"""_gguf_blocks: every type of blocks, beside llama.cpp's numbers and the gguf package's."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats._gguf_blocks import SIZES, TYPES, unpack
from qcompile.formats.gguf import _weight

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


@pytest.mark.parametrize("kind", TYPES)
def test_blocks(kind: str) -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "gguf-blocks" / "model.gguf")
    expected = load_file(CHECKPOINTS / "gguf-blocks" / "expected.safetensors")
    weight = unpack(kind, checkpoint.read(kind.lower()))
    assert torch.equal(weight.dequantize(), expected[kind.lower()])
    assert weight.spec == TYPES[kind].spec


@pytest.mark.parametrize("kind", TYPES)
def test_any_blocks(kind: str) -> None:
    """Blocks of any bytes, as the package reads them; several super blocks a row, sliced among the rows."""
    elements, size = SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (7, 1024 // elements, size), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}
    halves |= {"Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()}
    for at in halves.get(kind, (0,)):
        blocks[..., at + 1] = blocks[..., at + 1] & 0xBF  # no infinite scales
    if kind == "MXFP4":
        blocks[..., 0] = np.minimum(blocks[..., 0], 250)
    if kind == "NVFP4":
        blocks[..., :4] &= 0x3F
    rows = blocks.reshape(7, -1)
    expected = torch.from_numpy(gguf.dequantize(rows, GGMLQuantizationType[kind]).copy())
    assert torch.equal(unpack(kind, torch.from_numpy(rows)).dequantize(), expected)


def test_scales_of_scales_keep_their_dtype() -> None:
    weight = unpack("Q4_K", torch.zeros(2, 2 * 144, dtype=torch.uint8))
    assert str(weight.spec) == "u4/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)"
    assert weight.scale.shape == (2, 16)
    assert not isinstance(weight.scale, Tensor) and isinstance(weight.scale.scale, Tensor)
    assert weight.scale.scale.dtype == torch.float16


def test_infinite_scales() -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "gguf-blocks" / "model.gguf")
    for name, at in (("q4_0", 0), ("q4_1", 2), ("q4_k", 2), ("q6_k", 208)):
        raw = checkpoint.read(name)
        raw[1, at : at + 2] = torch.tensor([0x00, 0x7C])
        weight = _weight(checkpoint, name, "w", lambda rows: rows)
        with pytest.raises(CheckpointError, match=f"{name} holds numbers that are infinite"):
            weight.read(lambda name, raw=raw: raw)
