"""What warps of attention make of keys of their own, copied to rings in shared memory; see _attention_operands.

A ring has room for AHEAD steps; what masks are, and which keys a step has, is said in _attention_keys.
"""

from __future__ import annotations

from qcompile.kernels._attention_keys import key_of, mask_of, own_steps, places
from qcompile.kernels._attention_operands import add_values, logits_of, of_keys, of_values, weigh
from qcompile.kernels._gluon import begin_copy, commit_copies, gl, gluon, wait_for_copies
from qcompile.kernels._operand import bases
from qcompile.kernels._tiles import constexpr_function


@constexpr_function
def _of_copies(warps, keys, columns):
    """(warps, keys of a warp, pairs of columns), of which neighbouring lanes copy 16 bytes each."""
    registers = [*bases(4, 1, 3, 2), *bases(keys, 2, 3, 1)]
    lanes = [*bases(columns // 2, 4, 3, 2), [0, 1, 0]]
    return gl.DistributedLinearLayout(registers, lanes, bases(warps, 1, 3, 0), [], [warps, keys, columns // 2])


@gluon.jit
def rings(D: gl.constexpr, KEYS: gl.constexpr, AHEAD: gl.constexpr):
    """Room for keys and for values: (steps, warps, keys of a warp, pairs of columns)"""
    L: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])
    of_k = gl.allocate_shared_memory(gl.int32, [AHEAD, gl.num_warps(), KEYS, D // 2], L)
    return of_k, gl.allocate_shared_memory(gl.int32, [AHEAD, gl.num_warps(), KEYS, D // 2], L)


@gluon.jit
def _wanted(masks, start, room, SPLITS: gl.constexpr, IN_ONE: gl.constexpr):
    """Which rows of the step that begins with this key are to be copied."""
    L: gl.constexpr = _of_copies(room.shape[1], room.shape[2], 2 * room.shape[3])
    return mask_of(masks, start + places(L, SPLITS, IN_ONE), "")[1]


@gluon.jit
def _copy(ptr, start, wanted, to, ROW: gl.constexpr, SPLITS: gl.constexpr, IN_ONE: gl.constexpr):
    """Begin to copy those rows of a step that are wanted, and zeros for others."""
    L: gl.constexpr = _of_copies(to.shape[0], to.shape[1], 2 * to.shape[2])
    pair = gl.arange(0, L.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    at = gl.expand_dims(places(L, SPLITS, IN_ONE) * (ROW // 2), 2) + pair
    ptr = ptr.to(gl.pointer_type(gl.int32), bitcast=True) + start.to(gl.int64) * (ROW // 2)
    wanted, at = gl.broadcast(gl.expand_dims(wanted, 2), at)
    begin_copy(to, ptr + at, mask=wanted)


@gluon.jit
def _begin(
    k_ptr, v_ptr, masks, start, room, K_ROW: gl.constexpr, V_ROW: gl.constexpr, SPLITS: gl.constexpr,
    IN_ONE: gl.constexpr,
):  # fmt: skip
    """Begin to copy as many steps as there is room for, from the one on that begins with this key."""
    of_k, of_v = room
    AHEAD: gl.constexpr = of_k.shape[0]
    STEP: gl.constexpr = SPLITS * of_k.shape[1] * of_k.shape[2]
    for i in gl.static_range(AHEAD):
        wanted = _wanted(masks, start + i * STEP, of_k, SPLITS, IN_ONE)
        _copy(k_ptr, start + i * STEP, wanted, of_k.index(i), K_ROW, SPLITS, IN_ONE)
        commit_copies()
        _copy(v_ptr, start + i * STEP, wanted, of_v.index(i), V_ROW, SPLITS, IN_ONE)
        commit_copies()


@gluon.jit
def begin_steps(
    k_ptr, v_ptr, masks, part, room, K_ROW: gl.constexpr, V_ROW: gl.constexpr, SPLITS: gl.constexpr,
    IN_ONE: gl.constexpr,
):  # fmt: skip
    """Begin to copy the first steps in which anyone attends. Returns the first one, and the one behind the last."""
    WARPS: gl.constexpr = room[0].shape[1]
    KEYS: gl.constexpr = room[0].shape[2]
    BLOCK: gl.constexpr = WARPS * KEYS
    start = key_of(0, part, KEYS, SPLITS, IN_ONE)
    _begin(k_ptr, v_ptr, masks, start, room, K_ROW, V_ROW, SPLITS, IN_ONE)
    first, end = 0, gl.cdiv(masks[2], SPLITS * BLOCK)
    if masks[0] is not None and not IN_ONE:
        # The search ends while keys are on their way; most masks begin in the first step.
        lowest, highest = own_steps(masks, part, end, KEYS, SPLITS, IN_ONE)
        first, end = gl.min(lowest, 0), gl.max(highest, 0)
        if first > 0:
            wait_for_copies(0)
            start += first * (SPLITS * BLOCK)
            _begin(k_ptr, v_ptr, masks, start, room, K_ROW, V_ROW, SPLITS, IN_ONE)
    return first, end


@gluon.jit
def walk(
    q, sums, steps, k_ptr, v_ptr, masks, part, room, scale, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    SPLITS: gl.constexpr, IN_ONE: gl.constexpr,
):  # fmt: skip
    """Add to each warp's sums, (warps, columns, eight rows), tops and totals what it finds in these steps."""
    of_k, of_v = room
    y, top, total = sums
    AHEAD: gl.constexpr = of_k.shape[0]
    WARPS: gl.constexpr = of_k.shape[1]
    KEYS: gl.constexpr = of_k.shape[2]
    STEP: gl.constexpr = SPLITS * WARPS * KEYS
    LK: gl.constexpr = of_keys(WARPS, KEYS, 2 * of_k.shape[3])
    LV: gl.constexpr = of_values(WARPS, KEYS, 2 * of_k.shape[3])
    first, end = steps
    start = key_of(0, part, KEYS, SPLITS, IN_ONE) + first * STEP
    mask, seen = mask_of(masks, start + places(LV, SPLITS, IN_ONE), "")
    if IN_ONE:
        wait_for_copies(1)
        p, shrink, top, total = weigh(logits_of(q, of_k.index(0).load(LK), mask, seen, scale), top, total)
        wait_for_copies(0)
        y = add_values(y, shrink, p, of_v.index(0).load(LV), q.dtype)
    else:
        slot, later = first * 0, start + AHEAD * STEP
        wanted = _wanted(masks, later, of_k, SPLITS, IN_ONE)
        for step in range(first, end):
            wait_for_copies(2 * AHEAD - 1)
            logits = logits_of(q, of_k.index(slot).load(LK), mask, seen, scale)
            if step + AHEAD < end:
                _copy(k_ptr, later, wanted, of_k.index(slot), K_ROW, SPLITS, IN_ONE)
            commit_copies()  # of nothing, too: they are counted
            p, shrink, top, total = weigh(logits, top, total)
            wait_for_copies(2 * AHEAD - 1)
            y = add_values(y, shrink, p, of_v.index(slot).load(LV), q.dtype)
            if step + AHEAD < end:
                _copy(v_ptr, later, wanted, of_v.index(slot), V_ROW, SPLITS, IN_ONE)
            commit_copies()
            start, later = start + STEP, later + STEP
            mask, seen = mask_of(masks, start + places(LV, SPLITS, IN_ONE), "")
            wanted = _wanted(masks, later, of_k, SPLITS, IN_ONE)
            slot = gl.where(slot == AHEAD - 1, 0, slot + 1)
        wait_for_copies(0)
    return y, top, total
