"""awq. What transformers makes of the file is asked where gptqmodel is installed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qcompile
from qcompile.errors import UnsupportedError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.writers.awq import Awq


@pytest.mark.parametrize(
    "spec", ["u4/g32/asym_int", "u4/row/asym_int", "i4/g64/sym", "u3/g32/asym_int", "ternary/g32/sym", "i4/tensor/sym"]
)
def test_round_trip(packed: Callable, resaved: Callable, spec: str) -> None:
    resaved(packed(spec), "awq")


def test_layout(weight: Callable, tensors_of: Callable) -> None:
    """In plain loops: a word holds eight neighbouring outputs, the even ones in its low half."""
    given = weight("u4/g32/asym_int", 16, 64)
    tensors = tensors_of(Awq(), given)
    codes, zeros = given.tensor.codes(), given.tensor.zero
    assert tensors["scales"].equal(given.tensor.scale.t()) and tensors["scales"].dtype == torch.float16
    for matrix, words in ((codes, tensors["qweight"]), (zeros, tensors["qzeros"])):
        assert words.shape == (matrix.shape[1], 2)
        for column in range(matrix.shape[1]):
            for output in range(16):
                field = [0, 4, 1, 5, 2, 6, 3, 7][output % 8]
                assert int(words[column, output // 8]) >> 4 * field & 15 == matrix[output, column]


def test_groups_of_different_sizes_become_groups_of_one(packed: Callable, resaved: Callable, tmp_path: Path) -> None:
    resaved(packed("u4/g64/asym_int", down_proj="u4/g32/asym_int", o_proj="u4/row/asym_int"), "awq")
    said = open_checkpoint(tmp_path / "one").quantization
    assert said["group_size"] == 32 and said["modules_to_not_convert"] == ["lm_head"]
    resaved(packed("u4/row/asym_int"), "awq")
    assert open_checkpoint(tmp_path / "one").quantization["group_size"] == -1


@pytest.mark.parametrize(
    ("spec", "fields", "reason"),
    [
        ("u4/g32/asym", {}, "its zero points are floats, such as"),
        ("u4/g32/shift", {}, "its zero points lie between codes"),
        ("u8/g32/asym_int", {}, "8-bit codes; it holds at most 4 bits"),
        ("nf4/g32/sym", {}, "nf4 codes are not integers"),
        ("i4/o32/sym", {}, "scales by o32 are not those of neighbouring inputs"),
        ("i4/g32/sym", {"rows": 20}, "20 outputs; a word holds 8"),
        ("i4/g32/sym", {"dtype": torch.float32}, r"\d+ of 64 scales, such as [\d.]+, are no float16"),
        ("i4/g32/sym", {"kind": "embedding"}, "the embedding stays dense"),
        ("i4/g32/sym", {"kind": "head"}, "the head stays dense"),
        ("i4/g32/sym", {"transposed": True}, "not transposed ones"),
    ],
)
def test_refusals(weight: Callable, spec: str, fields: dict, reason: str) -> None:
    assert re.search(reason, Awq().refuses(weight(spec, **fields)) or "")


def test_requantize(packed: Callable, tmp_path: Path) -> None:
    model = packed("u4/g32/asym", lm_head="u4/g32/asym_int", up_proj="u4/g32/asym_int")
    with pytest.raises(UnsupportedError, match=r"13 of 15 weights have no exact form in awq; requantize=True") as error:
        qcompile.save(model, tmp_path / "awq", format="awq")
    assert "q_proj.weight u4/g32/asym: its zero points are floats" in str(error.value)
    assert "as u4/g32/asym_int it would be off by" in str(error.value) and "and 5 more" in str(error.value)
    assert not (tmp_path / "awq").exists()
    errors = qcompile.save(model, tmp_path / "awq", format="awq", requantize=True, progress=False)
    assert len(errors) == 13 and 0 < max(errors.values()) < 0.2
    tensors = load_file(tmp_path / "awq" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.float16
    want, got = (qcompile.dequantize(one) for one in (model, str(tmp_path / "awq")))
    for path, numbers in want.items():
        assert off(got[path], numbers) == pytest.approx(errors.get(path, 0), abs=1e-6)


def test_transformers_reads_it(packed: Callable, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM

    model = packed("u4/g32/asym_int", v_proj=None)
    qcompile.save(model, tmp_path / "awq", format="awq")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "awq", dtype=torch.float16, device_map="cpu")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert off(theirs(ids).logits, model(ids).logits) < 0.01


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the Euclidean norm; both are computed in 16 bits."""
    return float((got.float() - want.float()).norm() / want.float().norm())
