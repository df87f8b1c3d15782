"""What warps of attention read that have keys of their own, and what they make of it; see _attention_operands.

`masks` are where the mask of the first key lies, how far the next one's is, and how many keys there are. Step s of a
program is block s * SPLITS + part, of KEYS keys for each warp.
"""

from __future__ import annotations

from qcompile.kernels._attention import is_attended
from qcompile.kernels._attention_operands import add_values, logits_of, of_keys, of_values, weigh
from qcompile.kernels._gluon import gl, gluon
from qcompile.kernels._tiles import fetch as fetch_lines


@gluon.jit
def _places(L: gl.constexpr):
    """(warps, keys): the places in a block of the rows of keys or values."""
    P: gl.constexpr = gl.SliceLayout(2, L)
    warp = gl.arange(0, L.shape[0], layout=gl.SliceLayout(1, P))
    return warp[:, None] * L.shape[1] + gl.arange(0, L.shape[1], layout=gl.SliceLayout(0, P))[None, :]


@gluon.jit
def _mask_of(masks, n, CACHED: gl.constexpr):
    """The mask of keys n, and which of them are attended to."""
    mask_ptr, mask_column, keys = masks
    inside = n < keys
    if mask_ptr is None:
        return inside, inside
    else:
        at = mask_ptr + n.to(gl.int64) * mask_column
        mask = gl.load(at, mask=inside, other=0, cache_modifier=CACHED)
        return mask, is_attended(mask) & inside


@gluon.jit
def _wanted(masks, start, LK: gl.constexpr, LV: gl.constexpr):
    """Of a block, which keys are to be read, and of its values the mask and which are to be read."""
    _, of_k = _mask_of(masks, start + _places(LK), "")
    mask, of_v = _mask_of(masks, start + _places(LV), "")
    return of_k, mask, of_v


@gluon.jit
def _own_steps(masks, part, steps, BLOCK: gl.constexpr, SPLITS: gl.constexpr):
    """For each thread the first of this program's steps in which it sees a key, and the one behind the last."""
    COUNT: gl.constexpr = 512 * gl.num_warps()
    L: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    lowest = gl.full([COUNT], 0, gl.int32, L) + steps
    highest = gl.full([COUNT], 0, gl.int32, L)
    i = gl.arange(0, COUNT, layout=L)
    for start in range(0, steps * BLOCK, COUNT):
        step = (start + i) // BLOCK
        _, seen = _mask_of(masks, (step * SPLITS + part) * BLOCK + i % BLOCK, "")
        seen &= step < steps
        lowest = gl.where(seen, gl.minimum(lowest, step), lowest)
        highest = gl.where(seen, gl.maximum(highest, step + 1), highest)
    return lowest, highest


@gluon.jit
def fetch(
    ptr, masks, part, ROW: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, SPLITS: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """Begin to bring keys or values of this program's first steps to the L2 cache, those that are attended to by the
    mask as it is by now: the kernel before may have yet to write it."""
    LINES: gl.constexpr = D // 64
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LINES, LINES], [gl.num_warps(), 1], [1, 0])
    i = gl.arange(0, STEPS * BLOCK, layout=gl.SliceLayout(1, L))
    n = (i // BLOCK * SPLITS + part) * BLOCK + i % BLOCK
    _, seen = _mask_of(masks, n, ".cg")  # which nothing finds in the L1 cache later
    line = gl.arange(0, LINES, layout=gl.SliceLayout(0, L)) * 64
    at = (ptr + (n.to(gl.int64) * ROW)[:, None] + line[None, :]).to(gl.int64)
    seen, at = gl.broadcast(seen[:, None], at)
    fetch_lines(at, seen)


@gluon.jit
def _read(ptr, start, wanted, others, ROW: gl.constexpr, L: gl.constexpr):
    """Those rows of a block of a cache that are wanted, as pairs of columns, beside others."""
    pair = gl.arange(0, L.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    at = gl.expand_dims(_places(L) * (ROW // 2), 2) + pair
    ptr = ptr.to(gl.pointer_type(gl.int32), bitcast=True) + start.to(gl.int64) * (ROW // 2)
    wanted, at = gl.broadcast(gl.expand_dims(wanted, 2), at)
    return gl.load(ptr + at, mask=wanted, other=others)


@gluon.jit
def first_step(
    k_ptr, v_ptr, masks, part, K_ROW: gl.constexpr, V_ROW: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    SPLITS: gl.constexpr, IN_ONE: gl.constexpr,
):  # fmt: skip
    """Keys and values of the first step in which anyone attends, the mask and who is attended to, and which step it is
    and which is behind the last."""
    BLOCK: gl.constexpr = gl.num_warps() * KEYS
    LK: gl.constexpr = of_keys(gl.num_warps(), KEYS, D)
    LV: gl.constexpr = of_values(gl.num_warps(), KEYS, D)
    SEARCHED: gl.constexpr = masks[0] is not None and not IN_ONE
    start = part * BLOCK
    first, end = 0, gl.cdiv(gl.cdiv(masks[2], BLOCK) - part, SPLITS)
    of_k, mask, of_v = _wanted(masks, start, LK, LV)
    if SEARCHED:
        lowest, highest = _own_steps(masks, part, end, BLOCK, SPLITS)
    # The search ends while keys are on their way; most masks begin in the first step.
    k = _read(k_ptr, start, of_k, None, K_ROW, LK)
    v = _read(v_ptr, start, of_v, 0, V_ROW, LV)
    if SEARCHED:
        first, end = gl.min(lowest, 0), gl.max(highest, 0)
        if first > 0:
            start = (first * SPLITS + part) * BLOCK
            of_k, mask, of_v = _wanted(masks, start, LK, LV)
            k = _read(k_ptr, start, of_k, None, K_ROW, LK)
            v = _read(v_ptr, start, of_v, 0, V_ROW, LV)
    return k, v, mask, of_v, first, end


@gluon.jit
def walk(
    q, sums, step, k_ptr, v_ptr, masks, part, scale, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    KEYS: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Add to each warp's sums, (warps, columns, eight rows), tops and totals what it finds from the first step on."""
    y, top, total = sums
    k, v, mask, seen, first, end = step
    LK: gl.constexpr = of_keys(y.shape[0], KEYS, y.shape[1])
    LV: gl.constexpr = of_values(y.shape[0], KEYS, y.shape[1])
    BLOCK: gl.constexpr = y.shape[0] * KEYS
    start = ((first + 1) * SPLITS + part) * BLOCK
    # The mask is a step ahead of keys and values, which are one ahead of products.
    next_k, next_mask, next_v = _wanted(masks, start, LK, LV)
    for _ in range(first, end):
        logits = logits_of(q, k, mask, seen, scale)
        k = _read(k_ptr, start, next_k, None, K_ROW, LK)
        p, shrink, top, total = weigh(logits, top, total)
        y = add_values(y, shrink, p, v, q.dtype)
        v = _read(v_ptr, start, next_v, 0, V_ROW, LV)
        mask, seen = next_mask, next_v
        start += SPLITS * BLOCK
        next_k, next_mask, next_v = _wanted(masks, start, LK, LV)
    return y, top, total
