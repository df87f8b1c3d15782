"""Drawing a token of those that top_k, top_p and min_p leave: `_candidates` of each part of the vocabulary, `_draw`.

Which scores are left is a question of where the least of them lies. Both kernels find such borders bit by bit, by
counting, or adding up, what is not below: that takes no sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels._scores import NONE, Changes, ordered, part_of_scores, readable
from qcompile.kernels._tiles import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    refuses_device,
    tl,
    triton,
)

PART = 2048
# Candidates that one program holds in registers.
MOST = 8192
# Places for more than top_k candidates of a part: there may be several of the same score as the last one.
TIES = 14


def refuses(like: Tensor, vocabulary: int, top_k: int) -> str | None:
    """Why there is no `draw` from so many scores where `like` is, or None."""
    parts, room = cdiv(vocabulary, PART), power_of_two(top_k + TIES)
    if parts < 2 or room > PART // 2 or power_of_two(parts) * room > MOST:
        return f"handles no top_k of {top_k} among {vocabulary}"
    return refuses_device(like, torch.float32)


def draw(
    scores: Tensor, noise: Tensor, top_k: int, top_p: float, min_p: float, changes: Changes = NONE
) -> tuple[Tensor, Tensor]:
    """(tokens i64[batch], best f32[batch]): of every row of scores [batch, vocabulary], after the changes, the place of
    the largest quotient of probability and `noise` f32[batch, vocabulary] of positive numbers, and a multiple of that
    quotient, NaN where there is no probability.

    Probabilities are the softmax over what is left: the top_k largest scores, and what is as large as the least of
    them; of these, those after which, from the largest on, less than top_p has come; of these, those of at least min_p
    of the largest's. Of equal scores at the border of top_p those of the highest places are left, as torch sorts them.
    """
    batch, vocabulary = scores.shape
    scores, noise = readable(scores), noise.contiguous()
    parts, room = cdiv(vocabulary, PART), power_of_two(top_k + TIES)
    values = noise.new_empty(batch, parts, room)
    places = scores.new_empty(batch, parts, room, dtype=torch.int32)
    tokens, best = scores.new_empty(batch, dtype=torch.int64), noise.new_empty(batch)
    pdl = dependent_launch(scores)
    sizes = {"ROOM": room, "PDL": pdl}
    launch(
        _candidates, (batch, parts), scores, values, places, changes.banned, changes.least, changes.at, vocabulary,
        changes.factor, top_k, PART=PART, BANS=changes.bans, **sizes, num_warps=4,
    )  # fmt: skip
    block = power_of_two(parts * room)
    launch(
        _draw, (batch,), values, places, noise, tokens, best, vocabulary, parts * room, top_k, 1 - top_p, min_p,
        BLOCK=block, PDL=pdl, num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip
    return tokens, best


@triton.jit
def _largest_of(keys, count):
    """The largest integer that at least `count` of the keys reach."""
    low = tl.full((), -(2**31), tl.int64)
    for bit in range(32):
        middle = low + (tl.full((), 1, tl.int64) << (31 - bit))
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(reached >= count, middle, low)
    return low.to(tl.int32)


@launched
def _candidates(
    scores_ptr, found_ptr, places_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, factor, top_k,
    PART: tl.constexpr, BANS: tl.constexpr, ROOM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x, place, inside = part_of_scores(scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, factor, PART, BANS)
    keys = ordered(x)
    least = _largest_of(keys, top_k)
    larger, equal = (inside & (keys > least)).to(tl.int32), (inside & (keys == least)).to(tl.int32)
    # For all that are larger there is room.
    slot = tl.where(larger > 0, tl.cumsum(larger, 0), tl.sum(larger, 0) + tl.cumsum(equal, 0)) - 1
    chosen = (larger + equal > 0) & (slot < ROOM)
    out = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROOM
    tl.store(found_ptr + out + slot, x, mask=chosen)
    tl.store(places_ptr + out + slot, place, mask=chosen)
    empty = tl.arange(0, ROOM)
    tl.store(found_ptr + out + empty, float("-inf"), mask=empty >= tl.sum(chosen.to(tl.int32), 0))


@launched
def _draw(
    found_ptr, places_ptr, noise_ptr, tokens_ptr, best_ptr, vocabulary, count, top_k, tail, min_p,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(found_ptr + row * count + at, mask=at < count, other=float("-inf"))
    keys = ordered(x)
    left = (keys >= _largest_of(keys, top_k)) & (x != float("-inf"))
    place = tl.load(places_ptr + row * count + at, mask=left, other=vocabulary)
    top = tl.max(x, 0)
    weight = tl.where(left, tl.exp(x - top), 0.0)
    # What may go, from the least on, as far as it is not more than this in all.
    spare = tl.sum(weight, 0) * tail
    border = tl.full((), -(2**31), tl.int64)
    for bit in range(32):
        middle = border + (tl.full((), 1, tl.int64) << (31 - bit))
        below = tl.sum(tl.where(keys < middle.to(tl.int32), weight, 0.0), 0)
        border = tl.where(below <= spare, middle, border)
    # All below the border may go. The largest score stays, and of those at the border go as many as may.
    least = tl.minimum(border.to(tl.int32), tl.max(keys, 0))
    equal = left & (keys == least)
    each = tl.max(tl.where(equal, weight, 0.0), 0)
    below = tl.sum(tl.where(keys < least, weight, 0.0), 0)
    many = tl.sum(equal.to(tl.int32), 0)
    going = tl.minimum(((spare - below) / each).to(tl.int32), many - 1)  # type: ignore[operator]
    going = tl.where(spare > below, going, 0)
    first = tl.full((), -1, tl.int32)
    for bit in range(31):
        middle = first + (tl.full((), 1, tl.int32) << (30 - bit))
        before = tl.sum((equal & (place <= middle)).to(tl.int32), 0)
        first = tl.where(before <= going, middle, first)
    left = left & (keys >= least) & ((keys > least) | (place > first))
    left = left & (weight >= min_p)
    noise = tl.load(noise_ptr + row * vocabulary + place, mask=left, other=1.0)
    quotient = tl.where(left, weight / noise, -1.0)
    best = tl.max(quotient, 0)
    token = tl.min(tl.where(left & (quotient == best), place, vocabulary), 0)
    broken = tl.max(tl.where(x != x, 1, tl.where(top == float("-inf"), 1, 0)), 0) == 1
    tl.store(tokens_ptr + row, tl.where(broken, 0, token).to(tl.int64))
    tl.store(best_ptr + row, tl.where(broken, float("nan"), best))
