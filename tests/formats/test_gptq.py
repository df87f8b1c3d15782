"""gptq. The packer here restates the layout in plain loops."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import qcompile
from qcompile.errors import CheckpointError

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
FIXTURES = [
    "gptq-autogptq-b4-g32-asym",
    "gptq-v1-b3-g32-asym",
    "gptq-v1-b4-g32-actorder",
    "gptq-v1-b4-g32-asym",
    "gptq-v1-b4-g32-sym",
    "gptq-v1-b4-gm1-sym",
    "gptq-v1-dynamic",
    "gptq-v2-b4-g32-asym-actorder",
    "gptq-v2-b8-gm1-asym",
]
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name, torch.float16)


def test_compiled(check_compiled: Callable) -> None:
    check_compiled("gptq-v1-b4-g32-actorder", torch.float16)


def test_optimized(check_optimized: Callable) -> None:
    check_optimized("gptq-v1-b3-g32-asym", torch.float16)


def words(codes: list[int], bits: int, planes: bool = False) -> list[int]:
    """Little-endian words of a stream of codes; by planes, 32 codes at a time."""
    if planes:
        packed, low = [], 0
        for start in range(0, len(codes), 32):
            low = 0
            for width in PLANES.get(bits, (bits,)):
                packed += words([(code >> low) % 2**width for code in codes[start : start + 32]], width)
                low += width
        return packed
    stream = sum(code << bits * place for place, code in enumerate(codes))
    return [(stream >> 32 * word) % 2**32 for word in range(-(-len(codes) * bits // 32))]


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in rows], dtype=torch.int32)


def packed(
    bits: int, index: list[int], out: int = 64, planes: bool = False, less: int = 1, zeros: str = "any"
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a module "m" whose inputs have these groups, and its weight in float64."""
    draw, columns, groups = random.Random(bits), len(index), max(index) + 1
    codes = [[draw.randrange(2**bits) for _ in range(columns)] for _ in range(out)]
    middle = 2 ** (bits - 1)
    zero = [[middle if zeros == "middle" else draw.randrange(1, 2**bits) for _ in range(out)] for _ in range(groups)]
    scale = torch.rand(groups, out).half() + 0.5
    weight = torch.zeros(out, columns, dtype=torch.float64)
    for row in range(out):
        for column, group in enumerate(index):
            weight[row, column] = (codes[row][column] - zero[group][row]) * float(scale[group, row])
    tensors = {
        "m.qweight": int32([words(row, bits, planes) for row in codes]).t(),
        "m.qzeros": int32([words([value - less for value in row], bits, planes) for row in zero]),
        "m.scales": scale,
        "m.g_idx": torch.tensor(index, dtype=torch.int32),
    }
    return tensors, weight


def plain(columns: int, size: int) -> list[int]:
    return [column // size for column in range(columns)]


def same(got: Any, want: Tensor) -> None:
    assert torch.equal(got["m.weight"].dequantize(torch.float64), want)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("writer", [{}, GPTQMODEL])
def test_bits(weights_of: Callable, bits: int, form: str, writer: dict[str, Any]) -> None:
    planes = form == "gptq_p" or bits in (5, 6, 7)
    tensors, weight = packed(bits, plain(64, 16), planes=planes, less=int(form == "gptq"))
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": False, "checkpoint_format": form, **writer}
    got = weights_of(tensors, config)
    same(got, weight)
    assert str(got["m.weight"].spec) == f"u{bits}/g16/asym_int"


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_symmetric_whatever_the_configuration_says(weights_of: Callable, less: int, form: str) -> None:
    tensors, weight = packed(4, plain(64, 32), less=less, zeros="middle")
    got = weights_of(tensors, {"quant_method": "gptq", "bits": 4, "checkpoint_format": form})
    same(got, weight)
    assert str(got["m.weight"].spec) == "i4/g32/sym"


def test_configuration_lies_about_bits_and_groups(weights_of: Callable) -> None:
    tensors, weight = packed(8, plain(64, 16))
    same(weights_of(tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128}), weight)


