"""8-bit floats in blocks (DeepSeek-V3, Qwen3-FP8), a tensor or MX groups at a time.

    P.weight            float8 (out, in), or bytes (out, in/2) of two 4-bit floats, the first in the low half
    P.weight_scale_inv  float32, bfloat16 or, as bytes, powers of two (ceil(out / height), ceil(in / width)), where the
                        configuration's weight_block_size is [height, width]; else one number. It is a factor
    P.activation_scale  one number: inputs are rounded by it. Else by what a token, or `width` inputs of it, hold

The scale is also called P.scale (DeepSeek-V4), P.qscale_weight (Mistral) and, in Quark's export for other readers,
P.weight_scale. Stacks of experts are (experts, out, in), their scales named X_scale_inv.
https://github.com/huggingface/transformers (integrations/finegrained_fp8.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._scaled import FLOAT8, POWERS, cache_scales, float8, pairs, scaled, shared_by
from qcompile.formats.stored import Entry, Rounding, Stored
from qcompile.quant.granularity import Granularity, PerBlock, PerGroup

SCALES = ("weight_scale_inv", "scale", "qscale_weight", "weight_scale")
INPUT_SCALES = ("activation_scale", "qscale_act", "input_scale")


class Fp8:
    name = "fp8"

    def claims(self, checkpoint: Checkpoint) -> bool:
        named = checkpoint.quantization.get("quant_method") in ("fp8", "mxfp8")
        return named or any(name.endswith("_scale_inv") for name in checkpoint.tensors)

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        for name, info in checkpoint.tensors.items():
            module, _, attribute = name.rpartition(".")
            own = [f"{module}.{kind}" for kind in SCALES] if attribute == "weight" else []
            scale = next((scale for scale in (*own, f"{name}_scale_inv") if scale in checkpoint.tensors), None)
            if info.dtype in FLOAT8 and scale is None:
                raise CheckpointError(f"{name} is 8-bit floats without a scale; {name}_scale_inv was expected")
            if scale and (info.dtype in FLOAT8 or info.dtype == torch.int8):
                yield _weight(checkpoint, name, scale)
        yield from cache_scales(checkpoint, "fp8_e4m3")


def _weight(checkpoint: Checkpoint, name: str, scale: str) -> Stored:
    info, scales = checkpoint.need(name), checkpoint.need(scale)
    *leading, columns = info.shape
    if len(leading) not in (1, 2):
        raise CheckpointError(f"{name} is {info.shape}, neither a matrix nor a stack of them")
    rows, block = math.prod(leading), checkpoint.quantization.get("weight_block_size")
    element, codes = FLOAT8.get(info.dtype, "fp4_e2m1"), float8
    if info.dtype == torch.int8:
        # Experts in 4 bits lie beside weights in 8; the blocks that the configuration gives are those of the latter.
        columns, codes, block = 2 * columns, pairs, None
    shape = (math.prod(scales.shape[:-1]), scales.shape[-1]) if scales.shape else ()
    granularity = shared_by(scale, shape, rows, columns, block)
    if isinstance(granularity, PerBlock) and leading[-1] % granularity.height and len(leading) > 1:
        raise CheckpointError(f"{scale}: blocks of {granularity} run over the end of experts with {leading[-1]} rows")
    rounding = _rounding(checkpoint, name, granularity, scales.dtype in POWERS)
    also = [rounding.scale] if rounding and rounding.scale else []
    return scaled(
        checkpoint, name, name, scale, element, granularity, (*leading, columns), codes, also=also, input=rounding
    )


def _rounding(checkpoint: Checkpoint, name: str, granularity: Granularity, powers: bool) -> Rounding | None:
    module = name.removesuffix(".weight")
    for kind in INPUT_SCALES:
        if (scale := f"{module}.{kind}") in checkpoint.tensors:
            return Rounding("fp8_e4m3/tensor/static", scale)
    scheme = checkpoint.quantization.get("activation_scheme", "dynamic")
    if scheme == "static":
        checkpoint.need(f"{module}.{INPUT_SCALES[0]}")
    if scheme is None:
        return None
    if isinstance(granularity, PerGroup):
        return Rounding(f"fp8_e4m3/g{granularity.size}/dynamic" + ("/scale(e8m0)" if powers else ""))
    width = f"g{granularity.width}" if isinstance(granularity, PerBlock) else "token"
    return Rounding(f"fp8_e4m3/{width}/dynamic")
