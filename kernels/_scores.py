"""What is done to a model's scores before a token is chosen from them, where the kernels that choose read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels._tiles import refuses_device, tl, triton


@dataclass(frozen=True)
class Changes:
    """Tokens of `banned` bool[bans, vocabulary] count as -inf while `at` i64[1] is below the `least` i64[bans] of their
    row; all scores are divided by `temperature`, as torch divides a tensor by a number on a GPU."""

    banned: Tensor | None = None
    least: Tensor | None = None
    at: Tensor | None = None
    temperature: float = 1.0

    @property
    def bans(self) -> int:
        return 0 if self.banned is None else len(self.banned)

    @property
    def factor(self) -> float:
        """What scores are multiplied by: in float32, as torch inverts it."""
        return (torch.ones((), dtype=torch.float32, device="cpu") / self.temperature).item()


NONE = Changes()


def readable(scores: Tensor) -> Tensor:
    """The scores, row behind row, in a type that kernels read where they are."""
    return (scores if refuses_device(scores, scores.dtype) is None else scores.float()).contiguous()


@triton.jit
def scores_at(place, inside, scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, BANS: tl.constexpr):
    """The scores of this program's row at such places, as float32, not yet divided; -inf where they are not inside."""
    row = scores_ptr + tl.program_id(0).to(tl.int64) * vocabulary
    x = tl.load(row + place, mask=inside, other=float("-inf")).to(tl.float32)
    for ban in tl.static_range(BANS):
        early = tl.load(at_ptr) < tl.load(least_ptr + ban)
        banned = tl.load(banned_ptr + ban * vocabulary + place, mask=inside, other=0)
        x = tl.where(early & (banned != 0), float("-inf"), x)
    return x


@triton.jit
def ordered(x):
    """Integers in the order of float32 numbers; NaN is the largest."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