@pytest.mark.parametrize(
    ("columns", "size", "said", "spec"),
    [(64, 16, 16, "u4/g16/asym_int"), (64, 64, -1, "u4/row/asym_int"), (96, 64, 64, "u4/g32/asym_int")]
    + [(64, 32, None, "u4/g32/asym_int"), (40, 32, 32, "u4/g8/asym_int")],
)
def test_no_group_index(weights_of: Callable, columns: int, size: int, said: Any, spec: str) -> None:
    tensors, weight = packed(4, plain(columns, size))
    del tensors["m.g_idx"]
    got = weights_of(tensors, {"quant_method": "gptq", "bits": 4, "group_size": said, "sym": False})
    same(got, weight)
    assert str(got["m.weight"].spec) == spec


def test_act_order(weights_of: Callable) -> None:
    index = plain(64, 16)
    random.Random(0).shuffle(index)
    tensors, weight = packed(4, index)
    got = weights_of(tensors, {"quant_method": "gptq", "bits": 4, "desc_act": True, "sym": False})
    same(got, weight)
    assert str(got["m.weight"].spec) == "u4/g16/asym_int"
    assert got["m.weight"].order is not None


def test_groups_of_unequal_size(weights_of: Callable) -> None:
    index = [0] * 24 + [2] * 16 + [1] * 20 + [3] * 4
    random.Random(1).shuffle(index)
    tensors, weight = packed(4, index)
    got = weights_of(tensors, {"quant_method": "gptq", "bits": 4, "sym": False})
    same(got, weight)
    assert str(got["m.weight"].spec) == "u4/g4/asym_int"


def test_groups_counted_from_the_end(weights_of: Callable) -> None:
    tensors, weight = packed(4, plain(64, 16))
    tensors["m.g_idx"] -= 4
    same(weights_of(tensors, {"quant_method": "gptq", "bits": 4, "sym": False}), weight)


def with_zero(bits: int, code: str) -> tuple[dict[str, Tensor], Tensor]:
    """One group whose first zero point is 0, stored less one as `code` does it."""
    tensors, weight = packed(bits, [0] * 32, out=32)
    scale = tensors["m.scales"].double()
    codes = weight / scale.t() + _zero(tensors, bits)
    zero = _zero(tensors, bits)
    zero[0] = 0
    if code == "borrow":
        ones = sum(1 << shift for shift in range(0, 32, bits))
        stored = [(word - ones) % 2**32 for word in words([int(z) for z in zero.flatten()], bits)]
    else:
        stored = words([(int(z) - 1) % 2**bits for z in zero.flatten()], bits)
    tensors["m.qzeros"] = int32([stored])
    return tensors, (codes.round() - zero) * scale.t()


def _zero(tensors: dict[str, Tensor], bits: int) -> Tensor:
    stream = sum((int(word) % 2**32) << 32 * place for place, word in enumerate(tensors["m.qzeros"][0]))
    return torch.tensor([[(stream >> bits * row) % 2**bits + 1] for row in range(32)]).double()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero(weights_of: Callable, bits: int) -> None:
    config = {"quant_method": "gptq", "bits": bits, "sym": False}
    tensors, weight = with_zero(bits, "borrow")
    same(weights_of(tensors, {**config, **GPTQMODEL}), weight)
    tensors, weight = with_zero(bits, "wrap")
    same(weights_of(tensors, config), weight)


def test_zero_points_of_zero_at_3_bits(weights_of: Callable) -> None:
    tensors, weight = with_zero(3, "wrap")
    config = {"quant_method": "gptq", "bits": 3, "sym": False}
    same(weights_of(tensors, {**config, **GPTQMODEL}), weight)
    # AutoGPTQ reads its own 7 as 8.
    read = weights_of(tensors, config)["m.weight"]
    assert read.zero[0, 0] == 8


@pytest.mark.parametrize(
    ("config", "less"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, 1),
        ({"packing_format": "auto_round:exllamav2"}, 0),
        ({"backend": "auto_round:triton"}, 0),
        ({"backend": "auto_round:gptq:exllamav2"}, 1),
    ],
)
def test_auto_round(weights_of: Callable, config: dict[str, Any], less: int) -> None:
    tensors, weight = packed(4, plain(96, 64), less=less)
    del tensors["m.g_idx"]
    config |= {"quant_method": "auto-round", "bits": 4, "sym": False, "group_size": 32}
    same(weights_of(tensors, {**config, "extra_config": {"m": {"group_size": 64}}}), weight)


