"""gptq. What GPTQModel makes of the file is asked where it is installed."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.files.checkpoint import open_checkpoint
from qcompile.writers.gptq import Gptq

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
UNSIGNED = [f"u{bits}/g32/asym_int" for bits in (2, 3, 4, 5, 8)]
SIGNED = [f"i{bits}/g64/sym" for bits in range(2, 9)]


@pytest.mark.parametrize("spec", [*UNSIGNED, *SIGNED, "u4/row/asym_int", "i8/row/sym", "ternary/g32/sym"])
def test_round_trip(packed: Callable, resaved: Callable, spec: str) -> None:
    resaved(packed(spec), "gptq")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout(weight: Callable, tensors_of: Callable, bits: int) -> None:
    """In plain loops: codes are a stream of bits along the inputs, zero points along the outputs."""
    given = weight(f"u{bits}/g32/asym_int", 32, 64)
    tensors = tensors_of(Gptq(), given)
    codes, zeros = given.tensor.codes(), given.tensor.zero
    assert tensors["scales"].equal(given.tensor.scale.t()) and tensors["scales"].dtype == torch.float16
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32
    for output in range(32):
        stream = sum((int(word) % 2**32) << 32 * at for at, word in enumerate(tensors["qweight"][:, output]))
        for column in range(64):
            assert stream >> bits * column & (2**bits - 1) == codes[output, column]
    for group in range(2):
        stream = sum((int(word) % 2**32) << 32 * at for at, word in enumerate(tensors["qzeros"][group]))
        for output in range(32):
            assert (stream >> bits * output & (2**bits - 1)) == zeros[output, group]


@pytest.mark.parametrize(("spec", "stored", "format"), [("i4/row/sym", 7, "gptq"), ("u4/row/asym_int", 8, "gptq_v2")])
def test_zero_points_are_less_one_where_all_are_the_middle(
    weight: Callable, tensors_of: Callable, tmp_path: Path, spec: str, stored: int, format: str
) -> None:
    given = weight(spec)
    if given.tensor.zero is not None:
        given = replace(given, tensor=replace(given.tensor, zero=torch.full_like(given.tensor.zero, 8)))
    word = int(str(stored) * 8, 16)
    assert set(tensors_of(Gptq(), given)["qzeros"].flatten().tolist()) == {word - 2**32 * (word >= 2**31)}
    assert open_checkpoint(tmp_path).quantization["checkpoint_format"] == format


def test_order_of_columns(resaved: Callable, tmp_path: Path) -> None:
    model = qcompile.load(str(CHECKPOINTS / "gptq-v1-b4-g32-actorder"), dtype=torch.float32, progress=False)
    resaved(model, "gptq")
    one, two = (open_checkpoint(place) for place in (CHECKPOINTS / "gptq-v1-b4-g32-actorder", tmp_path / "one"))
    assert two.quantization["desc_act"] is True
    names = [f"{module}.{kind}" for module in two.modules("qweight") for kind in ("qweight", "qzeros", "scales")]
    assert names and all(torch.equal(one.read(name), two.read(name)) for name in names)


def test_what_differs_from_most_is_a_rule(packed: Callable, resaved: Callable, tmp_path: Path) -> None:
    resaved(packed("u4/g32/asym_int", down_proj="i8/row/sym", o_proj="i4/g32/sym", v_proj=None), "gptq")
    said = open_checkpoint(tmp_path / "one").quantization
    assert (said["bits"], said["group_size"], said["sym"]) == (4, 32, False)
    rules = said["dynamic"]
    for path, rule in {"mlp.down_proj": {"bits": 8, "group_size": -1}, "self_attn.v_proj": {}}.items():
        own = [value for key, value in rules.items() if re.match(key[2:], f"model.layers.1.{path}")]
        assert own == [rule]
    assert not any(re.match(key[2:], "model.layers.1.self_attn.o_proj") for key in rules)


@pytest.mark.parametrize(
    ("spec", "fields", "reason"),
    [
        ("u4/g32/asym", {}, "its zero points are floats, such as"),
        ("fp8_e4m3/row/sym", {}, "fp8_e4m3 codes are not integers"),
        ("i4/g32/sym", {"rows": 48}, "48 outputs and 64 inputs; it packs multiples of 32"),
        ("i4/g32/sym", {"dtype": torch.float32}, "are no float16"),
        ("i4/g32/sym", {"kind": "embedding"}, "the embedding stays dense"),
        ("i4/g128/sym", {}, "scales by g128 are not those of neighbouring inputs"),
    ],
)
def test_refusals(weight: Callable, spec: str, fields: dict, reason: str) -> None:
    assert reason in (Gptq().refuses(weight(spec, **fields)) or "")


def test_a_bfloat16_scale_that_float16_cannot_hold(weight: Callable) -> None:
    given = weight("i4/g32/sym", dtype=torch.bfloat16)
    assert Gptq().refuses(given) is None  # eight bits of these
    large, small = (replace(given.tensor, scale=given.tensor.scale * factor) for factor in (2.0**20, 2.0**-30))
    assert "such as" in (Gptq().refuses(replace(given, tensor=large)) or "")
    assert "such as" in (Gptq().refuses(replace(given, tensor=small)) or "")


def test_linears_of_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_head=2, n_layer=1)).half()
    model = qcompile.optimize(model, "i4/g32/sym", progress=False)
    qcompile.save(model, tmp_path / "gpt2", format="gptq")
    want, got = (qcompile.dequantize(one) for one in (model, str(tmp_path / "gpt2")))
    assert all(torch.equal(want[path], got[path]) for path in got)


@pytest.mark.parametrize("spec", ["u4/g32/asym_int", "i4/g64/sym", "u3/g32/asym_int", "i8/row/sym", "ternary/g32/sym"])
def test_gptqmodel_reads_it(packed: Callable, tmp_path: Path, tiny_chat: Path, spec: str) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    from transformers import AutoTokenizer

    model = packed(spec, down_proj="i8/row/sym", v_proj=None)
    qcompile.save(model, tmp_path / "gptq", format="gptq", tokenizer=AutoTokenizer.from_pretrained(tiny_chat))
    options = {"device": "cpu", "backend": gptqmodel.BACKEND.TORCH, "dtype": torch.float16}
    theirs = gptqmodel.GPTQModel.load(str(tmp_path / "gptq"), **options).model
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert off(theirs(ids).logits, model(ids).logits) < 0.01


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the Euclidean norm; both are computed in 16 bits."""
    return float((got.float() - want.float()).norm() / want.float().norm())
