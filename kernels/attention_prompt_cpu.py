"""Attention of many query rows on the CPU, as in a prompt, in C++ of our own (kernels/cpu/attention_prompt.h).

Only blocks of keys that the mask lets someone attend to are read, and keys and values are laid out once for the heads
that share them. Codes become numbers before, in torch code that fuses with what comes before it.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels import attention_cpu
from qcompile.ops.attention import attention
from qcompile.ops.registry import opaque
from qcompile.ops.row_codes import dequantize_rows


def refuses(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run the call, or None."""
    if reason := attention_cpu.refuses_tensors(query, key, value, mask, key_scale, value_scale):
        return reason
    if is_causal and mask is not None:
        return "handles a mask or is_causal, not both"
    return None if attention_cpu.library().has_prompts() else "needs vectors of 512 bits"


def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[3]))


@opaque(_fake)
def attend_prompt(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    attention_cpu.library()  # after this call attention_op.cpp takes this one's place
    return attention.meaning(query, key, value, mask, is_causal, scale, softcap).transpose(1, 2).contiguous()


@attention.implementation("cpu_prompt", refuses, device="cpu")
def attention_prompt_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    if key_scale is not None and value_scale is not None:
        key = dequantize_rows.meaning(key, key_scale, query.dtype)
        value = dequantize_rows.meaning(value, value_scale, query.dtype)
    # Heads side by side are what the next linear reads.
    return attend_prompt(query, key, value, mask, is_causal, scale, softcap).transpose(1, 2)
