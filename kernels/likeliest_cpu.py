"""The likeliest token of every sequence on the CPU, appended to the texts: one call of C++ (cpu/likeliest.h).

With torch's ops it is twenty calls, and each of them takes 20 us after a model's step has emptied the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import linear_cpu
from qcompile.kernels._packed_cpu import FLOATS, KINDS


def refuses(text: Tensor) -> str | None:
    """Why put_likeliest does not append to such texts, or None."""
    if text.device.type != "cpu":
        return f"needs cpu, got {text.device.type}"
    if text.dtype != torch.int64:
        return f"handles tokens of int64, not {text.dtype}"
    return None if linear_cpu.without_python() else "the C++ that torch calls does not compile here"


def put_likeliest(
    scores: Tensor, banned: Tensor, least: Tensor, text: Tensor, at: Tensor, token: Tensor, unfinished: Tensor,
    pad: Tensor | None, ends: Tensor | None,
) -> None:  # fmt: skip
    """What argmax of scores [batch, vocabulary] and `put` of decode_state.State do. `banned` i64[n] are tokens in
    ascending order, each of which counts as -inf before there are `least` i64[n] tokens."""
    op = linear_cpu.without_python()
    assert op is not None
    if scores.dtype not in FLOATS:
        scores = scores.float()
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    op.put_likeliest(
        scores.data_ptr(), scores.shape[0], scores.stride(0), scores.shape[1], KINDS[scores.dtype],
        banned.data_ptr(), least.data_ptr(), len(banned), text.data_ptr(), text.stride(0), at.data_ptr(),
        token.data_ptr(), unfinished.data_ptr(), None if pad is None else pad.data_ptr(),
        None if ends is None else ends.data_ptr(), 0 if ends is None else len(ends),
    )  # fmt: skip
