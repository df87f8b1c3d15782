"""The likeliest token of every sequence on the CPU, appended to the texts: one call of C++ (cpu/likeliest.h).

With torch's ops it is twenty calls, and each of them takes 20 us after a model's step has emptied the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import linear_cpu
from qcompile.kernels._follower_cpu import Follower
from qcompile.kernels._packed_cpu import FLOATS, KINDS


def refuses(text: Tensor) -> str | None:
    """Why likeliest tokens are not appended to such texts, or None."""
    if text.device.type != "cpu":
        return f"needs cpu, got {text.device.type}"
    if text.dtype != torch.int64:
        return f"handles tokens of int64, not {text.dtype}"
    return None if linear_cpu.without_python() else "the C++ that torch calls does not compile here"


class Likeliest(Follower):
    """A function of scores [batch, vocabulary], or [batch, 1, vocabulary]."""

    def __call__(self, scores: Tensor) -> None:
        if scores.dtype not in FLOATS:
            scores = scores.float()
        stride, *_, step = scores.stride()
        if step != 1:
            scores = scores.contiguous()
            stride = scores.stride(0)
        rows, *_, count = scores.shape
        self.op.run_follower(self.bound, scores.data_ptr(), rows, stride, count, KINDS[scores.dtype])


def bind_likeliest(
    banned: Tensor, least: Tensor, text: Tensor, at: Tensor, token: Tensor, unfinished: Tensor, pad: Tensor | None,
    ends: Tensor | None,
) -> Likeliest:  # fmt: skip
    """What does argmax of scores and `put` of decode_state.State, in the memory that these tensors have now. `banned`
    i64[n] are tokens in ascending order, each of which counts as -inf before there are `least` i64[n] tokens."""
    op = linear_cpu.without_python()
    assert op is not None
    kept = tuple(None if x is None else x.detach() for x in (banned, least, text, at, token, unfinished, pad, ends))
    bans = banned.data_ptr(), least.data_ptr(), len(banned)
    texts = text.data_ptr(), text.stride(0), at.data_ptr(), token.data_ptr(), unfinished.data_ptr()
    ending = (
        None if pad is None else pad.data_ptr(),
        None if ends is None else ends.data_ptr(),
        0 if ends is None else len(ends),
    )
    return Likeliest(op, op.bind_likeliest(*bans, *texts, *ending), kept)
