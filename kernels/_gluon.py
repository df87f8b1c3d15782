"""Pieces that the Gluon kernels share. Gluon is Triton with layouts stated: which thread holds which element.

These kernels unpack codes in the registers they were loaded to, where Triton would send them through shared memory.
Triton's interpreter does not run them: they are compiled for every GPU without one, and tested on one.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from qcompile.kernels._tiles import COUNTS, INTERPRET, activate, constexpr_function
from qcompile.kernels._weight import Layout, Weight

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import ampere, hopper
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Triton 3.9 has given these other names.
    begin_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    commit_copies, wait_for_copies = async_copy.commit_group, async_copy.wait_group
    begin_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    begin_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    store_wait = tma.store_wait
except ImportError:  # the modules still import, and `can_read` is false
    gluon = SimpleNamespace(jit=lambda function=None, **_: function or gluon.jit)
    gl = ampere = hopper = async_copy = barrier = begin_copy = commit_copies = wait_for_copies = None
    mbarrier = TensorDescriptor = begin_load = begin_store = store_wait = None

launched = gluon.jit(do_not_specialize_on_alignment=COUNTS)  # in place of gluon.jit, for a kernel that is launched


def can_read(x: Tensor, weight: Weight) -> bool:
    """Do these kernels take contiguous x (M, K) and this weight?"""
    return refuses(x, weight.layout) is None and x.data_ptr() % 16 == 0


def refuses(x: Tensor, layout: Layout) -> str | None:
    """Why these kernels do not take x (…, K) and weights of this layout, or None; x has to be contiguous."""
    if gl is None or INTERPRET:
        return "needs Gluon, which came with Triton 3.5 and has no interpreter"
    if layout.exponent or layout.table or layout.height > 1:
        return "handles integers without tiles"
    if x.element_size() != 2:
        return "handles inputs of 16 bits"
    if x.shape[-1] % 16:
        return f"handles multiples of 16 inputs, not {x.shape[-1]}"
    return None


@gluon.jit
def launch_dependents():
    """Let the kernel behind this one start."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait():
    """Wait until the kernels before this one are done, their results written. What is read before it must be older."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch_bytes(ptr, COUNT: gl.constexpr):
    """Begin to bring so many bytes to the L2 cache, a multiple of 16 from such an address on (Hopper and later)."""
    asm: gl.constexpr = """{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.s32 p, t, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"""
    gl.inline_asm_elementwise(asm, "=r,l,r", [ptr, COUNT], gl.int32, is_pure=False, pack=1)


@gluon.jit
def pick_bytes(a, b, selector):
    """Four bytes of a (0 … 3) and b (4 … 7); a hexadecimal digit of the selector each, the lowest first."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def codes(words, FIELD: gl.constexpr, W: gl.constexpr, IN_PLACE: gl.constexpr = False):
    """Unit FIELD of a chunk in byte form (see _tiles.py); in place, those of a single plane, where they lie in their
    bytes."""
    SECOND: gl.constexpr = W.fields * W.p0 // 8
    THIRD: gl.constexpr = SECOND + W.fields * W.p1 // 8
    found = _field(words, 0, FIELD, W.p0, IN_PLACE)
    if W.p1 > 0:
        found |= _field(words, SECOND, FIELD, W.p1, False) << W.p0
    if W.p2 > 0:
        found |= _field(words, THIRD, FIELD, W.p2, False) << (W.p0 + W.p1)
    return found


@gluon.jit
def _field(words, FIRST: gl.constexpr, FIELD: gl.constexpr, WIDTH: gl.constexpr, IN_PLACE: gl.constexpr):
    PER_CHUNK: gl.constexpr = 8 // WIDTH
    SHIFT: gl.constexpr = FIELD % PER_CHUNK * WIDTH
    MASK: gl.constexpr = _signed(0x01010101 * ((1 << WIDTH) - 1))
    found = words[FIRST + FIELD // PER_CHUNK]
    if IN_PLACE:
        found &= _signed(MASK << SHIFT)
    elif WIDTH < 8:
        found = (found >> SHIFT) & MASK
    return found


@constexpr_function
def _signed(word: int) -> int:
    """As a constant of 32 bits that Triton does not widen."""
    return word - (1 << 32) if word >= 1 << 31 else word


@gluon.jit
def row_of(place, first, N, GATED: gl.constexpr):
    """The weight's row at this place of a program that makes outputs from `first` on, less `first`. Gated, of sixteen
    places eight are rows of the gate, and eight those of its factor, which lie N further on."""
    if GATED:
        return gl.minimum(place // 16 * 8 + place % 8, N - 1 - first) + place // 8 % 2 * N
    else:
        return gl.minimum(place, N - 1 - first)


@gluon.jit
def store_outputs(y, bias_ptr, out_ptr, first_n, first_m, M, N, ACTIVATION: gl.constexpr, GATED: gl.constexpr = False):
    """Write act(y + bias), (outputs, rows of x), to part program_id(1) of out (parts, M, N); gated, act(gate) * factor,
    of rows in the order of `row_of`."""
    MADE: gl.constexpr = y.shape[0] // 2 if GATED else y.shape[0]
    # Neighbouring threads write neighbouring outputs.
    WIDE: gl.constexpr = min(32, MADE // 4)
    L: gl.constexpr = gl.BlockedLayout([4, 1], [WIDE, 32 // WIDE], [1, gl.num_warps()], [0, 1])
    n = first_n + gl.arange(0, MADE, layout=gl.SliceLayout(1, L))
    m = first_m + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, L))
    if GATED:
        PAIRS: gl.constexpr = gl.BlockedLayout([4, 1, 2], [WIDE, 32 // WIDE, 1], [1, gl.num_warps(), 1], [2, 0, 1])
        y = gl.permute(gl.reshape(y, [MADE // 8, 2, 8, y.shape[1]]), (0, 2, 3, 1))
        gate, up = gl.split(gl.convert_layout(gl.reshape(y, [MADE, y.shape[2], 2]), PAIRS))
        gate, up = gl.convert_layout(gate, L, assert_trivial=True), gl.convert_layout(up, L, assert_trivial=True)
        if bias_ptr is not None:
            gate += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)[:, None]
            up += gl.load(bias_ptr + N + n, mask=n < N, other=0).to(gl.float32)[:, None]
        y = activate(gate, ACTIVATION) * up
    else:
        y = gl.convert_layout(y, L)
        if bias_ptr is not None:
            y += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)[:, None]
        y = activate(y, ACTIVATION)
    row = gl.program_id(1).to(gl.int64) * M + m.to(gl.int64)
    y = y.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + row[None, :] * N + n[:, None], y, mask=(m < M)[None, :] & (n < N)[:, None])
