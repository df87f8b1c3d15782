"""fbgemm_fp8: 8-bit floats with a scale for each output, for inputs rounded token by token.

    P.weight                   float8_e4m3fn (out, in)          P.weight_scale            float32 (out, 1)
    X.gate_up_proj, down_proj  float8_e4m3fn (experts, in, out) X.gate_up_proj_scale, …   float32, experts * out numbers
    input_scale_ub             float32, one number: the configuration's activation_scale_ub again

https://github.com/huggingface/transformers (integrations/fbgemm_fp8.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._scaled import FLOAT8, float8, scaled
from qcompile.formats.stored import Rounding, Stored
from qcompile.quant.granularity import PerRow


class FbgemmFp8:
    name = "fbgemm_fp8"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        bound = checkpoint.quantization.get("activation_scale_ub", 1200.0)
        if type(bound) not in (int, float) or not 0 < bound < math.inf:
            raise CheckpointError(f"activation_scale_ub is {bound!r}, not a positive number")
        rounding = Rounding(f"fp8_e4m3/token/dynamic/max({float(bound)})")
        for name, info in checkpoint.tensors.items():
            if info.dtype not in FLOAT8:
                continue
            if len(info.shape) not in (2, 3):
                raise CheckpointError(f"{name} is {info.shape}, neither a matrix nor a stack of them")
            experts = len(info.shape) == 3
            shape = (info.shape[0], info.shape[2], info.shape[1]) if experts else info.shape
            codes = _transposed if experts else float8
            limit = f"{name.rpartition('.')[0]}.input_scale_ub"
            also = [limit] if limit in checkpoint.tensors else []
            element = FLOAT8[info.dtype]
            yield scaled(
                checkpoint, name, name, f"{name}_scale", element, PerRow(), shape, codes, also=also, input=rounding
            )


def _transposed(weight: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a stack of (in, out) matrices, which are columns of one matrix after the other."""
    rows = weight.shape[2]
    matrices = range(start // rows, -(-stop // rows))
    parts = [weight[i].view(torch.uint8)[:, max(0, start - i * rows) : stop - i * rows].t() for i in matrices]
    return torch.cat(parts)
