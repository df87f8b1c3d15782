"""hqq. The package's own layer reads the tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcompile.files.checkpoint import open_checkpoint
from qcompile.writers.hqq import Hqq

FLOATS = [f"u{bits}/g64/asym" for bits in (1, 2, 3, 4, 5, 8)]
# Groups of 128 of the flat weight are two rows of 64.
OTHERS = ["u4/o64/asym", "u3/o32/asym", "u4/row/asym", "u3/g128/asym", "i4/g32/sym", "u4/g32/asym_int", "i8/tensor/sym"]
NESTED = "u4/g64/asym/scale(u8/o16/asym)/zero(u8/tensor/asym)"


@pytest.mark.parametrize("spec", [*FLOATS, *OTHERS, "ternary/g32/sym", NESTED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip(packed: Callable, resaved: Callable, spec: str, dtype: torch.dtype) -> None:
    resaved(packed(spec, dtype=dtype, num_hidden_layers=1), "hqq")


def test_a_scheme_for_each_kind_of_linear(packed: Callable, resaved: Callable, tmp_path: Path) -> None:
    resaved(packed("u4/g64/asym"), "hqq")
    said = open_checkpoint(tmp_path / "one").quantization
    assert said["quant_config"]["weight_quant_params"]["group_size"] == 64 and said["skip_modules"] == ["lm_head"]
    resaved(packed("u4/g64/asym", down_proj="u2/o64/asym", v_proj=None), "hqq")
    said = open_checkpoint(tmp_path / "one").quantization
    assert "model.layers.1.self_attn.v_proj" in said["skip_modules"]
    kinds = said["quant_config"]
    assert sorted(kinds)[:2] == ["mlp.down_proj", "mlp.gate_proj"] and "self_attn.v_proj" not in kinds
    assert kinds["mlp.down_proj"]["weight_quant_params"]["axis"] == 0
    assert len(open_checkpoint(tmp_path / "one").tensors) == 12 * 19 + 9


@pytest.mark.parametrize(
    ("spec", "fields", "reason"),
    [
        ("u4/g32/shift", {}, "added after scaling"),
        ("nf4/g32/sym", {}, "nf4 codes are not integers"),
        ("u4/g32/asym", {"kind": "embedding"}, "the embedding stays dense"),
        ("i4/b16x24/sym", {}, "scales by b16x24 are not"),
    ],
)
def test_refusals(weight: Callable, spec: str, fields: dict, reason: str) -> None:
    assert reason in (Hqq().refuses(weight(spec, **fields)) or "")


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u3/g48/asym", "u2/o64/asym", "u1/g32/asym", "u8/row/asym"])
def test_the_package_reads_it(weight: Callable, tensors_of: Callable, spec: str) -> None:
    from hqq.core.quantize import HQQLinear

    given = weight(spec, 96, 64)
    state = tensors_of(Hqq(), given)
    layer = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
    layer.load_state_dict(state)
    codes = given.tensor.codes().to(torch.float16)
    scale, zero = (given.spec.granularity.spread(side, 96, 64) for side in (given.tensor.scale, given.tensor.zero))
    assert torch.equal(layer.dequantize(), (codes - zero) * scale)  # it rounds twice
