"""The likeliest token of every sequence on a GPU: the best of each part of the vocabulary, then of these.

With torch's ops it is a launch for each of a handful of small tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels._scores import NONE, Changes, ordered, readable, scores_at
from qcompile.kernels._tiles import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    power_of_two,
    refuses_device,
    tl,
    triton,
)

PART = 2048
# Parts that one program holds in registers.
MOST = 4096


def refuses(like: Tensor, vocabulary: int) -> str | None:
    """Why there is no `likeliest` of so many scores where `like` is, or None."""
    if vocabulary > MOST * PART:
        return f"handles {MOST * PART} tokens, not {vocabulary}"
    return refuses_device(like, torch.float32)


def likeliest(scores: Tensor, changes: Changes = NONE) -> Tensor:
    """i64[batch]: of every row of scores [batch, vocabulary], after the changes, the place of the first of the largest,
    where NaN is larger than any number."""
    batch, vocabulary = scores.shape
    scores, parts, pdl = readable(scores), cdiv(vocabulary, PART), dependent_launch(scores)
    best = torch.empty(batch, parts, dtype=torch.int64, device=scores.device)
    tokens = best.new_empty(batch)
    launch(
        _best_of_part, (batch, parts), scores, best, changes.banned, changes.least, changes.at, vocabulary,
        changes.factor, PART=PART, BANS=changes.bans, PDL=pdl, num_warps=4,
    )  # fmt: skip
    launch(_best_of_row, (batch,), best, tokens, parts, BLOCK=power_of_two(parts), PDL=pdl, num_warps=1)
    return tokens


@triton.jit
def _best_of_part(
    scores_ptr, best_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, factor,
    PART: tl.constexpr, BANS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each part one integer: in the upper half the score, in the lower one what falls from place to place."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(1) * PART + tl.arange(0, PART)
    x = scores_at(place, place < vocabulary, scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, BANS)
    both = (ordered(x * factor).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
    tl.store(best_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.max(both, 0))


@triton.jit
def _best_of_row(best_ptr, tokens_ptr, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    best = tl.max(tl.load(best_ptr + row * parts + part, mask=part < parts, other=-(2**63)), 0)
    tl.store(tokens_ptr + row, 0x7FFFFFFF - (best & 0x7FFFFFFF))