def test_modules_that_keep_their_weight_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D; its square ones too."""
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, architectures=["GPT2LMHeadModel"])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    for name, out in [("transformer.h.0.attn.c_proj", 64), ("transformer.h.0.attn.c_attn", 192)]:
        tensors, weight = packed(4, plain(64, 32), out=out)
        del state[f"{name}.weight"]
        state |= {key.replace("m.", f"{name}."): tensor.contiguous() for key, tensor in tensors.items()}
        model.get_submodule(name).weight = nn.Parameter(weight.t().float())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = {**config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4, "sym": False}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    ids = torch.arange(8)[None]
    got = qcompile.load(str(tmp_path), dtype=torch.float32, progress=False)(ids).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_head(tmp_path: Path, tied: bool) -> None:
    """It is untied from the embedding, which stays float. Old files hold rotary frequencies too."""
    folder = CHECKPOINTS / "gptq-v1-b4-g32-actorder"
    state = load_file(folder / "model.safetensors")
    tensors, weight = packed(4, plain(64, 32), out=208)
    del state["lm_head.weight"]
    state |= {key.replace("m.", "lm_head."): tensor.contiguous() for key, tensor in tensors.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["lm_head"] = True
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    loaded = qcompile.load(str(tmp_path), dtype=torch.float32, progress=False)
    assert torch.equal(loaded.lm_head.weight, weight.float())
    embedding = loaded.model.embed_tokens.weight
    assert torch.equal(embedding, state["model.embed_tokens.weight"].float())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("m.qzeros", None, r"m\.qzeros is missing"),
        ("m.scales", None, r"m\.scales is missing"),
        ("m.scales", torch.ones(4, 64, dtype=torch.int32), r"m\.scales is int32, not float16"),
        ("m.scales", torch.full((4, 64), float("inf")), r"m\.scales holds numbers that are infinite"),
        ("m.scales", torch.ones(4, 60), "neither AWQ's nor GPTQ's layout"),
        ("m.scales", torch.ones(0, 64), "fit no number of bits"),
        ("m.qzeros", torch.ones(4, 7, dtype=torch.int32), "fit no number of bits"),
        ("m.qzeros", torch.ones(4, 8), r"m\.qzeros is float32, not int32"),
        ("m.g_idx", torch.full((64,), 4, dtype=torch.int32), r"m\.g_idx has values beyond the 4 groups"),
        ("m.g_idx", torch.full((64,), -5, dtype=torch.int32), r"m\.g_idx has values beyond the 4 groups"),
        ("m.g_idx", torch.zeros(63, dtype=torch.int32), "fit no number of bits"),
        ("m.g_idx", torch.zeros(64), r"m\.g_idx is float32, not int32 or int64"),
        ("m.qweight", torch.zeros(0, 64, dtype=torch.int32), "fit no number of bits"),
        ("m.qweight", torch.zeros(64, dtype=torch.int32), r"m\.qweight is \(64,\), which is not of 2 dimensions"),
    ],
)
def test_bad_tensors(weights_of: Callable, name: str, value: Tensor | None, message: str) -> None:
    tensors, _ = packed(4, plain(64, 16))
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    with pytest.raises(CheckpointError, match=message):
        weights_of(tensors, {"quant_method": "gptq", "bits": 4})


def test_groups_that_do_not_divide(weights_of: Callable) -> None:
    tensors, _ = packed(4, plain(40, 10))
    del tensors["m.g_idx"]
    tensors["m.scales"], tensors["m.qzeros"] = tensors["m.scales"][:3], tensors["m.qzeros"][:3]
    with pytest.raises(CheckpointError, match="3 groups of scales do not divide 40 inputs, group_size is 8"):
        weights_of(tensors, {"quant_method": "gptq", "bits": 4, "group_size": 8})


def test_marlin(weights_of: Callable) -> None:
    tensors = {"m.B": torch.zeros(4, 4, dtype=torch.int32), "m.s": torch.ones(4, 4)}
    with pytest.raises(CheckpointError, match=r"by gptq \(marlin\).*are not read"):
        weights_of(tensors, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"})
