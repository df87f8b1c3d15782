"""awq. The packers here restate the layouts in plain loops."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.errors import CheckpointError

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
FIXTURES = [
    "awq-gemm-g128",
    "awq-gemm-notconvert",
    "awq-gemv-g32",
    "awq-gemvfast-g64",
    "awq-llmawq-g64",
    "quark-awqcompat",
]
AWQ = {"quant_method": "awq", "bits": 4}


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name, torch.float16)


@pytest.mark.parametrize("name", ["awq-gemm-g128", "awq-gemvfast-g64"])
def test_optimized(check_optimized: Callable, name: str) -> None:
    check_optimized(name, torch.float16)


def word(codes: list[int]) -> int:
    value = sum((code % 16) << 4 * field for field, code in enumerate(codes))
    return value - 2**32 if value >= 2**31 else value


def drawn(out: int, columns: int, size: int, signed: bool = False) -> tuple[list, list, Tensor, Tensor]:
    """Codes, zero points, scales (out, groups) and the weight in float64."""
    draw, groups = random.Random(columns), columns // size
    low, high = (-8, 8) if signed else (0, 16)
    codes = [[draw.randrange(low, high) for _ in range(columns)] for _ in range(out)]
    zero = [[0 if signed else draw.randrange(16) for _ in range(groups)] for _ in range(out)]
    scale = torch.rand(out, groups).half() + 0.5
    weight = torch.zeros(out, columns, dtype=torch.float64)
    for row in range(out):
        for column in range(columns):
            group = column // size
            weight[row, column] = (codes[row][column] - zero[row][group]) * float(scale[row, group])
    return codes, zero, scale, weight


def gemm(out: int, columns: int, size: int, signed: bool = False, interleave: bool = True) -> tuple[dict, Tensor]:
    codes, zero, scale, weight = drawn(out, columns, size, signed)
    order = (0, 2, 4, 6, 1, 3, 5, 7) if interleave else range(8)

    def across(rows: list[list[int]]) -> Tensor:
        """Eight outputs a word, (…, out/8)."""
        return torch.tensor(
            [
                [word([rows[start + field][column] for field in order]) for start in range(0, out, 8)]
                for column in range(len(rows[0]))
            ],
            dtype=torch.int32,
        )

    return {"m.qweight": across(codes), "m.qzeros": across(zero), "m.scales": scale.t()}, weight


def gemv(out: int, columns: int, size: int) -> tuple[dict, Tensor]:
    codes, zero, scale, weight = drawn(out, columns, size)
    groups, step = columns // size, {32: 4, 64: 2}.get(size, 1)
    padded = math.ceil(math.ceil(groups / 8) / step) * step

    def along(rows: list[list[int]]) -> Tensor:
        return torch.tensor(
            [[word(row[at : at + 8]) for at in range(0, len(row), 8)] for row in rows], dtype=torch.int32
        )

    zeros = [row + [0] * (8 * padded - groups) for row in zero]
    scales = torch.zeros(out, 8 * padded, dtype=torch.float16)
    scales[:, :groups] = scale
    return {"m.qweight": along(codes), "m.qzeros": along(zeros), "m.scales": scales}, weight


def gemv_fast(out: int, columns: int, size: int, name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    codes, zero, scale, _ = drawn(out, columns, size)
    groups = columns // size
    places = [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27]
    places += [4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31]
    packed = []
    for top in range(0, out, 4):
        stored = []
        for left in range(0, columns, 64):
            for row in range(4):
                for half in (0, 32):
                    stored += [codes[top + row][left + half + place] for place in places]
        values = [
            sum(code << 4 * nibble for nibble, code in enumerate(stored[at : at + 4]))
            for at in range(0, len(stored), 4)
        ]
        packed.append([value - 2**16 if value >= 2**15 else value for value in values])
    scales, zeros = torch.zeros(2, -(-groups // 8) * 8 + 8, out, dtype=dtype)
    scales[:groups] = scale.t().to(dtype)
    zeros[:groups] = -(torch.tensor(zero).t() * scales[:groups].float()).to(dtype)
    wide = [side.double().repeat_interleave(size, 1) for side in (scales[:groups].t(), torch.tensor(zero))]
    weight = (torch.tensor(codes) - wide[1]) * wide[0]
    return {"m.qweight": torch.tensor(packed, dtype=torch.int16), f"m.{name}": zeros, "m.scales": scales}, weight


def same(got: Any, want: Tensor, spec: str) -> None:
    assert torch.equal(got["m.weight"].dequantize(torch.float64), want)
    assert str(got["m.weight"].spec) == spec


@pytest.mark.parametrize(("columns", "size", "tag"), [(64, 32, "g32"), (64, 64, "row"), (48, 16, "g16")])
def test_gemm(weights_of: Callable, columns: int, size: int, tag: str) -> None:
    tensors, weight = gemm(24, columns, size)
    same(weights_of(tensors, AWQ), weight, f"u4/{tag}/asym_int")
    same(weights_of(tensors, {"w_bit": 4, "q_group_size": 99, "zero_point": True}), weight, f"u4/{tag}/asym_int")
    same(
        weights_of(tensors, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
        weight,
        f"u4/{tag}/asym_int",
    )


@pytest.mark.parametrize("place", [{"pack_method": "order"}, {"export": {"pack_method": "order"}}])
def test_quark_does_not_interleave(weights_of: Callable, place: dict[str, Any]) -> None:
    tensors, weight = gemm(16, 64, 32, interleave=False)
    same(weights_of(tensors, {**AWQ, **place}), weight, "u4/g32/asym_int")


def test_quark_writes_signed_codes(weights_of: Callable) -> None:
    tensors, weight = gemm(16, 64, 32, signed=True)
    same(weights_of(tensors, {**AWQ, "zero_point": False}), weight, "i4/g32/sym")
    tensors, weight = gemm(16, 64, 32)  # the configuration lies
    same(weights_of(tensors, {**AWQ, "zero_point": False}), weight, "u4/g32/asym_int")


@pytest.mark.parametrize(("columns", "size"), [(64, 32), (128, 64), (256, 128), (96, 96), (1152, 128), (320, 32)])
def test_gemv(weights_of: Callable, columns: int, size: int) -> None:
    tensors, weight = gemv(12, columns, size)
    tag = "row" if size == columns else f"g{size}"
    same(weights_of(tensors, {**AWQ, "version": "gemv", "group_size": size}), weight, f"u4/{tag}/asym_int")
    same(weights_of(tensors, AWQ), weight, f"u4/{tag}/asym_int")


@pytest.mark.parametrize(("columns", "size"), [(128, 64), (192, 32), (128, 128)])
@pytest.mark.parametrize("name", ["qzeros", "scaled_zeros"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_fast(weights_of: Callable, columns: int, size: int, name: str, dtype: torch.dtype) -> None:
    tensors, weight = gemv_fast(8, columns, size, name, dtype)
    same(weights_of(tensors, {}), weight, f"u4/{'row' if size == columns else f'g{size}'}/asym_int")


def test_gemv_fast_with_zero_points_between_codes(weights_of: Callable) -> None:
    tensors, weight = gemv_fast(8, 128, 64, "qzeros", torch.float16)
    tensors["m.qzeros"][1, 3] += 0.25
    got = weights_of(tensors, AWQ)["m.weight"]
    assert str(got.spec) == "u4/g64/shift"
    wide = [tensors[f"m.{name}"][:2].t().double().repeat_interleave(64, 1) for name in ("scales", "qzeros")]
    assert torch.equal(got.dequantize(torch.float64), got.codes() * wide[0] + wide[1])
    torch.testing.assert_close(got.dequantize()[:3], weight[:3].float(), rtol=0, atol=2e-2)


def test_rows_that_start_inside_a_word(weights_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.quant.tensor.SLICE", 3 * 64)
    tensors, weight = gemm(24, 64, 32)
    same(weights_of(tensors, AWQ), weight, "u4/g32/asym_int")
    tensors, weight = gemv_fast(12, 64, 32, "qzeros", torch.float16)
    same(weights_of(tensors, AWQ), weight, "u4/g32/asym_int")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m.qzeros": None}, r"m\.qzeros is missing"),
        ({"m.scales": None}, r"m\.scales is missing"),
        ({"m.qzeros": torch.zeros(2, 3, dtype=torch.int32)}, r"m\.qzeros is \(2, 3\), not \(2, 2\)"),
        ({"m.qzeros": torch.zeros(2, 2)}, r"m\.qzeros is float32, not int32"),
        ({"m.scales": torch.full((2, 16), float("nan"))}, r"m\.scales holds numbers that are infinite or NaN"),
        (
            {"m.scales": torch.ones(3, 16), "m.qzeros": torch.zeros(3, 2, dtype=torch.int32)},
            "3 groups of scales do not",
        ),
        (
            {"m.scales": torch.ones(0, 16), "m.qzeros": torch.zeros(0, 2, dtype=torch.int32)},
            "0 groups of scales do not",
        ),
        ({"m.scales": torch.ones(2, 7)}, "neither AWQ's nor GPTQ's layout"),
        ({"m.scales": torch.ones(2, 8)}, "neither AWQ's nor GPTQ's layout"),
    ],
)
def test_bad_tensors(weights_of: Callable, changed: dict[str, Tensor | None], message: str) -> None:
    tensors = {**gemm(16, 64, 32)[0], **changed}
    with pytest.raises(CheckpointError, match=message):
        weights_of({name: tensor for name, tensor in tensors.items() if tensor is not None}, AWQ)


def test_bad_tensors_of_the_other_layouts(weights_of: Callable) -> None:
    tensors, _ = gemv(12, 64, 32)
    with pytest.raises(CheckpointError, match="0 groups of scales do not divide 64 inputs"):
        weights_of({**tensors, "m.scales": torch.zeros(12, 32)}, AWQ)
    with pytest.raises(CheckpointError, match="neither AWQ's nor GPTQ's layout"):
        weights_of({**tensors, "m.scales": torch.ones(12, 24)}, AWQ)
    tensors, _ = gemv_fast(8, 64, 32, "qzeros", torch.float16)
    with pytest.raises(CheckpointError, match=r"m\.qzeros is int32, not float16"):
        weights_of({**tensors, "m.qzeros": torch.ones(16, 8, dtype=torch.int32)}, AWQ)
    with pytest.raises(CheckpointError, match="blocks of 64 inputs"):
        weights_of({**tensors, "m.qweight": torch.ones(2, 32, dtype=torch.int16)}, AWQ)
    with pytest.raises(CheckpointError, match=r"by awq \(marlin\).*are not read"):
        weights_of({"m.B": torch.ones(2)}, {**AWQ, "version": "marlin"})


def test_float_weights_by_the_name_of_packed_ones(tmp_path: Path) -> None:
    name = "quark-awqcompat"
    shutil.copytree(CHECKPOINTS / name, tmp_path / name)
    tensors = load_file(tmp_path / name / "model.safetensors")
    renamed = {key.replace(".weight", ".qweight"): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    want, got = (qcompile.load(str(at / name), progress=False).state_dict() for at in (CHECKPOINTS, tmp_path))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


def test_activations_with_scales(tmp_path: Path) -> None:
    """What AWQ leaves in models whose activation no weight stands before: its output is divided by `scales`."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    model = BloomForCausalLM(config).eval()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    linear = "transformer.h.0.mlp.dense_4h_to_h"
    tensors, weight = gemm(32, 128, 32)
    del state[f"{linear}.weight"]
    state |= {key.replace("m.", f"{linear}."): tensor.contiguous() for key, tensor in tensors.items()}
    state["transformer.h.0.mlp.gelu_impl.scales"] = scales = torch.rand(128) + 0.5
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = {**config.to_dict(), "architectures": ["BloomForCausalLM"], "quantization_config": AWQ}
    (tmp_path / "config.json").write_text(json.dumps(said))

    block = model.transformer.h[0].mlp
    block.dense_4h_to_h.weight = nn.Parameter(weight.float() / scales)
    ids = torch.arange(8)[None]
    loaded = qcompile.load(str(tmp_path), dtype=torch.float32, progress=False)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    eager = loaded(ids).logits
    torch.testing.assert_close(qcompile.optimize(loaded, progress=False)(ids).logits, eager, rtol=1e-4, atol=1e-4)
