"""Drawing a token of those that top_k, top_p and min_p leave: `_largest_of_groups`, then `_draw`.

The top_k largest scores are in the groups whose largest are the top_k largest of all groups, so that a single program
has only those groups to look at. Where the least of what is kept lies is found by counting what is not below, two bits
at a time: that takes no sorting.
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
    launched,
    power_of_two,
    refuses_device,
    tl,
    triton,
)

# Scores of a group, twice as many where there would be more groups than one program holds; and groups of a program that
# looks for the largest of each.
GROUP, GROUPS = 32, 64
# What one program holds in registers: the largest of all groups, or the scores of the groups it takes.
MOST = 8192
# Places for more than top_k: several have the score of the last one, in 16 bits often.
TIES = 64
# Low bits of float32 in which numbers of a narrower type, made float32, have nothing to tell.
_LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
# Larger than the key of any score.
_NO_KEY = tl.constexpr(2**31 - 1)


def refuses(like: Tensor, vocabulary: int, top_k: int) -> str | None:
    """Why there is no `draw` from so many scores where `like` is, or None."""
    group = _group(vocabulary)
    if cdiv(vocabulary, group) > MOST or power_of_two(top_k + TIES) * group > MOST:
        return f"handles no top_k of {top_k} among {vocabulary}"
    return refuses_device(like, torch.float32)


def _group(vocabulary: int) -> int:
    return GROUP if vocabulary <= MOST * GROUP else 2 * GROUP


def draw(
    scores: Tensor, noise: Tensor, top_k: int, top_p: float, min_p: float, changes: Changes = NONE
) -> tuple[Tensor, Tensor]:
    """(tokens i64[batch], best f32[batch]): of every row of scores [batch, vocabulary], after the changes, the place of
    the largest quotient of probability and `noise` f32[batch, vocabulary] of positive numbers, and a multiple of that
    quotient; 0 and NaN where there is no probability: a score is NaN or inf, or all are -inf.

    Probabilities are the softmax over what is left: the top_k largest scores, and what is as large as the least of
    them, for as many as TIES of the lowest places; of these, those after which, from the largest on, less than top_p
    has come; of these, those of at least min_p of the largest's. Of equal scores at the border of top_p those of the
    highest places are left, as torch sorts them.
    """
    batch, vocabulary = scores.shape
    scores, noise = readable(scores), noise.contiguous()
    group, room = _group(vocabulary), power_of_two(top_k + TIES)
    groups = cdiv(vocabulary, group)
    largest = scores.new_empty(batch, groups, dtype=torch.int32)
    held, places = noise.new_empty(batch, room), scores.new_empty(batch, room, dtype=torch.int32)
    tokens, best = scores.new_empty(batch, dtype=torch.int64), noise.new_empty(batch)
    scaled = scores, changes.banned, changes.least, changes.at, vocabulary, changes.factor
    common = {
        "GROUP": group,
        "BANS": changes.bans,
        "LOW_BITS": _LOW_BITS[scores.dtype],
        "PDL": dependent_launch(scores),
    }
    launch(
        _largest_of_groups, (batch, cdiv(groups, GROUPS)), *scaled, largest, groups,
        GROUPS=GROUPS, **common, num_warps=4,
    )  # fmt: skip
    launch(
        _draw, (batch,), *scaled, largest, groups, held, places, noise, tokens, best, top_k, 1 - top_p, min_p,
        ALL=power_of_two(groups), ROOM=room, **common, num_warps=8,
    )  # fmt: skip
    return tokens, best


@launched
def _largest_of_groups(
    scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, factor, largest_ptr, groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BANS: tl.constexpr, LOW_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = scores_at(place, place < vocabulary, scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, BANS)
    keys = tl.max(_key(x, factor, LOW_BITS), 1)
    tl.store(largest_ptr + tl.program_id(0).to(tl.int64) * groups + group, keys, mask=group < groups)


@launched
def _draw(
    scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, factor, largest_ptr, groups, held_ptr, places_ptr, noise_ptr,
    tokens_ptr, best_ptr, top_k, tail, min_p,
    ALL: tl.constexpr, ROOM: tl.constexpr,
    GROUP: tl.constexpr, BANS: tl.constexpr, LOW_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    held_ptr, places_ptr = held_ptr + row * ROOM, places_ptr + row * ROOM
    group, slot = tl.arange(0, ALL), tl.arange(0, ROOM)
    keys = tl.load(largest_ptr + row * groups + group, mask=group < groups, other=-(2**31))
    low, high = tl.min(tl.where(group < groups, keys, _NO_KEY), 0), tl.max(keys, 0)
    to, count, low = _slots_of_largest(keys, group < groups, top_k, low, high, ROOM)
    tl.store(places_ptr + to, group, mask=to < ROOM)
    tl.debug_barrier()  # threads read what others wrote
    chosen = tl.load(places_ptr + slot, mask=slot < count, other=0)
    place = tl.reshape(chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (ROOM * GROUP,))
    inside = tl.reshape(tl.broadcast_to((slot < count)[:, None], (ROOM, GROUP)), (ROOM * GROUP,))
    inside = inside & (place < vocabulary)
    x = scores_at(place, inside, scores_ptr, banned_ptr, least_ptr, at_ptr, vocabulary, BANS)
    # At least top_k scores reach the border of the groups, unless there are fewer groups.
    low = tl.where(groups < top_k, -(2**31), low)
    to, count, low = _slots_of_largest(_key(x, factor, LOW_BITS), inside, top_k, low, high, ROOM)
    tl.debug_barrier()
    tl.store(held_ptr + to, x * factor, mask=to < ROOM)
    tl.store(places_ptr + to, place, mask=to < ROOM)
    tl.debug_barrier()
    x = tl.load(held_ptr + slot, mask=slot < count, other=float("-inf"))
    place = tl.load(places_ptr + slot, mask=slot < count, other=vocabulary)
    top = tl.max(x, 0)
    weight = _weight(x, top)
    # From the least on, as far as it is not more than this in all, may go; but for the largest.
    spare = tl.sum(weight, 0) * tail
    up_to = tl.zeros((ROOM,), tl.float32)
    for first in range(0, ROOM, 64):  # ROOM by ROOM are too many for the registers
        other = first + tl.arange(0, 64)
        y = tl.load(held_ptr + other, mask=other < count, other=float("-inf"))[None, :]
        behind = tl.load(places_ptr + other, mask=other < count, other=vocabulary)[None, :] > place[:, None]
        up_to += tl.sum(tl.where((y < x[:, None]) | ((y == x[:, None]) & ~behind), _weight(y, top), 0.0), 1)
    last = tl.max(tl.where(x == top, place, -1), 0)
    left = (x > float("-inf")) & ((up_to > spare) | (place == last)) & (weight >= min_p)
    noise = tl.load(noise_ptr + row * vocabulary + place, mask=left, other=1.0)
    quotient = tl.where(left, weight / noise, -1.0)
    best = tl.max(quotient, 0)
    token = tl.min(tl.where(left & (quotient == best), place, vocabulary), 0)
    # Where the largest is infinite, nothing is left.
    broken = tl.max(tl.where(x != x, 1, tl.where(best < 0, 1, 0)), 0) == 1  # type: ignore[operator]
    tl.store(tokens_ptr + row, tl.where(broken, 0, token).to(tl.int64))
    tl.store(best_ptr + row, tl.where(broken, float("nan"), best))


@triton.jit
def _weight(x, top):
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - top))


@triton.jit
def _key(x, factor, LOW_BITS: tl.constexpr):
    """Integers in the order of the scores: of narrow ones before they are divided, which keeps their order."""
    if LOW_BITS == 0:
        x = x * factor
    return ordered(x) >> LOW_BITS


@triton.jit
def _slots_of_largest(keys, inside, count, low, high, ROOM: tl.constexpr):
    """(slots, how many, border) of keys from low to high: slots 0, 1, … for the `count` largest of those inside, and
    behind them for those equal to the least of these, the border, as far as there is ROOM; ROOM for all others."""
    border = _largest_of(keys, inside, count, low, high)
    both = (inside & (keys > border)).to(tl.int32) + ((inside & (keys == border)).to(tl.int32) << 16)
    numbers = tl.cumsum(both, 0)
    total = tl.sum(both, 0).to(tl.int32)
    larger = total & 0xFFFF  # for all of these there is room
    slot = tl.where(keys > border, numbers & 0xFFFF, larger + (numbers >> 16)) - 1
    slot = tl.where(both > 0, tl.minimum(slot, ROOM), ROOM)
    return slot, tl.minimum(larger + (total >> 16), ROOM), border


@triton.jit
def _largest_of(keys, inside, count, low, high):
    """The largest integer from low to high that at least `count` of the keys inside reach; low if fewer do."""
    low, step = low.to(tl.int64), tl.full((), 1, tl.int64)
    while low + 4 * step <= high:
        step *= 4
    while step > 0:
        # Three counts in one sum.
        reached = (inside & (keys >= tl.minimum(low + step, _NO_KEY).to(tl.int32))).to(tl.int64)
        reached += (inside & (keys >= tl.minimum(low + 2 * step, _NO_KEY).to(tl.int32))).to(tl.int64) << 20
        reached += (inside & (keys >= tl.minimum(low + 3 * step, _NO_KEY).to(tl.int32))).to(tl.int64) << 40
        counts = tl.sum(reached, 0).to(tl.int64)
        passed = ((counts & 0xFFFFF) >= count).to(tl.int64) + (((counts >> 20) & 0xFFFFF) >= count).to(tl.int64)
        low += step * (passed + ((counts >> 40) >= count).to(tl.int64))
        step >>= 2
    return low.to(tl.int32)
