"""formats: one tensor of a real checkpoint spoiled; each is a CheckpointError and never a model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


# A fixture, a module of it and the tensors that make its weight.
FORMATS = {
    "aqlm-1x10-int16": "gate_proj codes codebooks scales",
    "awq-gemm-g128": "down_proj qweight qzeros scales",
    "awq-gemv-g32": "down_proj qweight qzeros scales",
    "awq-gemvfast-g64": "down_proj qweight qzeros scales",
    "awq-llmawq-g64": "down_proj qweight scaled_zeros scales",
    "bitnet-offline": "down_proj weight weight_scale",
    "bnb-int8": "down_proj weight SCB",
    "bnb-nf4": "down_proj weight weight.absmax weight.quant_state.bitsandbytes__nf4",
    "bnb-nf4-dq": "down_proj weight weight.absmax weight.nested_absmax weight.nested_quant_map",
    "ct-fp8-block": "down_proj weight weight_scale",
    "ct-fp8-static-kvcache": "down_proj weight weight_scale input_scale",
    "ct-int8-w4a8-int-quantized": "down_proj weight weight_scale",
    "ct-int8-w8a8-static": "down_proj weight weight_scale input_scale",
    "ct-mxfp4": "down_proj weight_packed weight_scale",
    "ct-nvfp4": "down_proj weight_packed weight_scale weight_global_scale input_global_scale",
    "ct-pack-w3-g32-sym": "down_proj weight_packed weight_scale weight_shape",
    "ct-pack-w4-g32-actorder-group": "down_proj weight_packed weight_scale weight_shape weight_g_idx",
    "ct-pack-w4-g32-asym": "down_proj weight_packed weight_scale weight_zero_point",
    "eetq-int8": "down_proj weight weight_scales",
    "fbgemm-fp8": "down_proj weight weight_scale",
    "fp8-block128": "down_proj weight weight_scale_inv",
    "fp8-block32-ue8m0": "down_proj weight weight_scale_inv",
    "fp8-tensor-dynamic": "down_proj weight weight_scale_inv",
    "gptq-v1-b3-g32-asym": "q_proj qweight qzeros scales",
    "gptq-v2-b4-g32-asym-actorder": "q_proj qweight qzeros scales g_idx",
    "hqq-b3-g64-axis0": "down_proj W_q scale zero shape axis group_size nbits",
    "hqq-b4-float-view-bf16": "down_proj W_q scale zero",
    "mxfp4-gptoss": "experts down_proj_blocks down_proj_scales",
    "quanto-float8": "down_proj weight._data weight._scale",
    "quanto-int4-g128": "down_proj weight._data._data weight._scale weight._shift",
    "quanto-int8-act-int8": "down_proj weight._data weight._scale input_scale output_scale",
    "quark-fp4-pergroup": "down_proj weight weight_scale",
    "quark-fp8-pertensor-static": "down_proj weight weight_scale input_scale",
    "quark-int4-perchannel": "down_proj weight weight_scale weight_zero_point",
    "quark-int8-pertensor-static": "down_proj weight weight_scale weight_zero_point input_scale",
    "quark-mxfp6-e2m3": "down_proj weight weight_scale",
    "quark-uint4-pergroup": "down_proj weight weight_scale weight_zero_point",
    "torchao-float8dyn-row": "v_proj _weight_qdata _weight_scale",
    "torchao-int4wo-plain-g32": "gate_proj _weight_qdata _weight_scale _weight_zero_point",
    "torchao-int8wo": "o_proj _weight_qdata _weight_scale _weight_zero_point",
    "vptq-v8-k256-r16": "down_proj indices centroids.weight res_centroids.weight perm weight_scale weight_bias",
}


def _nan(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize > 1:
        return torch.full_like(tensor, float("nan"))
    return torch.full(tensor.shape, 0x7F if tensor.dtype == torch.float8_e4m3fn else 0xFF).byte().view(tensor.dtype)


def _cast(tensor: Tensor) -> Tensor:
    return tensor.float().to(torch.int32) if tensor.is_floating_point() else tensor.float()


SPOILED: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "a row short": lambda tensor: tensor[:-1] if tensor.dim() > 1 else tensor.flatten()[:-1],
    "a column short": lambda tensor: tensor[..., :-1] if tensor.dim() else tensor.reshape(1).repeat(2),
    "cast": _cast,
    "NaN": _nan,
    "its largest code": lambda tensor: torch.full_like(tensor, torch.iinfo(tensor.dtype).max),
}
# Scales tell who shares them, so half of them are a coarser group, or one for all; what merely describes is not read
# where there is no doubt; and powers of two may be stored as floats.
ACCEPTED = {
    *("ct-fp8-block weight_scale: a column short", "ct-pack-w3-g32-sym weight_scale: a column short"),
    *("fp8-block128 weight_scale_inv: a column short", "quark-fp4-pergroup weight_scale: a column short"),
    *("ct-mxfp4 weight_scale: a column short", "quark-mxfp6-e2m3 weight_scale: a column short"),
    *("ct-mxfp4 weight_scale: cast", "quark-mxfp6-e2m3 weight_scale: cast"),
    *("hqq-b3-g64-axis0 nbits: cast", "hqq-b3-g64-axis0 W_q: cast"),
    *("quark-int4-perchannel weight_zero_point: missing", "quark-int8-pertensor-static weight_zero_point: missing"),
    *("quark-int8-pertensor-static weight_zero_point: a column short", "torchao-int8wo _weight_zero_point: cast"),
}
# Codes may have any value; these are not codes.
BOUNDED = ("g_idx", "perm", "shape", "axis", "group_size", "nbits", "_scales", "nf4")
# Scales as powers of two have a code that is no number, and no NaN.
POWERS = ("ct-mxfp4", "mxfp4-gptoss", "quark-mxfp6-e2m3")


def _cases() -> Iterator[str]:
    for fixture, text in FORMATS.items():
        for kind in text.split()[1:]:
            floating = fixture not in POWERS and ("scale" in kind or kind in ("zero", "SCB"))
            for damage in SPOILED:
                fits = {"NaN": floating, "its largest code": not floating and kind.endswith(BOUNDED)}.get(damage, True)
                if fits and (case := f"{fixture} {kind}: {damage}") not in ACCEPTED:
                    yield case


@pytest.mark.parametrize("case", list(_cases()))
def test_formats(tmp_path: Path, refused: Callable[..., Any], case: str) -> None:
    place, damage = case.split(": ")
    fixture, kind = place.split()
    module = FORMATS[fixture].split()[0]
    whole = CHECKPOINTS / fixture / "model.safetensors"
    tensors, metadata = load_file(whole), safe_open(whole, "pt").metadata()
    name = next(name for name in tensors if name.endswith(f"{module}.{kind}"))
    if (spoiled := SPOILED[damage](tensors.pop(name))) is not None:
        tensors[name] = spoiled.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    for side in (CHECKPOINTS / fixture).glob("*.json"):
        (tmp_path / side.name).symlink_to(side)
    with refused():
        qcompile.load(str(tmp_path), dtype=torch.float32, progress=False)


def test_enough_cases() -> None:
    assert len(list(_cases())) >= 520
