"""bitsandbytes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile
from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats import Stored
from qcompile.formats.bitsandbytes import BitsAndBytes
from qcompile.load import load
from qcompile.quant.activation import ActivationSpec
from qcompile.quant.element import ELEMENTS

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
STATE = "m.weight.quant_state.bitsandbytes__"


@pytest.mark.parametrize(("name", "dtype"), [("bnb-nf4", torch.bfloat16), ("bnb-nf4-dq", torch.float16)])
def test_four_bits(check: Callable, name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


def test_compiled(check_compiled: Callable) -> None:
    check_compiled("bnb-nf4", torch.bfloat16)


def test_int8() -> None:
    # The library dequantizes in float32 as (code * SCB) / 127, two roundings; a scale of SCB / 127 is one of them. It
    # multiplies in float16, where both are the same number.
    folder = CHECKPOINTS / "bnb-int8"
    weights = qcompile.dequantize(load(str(folder), dtype=torch.float32, quantize_inputs=False, progress=False))
    expected = {k: v for k, v in load_file(folder / "expected.safetensors").items() if k in weights}
    assert expected
    for path, want in expected.items():
        assert torch.equal(weights[path].half(), want.half()), path
        torch.testing.assert_close(weights[path], want, rtol=2**-23, atol=0)


def test_int8_rounds_activations(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.ones(2, 4, dtype=torch.int8), "m.SCB": torch.ones(2)}
    for threshold, text in [(4, "i8/token/dynamic/outliers(4.0)"), (0.0, "i8/token/dynamic")]:
        (weight,) = written(tmp_path, tensors, {"load_in_8bit": True, "llm_int8_threshold": threshold})
        assert weight.input is not None and weight.input.spec == text
        assert str(ActivationSpec.parse(text)) == text


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((4, 64), 32), ((6, 32), 64), ((5, 12), 8), ((3, 5), 4), ((3, 7), 64)],
    ids=["groups", "over-row-ends", "last-block-cut", "odd", "one-block"],
)
def test_blocks(tmp_path: Path, kind: str, storage: torch.dtype, shape: tuple[int, int], block: int) -> None:
    numel, table = math.prod(shape), ELEMENTS[{"nf4": "nf4", "fp4": "fp4_bnb"}[kind]].table
    assert table is not None
    codes, absmax = torch.randint(0, 16, (numel,)).tolist(), torch.rand(-(-numel // block)) + 0.5
    (weight,) = written(tmp_path, four_bits(codes, absmax, kind, shape, block, storage))
    want = [torch.tensor(table[code]) * absmax[place // block] for place, code in enumerate(codes)]
    assert torch.equal(read(tmp_path, weight), torch.stack(want).reshape(shape))


def test_double_quantization(tmp_path: Path) -> None:
    codes, blocks = [7] * 48, torch.tensor([0, 255, 9, 128, 3, 77], dtype=torch.uint8)
    tensors = four_bits(codes, blocks, "nf4", (6, 8), 8, torch.uint8, nested_blocksize=4, nested_offset=0.3)
    table, outer = torch.linspace(-1, 1, 256), torch.tensor([0.7, 1.9])
    tensors |= {"m.weight.nested_absmax": outer, "m.weight.nested_quant_map": table}
    (weight,) = written(tmp_path, tensors)
    scales = [table[code] * outer[place // 4] + torch.tensor(0.3) for place, code in enumerate(blocks.tolist())]
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(weight.read(checkpoint.read).scale.reshape(-1), torch.stack(scales))
    assert set(weight.tensors) == set(checkpoint.tensors)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not JSON": ({f"{STATE}nf4": torch.tensor([123], dtype=torch.uint8)}, "nf4 is not JSON"),
    "no shape": ({"state": {"blocksize": 8}}, "shape is None, not a count"),
    "block of 0": ({"state": {"shape": [2, 8], "blocksize": 0}}, "blocksize is 0, not a count"),
    "two types": ({"state": {"shape": [2, 8], "blocksize": 8, "quant_type": "fp4"}}, "the text says quant_type 'fp4'"),
    "bytes": ({"m.weight": torch.zeros(9, 1, dtype=torch.uint8)}, r"m.weight has 9 bytes; \(2, 8\) in 4 bits needs 8"),
    "no absmax": ({"m.weight.absmax": None}, "m.weight.absmax is missing"),
    "absmax": ({"m.weight.absmax": torch.ones(3)}, r"m.weight.absmax is \(3,\), not \(2,\)"),
    "NaN": ({"m.weight.absmax": torch.tensor([1.0, math.nan])}, "m.weight.absmax holds numbers that are infinite"),
    "nested": ({"m.weight.absmax": torch.zeros(2, dtype=torch.uint8)}, "nested_blocksize is None"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_errors(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = four_bits([1] * 16, torch.ones(2), "nf4", (2, 8), 8, torch.uint8)
    if "state" in change:
        change = {f"{STATE}nf4": text(change["state"])}
    with pytest.raises(CheckpointError, match=message):
        (weight,) = written(tmp_path, {k: v for k, v in (tensors | change).items() if v is not None})
        read(tmp_path, weight)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"m.weight_format": torch.tensor(2, dtype=torch.uint8)}, {}, "tiles of an old GPU kernel"),
        ({"m.SCB": torch.ones(3)}, {}, r"m.SCB is \(3,\), not \(2,\)"),
        ({"m.SCB": torch.tensor([1.0, math.inf])}, {}, "m.SCB holds numbers that are infinite"),
        ({}, {"llm_int8_threshold": "six"}, "llm_int8_threshold is 'six'"),
    ],
)
def test_int8_errors(tmp_path: Path, change: dict[str, Tensor], config: dict[str, Any], message: str) -> None:
    tensors = {"m.weight": torch.ones(2, 4, dtype=torch.int8), "m.SCB": torch.ones(2)}
    with pytest.raises(CheckpointError, match=message):
        (weight,) = written(tmp_path, tensors | change, config)
        read(tmp_path, weight)


def four_bits(
    codes: list[int], absmax: Tensor, kind: str, shape: tuple[int, ...], block: int, storage: torch.dtype, **nested: Any
) -> dict[str, Tensor]:
    """The tensors of one weight: high half of a byte first, bytes seen as words of the storage dtype."""
    packed = bytearray(-(-len(codes) // (2 * storage.itemsize)) * storage.itemsize)
    for place, code in enumerate(codes):
        packed[place // 2] |= code << (0 if place % 2 else 4)
    state = text({"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(shape), **nested})
    words = torch.frombuffer(packed, dtype=torch.uint8).clone().view(storage).reshape(-1, 1)
    return {"m.weight": words, "m.weight.absmax": absmax, f"{STATE}{kind}": state}


def text(state: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> list[Stored]:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config or {}}))
    checkpoint = open_checkpoint(folder)
    assert BitsAndBytes().claims(checkpoint)
    return list(BitsAndBytes().weights(checkpoint))


def read(folder: Path, weight: Stored) -> Tensor:
    return weight.read(open_checkpoint(folder).read).dequantize()
