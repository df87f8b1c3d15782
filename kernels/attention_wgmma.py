"""Attention of long prompts on Hopper: as `_prompt` of attention_prompt, with one warp that fetches for eight others.

A program makes 128 query rows of a head, 64 for each of two groups of four warps. One warp has the copy engine bring
blocks of keys and values a few steps ahead. A group begins the next block's products of queries and keys, and the
products of its weights and values, before it weighs the next block: tensor cores work while it takes exponents.
(Shah et al. 2024, FlashAttention-3.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._attention import is_attended
from qcompile.kernels._gluon import (
    TensorDescriptor,
    barrier,
    begin_load,
    gl,
    gluon,
    hopper,
    launch_dependents,
    launched,
    mbarrier,
    wait,
)
from qcompile.kernels._tiles import INTERPRET, cdiv, constexpr, dependent_launch, launch, power_of_two

ROWS, KEYS, STAGES = 128, 128, 2
# Registers of a thread: when the kernel starts, and later those of a group that multiplies and of the warp that copies.
REGISTERS, MULTIPLYING, COPYING = 168, constexpr(240), constexpr(24)
LOG2_E = constexpr(1.4426950408889634)


def refuses(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """Why this kernel does not take the call, or None."""
    if gl is None or INTERPRET:
        return "needs Gluon, which came with Triton 3.5 and has no interpreter"
    device = _tuning.Device.of(query.device)
    if device.major != 9:
        return "needs a GPU of compute capability 9.0"
    if softcap is not None:
        return "takes no soft-cap"
    width = query.shape[3]
    if query.element_size() != 2 or width not in (64, 128) or value.shape[3] != width:
        return f"takes heads of 64 or 128 columns of 16 bits, not {width} and {value.shape[3]} of {query.dtype}"
    if query.shape[0] * query.shape[1] * cdiv(query.shape[2], ROWS) < device.processors:
        return "has too few rows for all multiprocessors"
    return next((reason for x in (key, value) if (reason := _refuses_rows(x))), None)


def _refuses_rows(x: Tensor) -> str | None:
    """The copy engine takes rows of a matrix: those of all heads have to be in one."""
    (keys, width), row = x.shape[2:], x.stride(2)
    if x.stride(3) != 1 or row < width or row % 8 or x.data_ptr() % 16:
        return "takes keys and values whose rows begin at multiples of 16 bytes"
    apart = _apart(x)
    columns = [column for _, column in apart]
    if all(columns) or any(column % 8 for column in columns) or _extent(x)[1] > row:
        return "takes keys and values of heads that are rows, or columns, of one matrix"
    # Behind the last key it reads what may be no numbers, unless those are keys as well.
    reached = keys
    for rows, size in sorted((rows, size) for (rows, _), size in zip(apart, x.shape[:2])):
        if keys % KEYS and rows > reached:
            return f"takes stretches of a cache of multiples of {KEYS} keys"
        reached += (size - 1) * rows
    return None


def _apart(x: Tensor) -> list[tuple[int, int]]:
    """By how many rows and columns of the matrix batches lie apart, and heads."""
    row = x.stride(2)
    return [divmod(stride if size > 1 else 0, row) for size, stride in zip(x.shape[:2], x.stride()[:2])]


def _extent(x: Tensor) -> list[int]:
    """How many rows and columns the matrix has in which the rows of x lie."""
    steps = zip(*_apart(x))
    return [own + sum((n - 1) * step for n, step in zip(x.shape, each)) for own, each in zip(x.shape[2:], steps)]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, survey: Tensor, scale: float, out: Tensor) -> None:
    """Write to `out`, (batch, length, heads, columns) in memory, what `refuses` lets through; `mask` is expanded, and
    `survey` of its blocks of ROWS by KEYS."""
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1:3]
    launch(
        _attend,
        (batch * heads, cdiv(length, ROWS)),
        query,
        _described(key),
        _described(value),
        mask,
        survey,
        out,
        heads,
        heads // kv_heads,
        length,
        keys,
        scale,
        *query.stride()[:3],
        *(part for apart in (*_apart(key), *_apart(value)) for part in apart),
        *mask.stride(),
        *(stride if size > 1 else 0 for stride, size in zip(survey.stride()[:2], survey.shape[:2])),
        D=width,
        BLOCKS=power_of_two(cdiv(keys, KEYS)),
        ROWS=ROWS,
        KEYS=KEYS,
        STAGES=STAGES,
        PDL=dependent_launch(query),
        num_warps=4,
        maxnreg=REGISTERS,
    )


def _described(x: Tensor) -> Any:
    """The matrix in which the rows of x lie, of which the copy engine takes KEYS at a time."""
    return TensorDescriptor(x, _extent(x), [x.stride(2), 1], [KEYS, x.shape[3]], gl.NVMMASharedLayout(128, 16, 2))


@launched
def _attend(
    q_ptr, k, v, mask_ptr, survey_ptr, out_ptr, heads, group, length, keys, scale, q_batch, q_head, q_row,
    k_batch, k_batch_column, k_head, k_head_column, v_batch, v_batch_column, v_head, v_head_column,
    mask_batch, mask_head, mask_row, mask_column, survey_batch, survey_head,
    D: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = ROWS // 2
    qs = gl.allocate_shared_memory(k.dtype, [2, HALF, D], k.layout)
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, D], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [STAGES, KEYS, D], v.layout)
    # For keys and for values: filled by the copy engine, and free when both groups have multiplied.
    ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    hopper.fence_async_shared()
    if PDL:
        wait()
    pair = gl.program_id(0)
    batch, head = pair // heads, pair % heads
    # Under a causal mask the last rows have the most to do: they begin first.
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    order = _order(survey_ptr, batch * survey_batch + head * survey_head, block, keys, KEYS, BLOCKS)
    kv_head = head // group
    k_at = batch * k_batch + kv_head * k_head, batch * k_batch_column + kv_head * k_head_column
    v_at = batch * v_batch + kv_head * v_head, batch * v_batch_column + kv_head * v_head_column
    q_ptr += batch.to(gl.int64) * q_batch + head.to(gl.int64) * q_head
    mask_ptr += batch.to(gl.int64) * mask_batch + head.to(gl.int64) * mask_head
    out_ptr += (batch.to(gl.int64) * length * heads + head) * D
    shared = qs, ks, vs, ready, free
    tensors = q_ptr, mask_ptr, out_ptr
    strides = q_row, mask_row, mask_column, heads * D
    size = length, keys, scale
    gl.warp_specialize(
        [
            (_multiply, (shared, tensors, strides, size, order, block * ROWS, 0, STAGES)),
            (_multiply, (shared, tensors, strides, size, order, block * ROWS + HALF, 1, STAGES)),
            (_copy, (shared, k, v, k_at, v_at, order, STAGES)),
        ],
        [4, 1],
        [MULTIPLYING, COPYING],
    )
    if PDL:
        launch_dependents()  # not earlier: waiting programs would take room from those that multiply


@gluon.jit
def _order(survey_ptr, start, block, keys, KEYS: gl.constexpr, BLOCKS: gl.constexpr):
    """The first block of keys that counts, how many do, the first of the whole ones and how many those are. One counts
    at least."""
    blocks = gl.cdiv(keys, KEYS)
    i = gl.arange(0, BLOCKS, layout=gl.BlockedLayout([max(1, BLOCKS // 128)], [32], [4], [0]))
    seen = gl.load(survey_ptr + start + block * blocks + i, mask=i < blocks, other=0)
    first = gl.min(gl.where(seen > 0, i, blocks - 1), 0)
    end = gl.max(gl.where(seen > 0, i + 1, 0), 0)
    whole = gl.min(gl.where(seen == 2, i, end), 0)
    behind = gl.min(gl.where((seen != 2) & (i > whole), i, end), 0)
    return first, gl.maximum(end - first, 1), whole, gl.maximum(behind - whole, 0)


@gluon.jit
def _block(step, order):
    """Which block of keys comes as the step-th: the whole ones, and then the others."""
    first, count, whole, wholes = order
    other = first + step - wholes
    return gl.where(step < wholes, whole + step, gl.where(other < whole, other, other + wholes))


@gluon.jit
def _copy(shared, k, v, k_at, v_at, order, STAGES: gl.constexpr):
    qs, ks, vs, ready, free = shared
    BYTES: gl.constexpr = ks.type.shape[1] * ks.type.shape[2] * 2
    for step in range(order[1]):
        slot, phase = step % STAGES, step // STAGES % 2 ^ 1
        row = _block(step, order) * ks.type.shape[1]
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(ready.index(slot), BYTES)
        begin_load(k, [k_at[0] + row, k_at[1]], ready.index(slot), ks.index(slot))
        mbarrier.wait(free.index(STAGES + slot), phase)
        mbarrier.expect(ready.index(STAGES + slot), BYTES)
        begin_load(v, [v_at[0] + row, v_at[1]], ready.index(STAGES + slot), vs.index(slot))


@gluon.jit
def _multiply(shared, tensors, strides, size, order, first_m, PART: gl.constexpr, STAGES: gl.constexpr):
    """The attention of half of the rows."""
    qs, ks, vs, ready, free = shared
    q_ptr, mask_ptr, out_ptr = tensors
    q_row, mask_row, mask_column, out_row = strides
    masks = mask_ptr, mask_row, mask_column
    length, keys, scale = size
    HALF: gl.constexpr = qs.type.shape[1]
    D: gl.constexpr = qs.type.shape[2]
    KEYS: gl.constexpr = ks.type.shape[1]
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    LY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q = qs.index(PART)
    _load_rows(q, q_ptr, first_m, length, q_row)
    top = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, LS))
    total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, LS))
    y = gl.zeros([HALF, D], gl.float32, LY)
    none = gl.zeros([HALF, KEYS], gl.float32, LS)
    mbarrier.wait(ready.index(0), 0)
    logits = hopper.warpgroup_mma(q, ks.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    logits = hopper.warpgroup_mma_wait(0, deps=(logits,))
    barrier()
    mbarrier.arrive(free.index(0), count=1)
    p, shrink, top, total = _weigh(logits, top, total, masks, 0, order, first_m, size, ks.dtype, LY)
    for step in range(order[1] - 1):
        slot, next, phase = step % STAGES, (step + 1) % STAGES, (step + 1) // STAGES % 2
        mbarrier.wait(ready.index(next), phase)
        logits = hopper.warpgroup_mma(q, ks.index(next).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(STAGES + slot), step // STAGES % 2)
        y = hopper.warpgroup_mma(p, vs.index(slot), y, is_async=True)
        logits = hopper.warpgroup_mma_wait(1, deps=(logits,))
        later, shrink, top, total = _weigh(logits, top, total, masks, step + 1, order, first_m, size, ks.dtype, LY)
        y = hopper.warpgroup_mma_wait(0, deps=(y,))
        barrier()  # all four warps have multiplied
        mbarrier.arrive(free.index(next), count=1)
        mbarrier.arrive(free.index(STAGES + slot), count=1)
        y *= gl.convert_layout(shrink, gl.SliceLayout(1, LY))[:, None]
        p = later
    last = order[1] - 1
    mbarrier.wait(ready.index(STAGES + last % STAGES), last // STAGES % 2)
    y = hopper.warpgroup_mma(p, vs.index(last % STAGES), y, is_async=True)
    y = hopper.warpgroup_mma_wait(0, deps=(y,))
    total = gl.convert_layout(total, gl.SliceLayout(1, LY))
    y /= gl.where(total == 0.0, 1.0, total)[:, None]  # rows that attend to nothing are zeros
    m = first_m + gl.arange(0, HALF, layout=gl.SliceLayout(1, LY))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LY))
    at = out_ptr + m.to(gl.int64)[:, None] * out_row + d[None, :]
    gl.store(at, y.to(out_ptr.dtype.element_ty), mask=(m < length)[:, None])


@gluon.jit
def _load_rows(q, q_ptr, first_m, length, q_row):
    """Queries as an operand in shared memory."""
    D: gl.constexpr = q.type.shape[1]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    m = first_m + gl.arange(0, q.type.shape[0], layout=gl.SliceLayout(1, L))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    q.store(gl.load(q_ptr + m.to(gl.int64)[:, None] * q_row + d[None, :], mask=(m < length)[:, None], other=0.0))
    hopper.fence_async_shared()
    barrier()


@gluon.jit
def _weigh(logits, top, total, masks, step, order, first_m, size, DTYPE: gl.constexpr, LY: gl.constexpr):
    """Weights of a block's keys as an operand, by what to shrink what was summed before, the new top and total."""
    _length, _keys, scale = size
    # Powers of two are what the hardware has.
    if step < order[3]:
        new_top = gl.maximum(top, gl.max(logits, 1) * scale)
        base = new_top
        p = gl.exp2(logits * (scale * LOG2_E) - (base * LOG2_E)[:, None])
    else:
        logits = _masked(logits, masks, _block(step, order), first_m, size)
        new_top = gl.maximum(top, gl.max(logits, 1))
        # While nothing is attended the top is -inf, and -inf less -inf is no number.
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        # The difference first: a mask may be the lowest number there is.
        p = gl.exp2((logits - base[:, None]) * LOG2_E)
    shrink = gl.exp2((top - base) * LOG2_E)
    # Of weights before they are rounded: to read them back costs more than exponents do.
    total = total * shrink + gl.sum(p, 1)
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, LY, 2), assert_trivial=True), shrink, new_top, total


@gluon.jit
def _masked(logits, masks, block, first_m, size):
    """Logits of a block that is not whole: times scale, with the mask added, or -inf where it hides the key."""
    mask_ptr, mask_row, mask_column = masks
    length, keys, scale = size
    L: gl.constexpr = logits.type.layout
    m = first_m + gl.arange(0, logits.shape[0], layout=gl.SliceLayout(1, L))
    n = block * logits.shape[1] + gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, L))
    inside = (m < length)[:, None] & (n < keys)[None, :]
    at = m.to(gl.int64)[:, None] * mask_row + n.to(gl.int64)[None, :] * mask_column
    mask = gl.load(mask_ptr + at, mask=inside, other=0)
    logits *= scale
    if mask.dtype != gl.int1:
        logits += mask.to(gl.float32)
    return gl.where(inside & is_attended(mask), logits, float("-inf"))
