"""The tensors qweight, qzeros and scales, which AWQ and GPTQ both write: whose layout a module has, by its shapes."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.quant.granularity import PerGroup, PerRow

SCALES = (torch.float16, torch.bfloat16, torch.float32)


def layout(checkpoint: Checkpoint, module: str) -> str | None:
    """gptq, gemm, gemv or gemv_fast; None for what is no packed weight. Raises CheckpointError for other shapes.

    gptq       qweight int32 (words, out)    scales (groups, out)
    gemm       qweight int32 (in, out/8)     scales (groups, out)
    gemv       qweight int32 (out, words)    scales (out, padded groups)
    gemv_fast  qweight int16
    """
    qweight = checkpoint.need(f"{module}.qweight")
    if qweight.dtype not in (torch.int32, torch.int16):
        return None
    if qweight.dtype == torch.int16:
        return "gemv_fast"
    rows, words = checkpoint.need(f"{module}.qweight", 2).shape
    groups, outputs = checkpoint.need(f"{module}.scales", 2, SCALES).shape
    zeros = checkpoint.need(f"{module}.qzeros", 2).shape
    if words == outputs and (f"{module}.g_idx" in checkpoint.tensors or _said(checkpoint) == "gptq"):
        return "gptq"
    # Groups of one input, or of one word, are nobody's: where the rest fits both, rows are outputs.
    if rows == groups == zeros[0] and 8 * zeros[1] == outputs:
        return "gemv"
    if words == outputs:
        return "gptq"
    if 8 * words == outputs:
        return "gemm"
    raise CheckpointError(
        f"{module}: qweight of {(rows, words)} with scales of {(groups, outputs)} is neither AWQ's nor GPTQ's layout"
    )


def method(checkpoint: Checkpoint) -> str | None:
    """awq or gptq: what the first packed weight is; what the configuration says where there is none."""
    for module in checkpoint.modules("qweight"):
        if found := layout(checkpoint, module):
            return "gptq" if found == "gptq" else "awq"
    return _said(checkpoint)


def _said(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.quantization
    said = config.get("quant_method") or ("awq" if "w_bit" in config else None)
    return said if said in ("awq", "gptq") else None


def group_size(config: dict[str, Any], module: str) -> int | None:
    """What the configuration says of a module's group size; -1 is one group a row."""
    # auto-round lists the modules that differ.
    extra = config.get("extra_config")
    own = extra.get(module) if isinstance(extra, dict) else None
    for place in (own, config):
        for key in ("group_size", "q_group_size"):
            if isinstance(place, dict) and isinstance(size := place.get(key), int) and (size == -1 or size > 0):
                return size
    return None


def groups_of(size: int, columns: int) -> PerGroup | PerRow:
    return PerRow() if size == columns else PerGroup(size)


def none_packed(checkpoint: Checkpoint, name: str) -> CheckpointError:
    config = checkpoint.quantization
    kind = config.get("checkpoint_format") or config.get("format") or config.get("version")
    return CheckpointError(
        f"{checkpoint.folder.name} is quantized by {name} ({kind}) by its configuration, and has no tensor .qweight of "
        "packed words; layouts for one kernel alone, such as marlin and bitblas, are not read"
    )
