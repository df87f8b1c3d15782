"""Programs in clusters: how they are launched, and what they tell one another through shared memory.

Up to eight programs, neighbours in the first axis of a grid, run at the same time on multiprocessors close to one
another, and can write to each other's shared memory (Hopper and later). Triton knows a cluster as one program whose
tensors it shares out. Here each program is one of its own: the size of the cluster is set at the launch, and what a
program gives to others is in assembly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qcompile.kernels._tiles import INTERPRET, constexpr_function, tl, triton
from qcompile.kernels._tuning import Device

MOST = 8  # programs, for which there is room on every GPU that has clusters


def has_clusters(device: Device) -> bool:
    """Is it a GPU on which kernels with clusters have been timed?"""
    return device.major == 9 and not INTERPRET


@functools.cache
def are_launched(device: torch.device, size: int) -> bool:
    """Does the driver launch clusters of so many programs there? Of a part of a GPU it may not."""
    try:
        launch_clusters(_meeting, size, (1,), torch.empty(1, device=device), num_warps=1)
    except torch.OutOfMemoryError:
        raise  # which says nothing of clusters, and is not kept
    except RuntimeError:
        return False
    return True


def launch_clusters(kernel, size: int, grid: Sequence[int], *args, **constants) -> None:
    """As `_tiles.launch`; the first axis of `grid` counts clusters of `size` programs."""
    with torch.cuda.device(args[0].device):
        compiled = kernel.warmup(*args, grid=tuple(grid), **constants, launch_pdl=constants.get("PDL", False))
        warps, _, shared = compiled.packed_metadata
        compiled.packed_metadata = warps, size, shared
        named = dict(zip(kernel.arg_names, args)) | constants
        compiled[(*grid, 1, 1)[:3]](*(named[name] for name in kernel.arg_names))


@constexpr_function
def _room(count: int) -> str:
    return f".shared .align 16 .b8 given[{4 * count}]; barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, 0;"


@triton.jit
def enter(COUNT: tl.constexpr):
    """Make room for COUNT float32 numbers from programs of the cluster. Of all that is here this is first, then `meet`,
    `give`, `exchange` and `take`; each program does it all once."""
    tl.inline_asm_elementwise(_room(COUNT), "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def meet():
    """Wait until all have entered."""
    tl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def give(value, at, program, inside):
    """Write float32 numbers that are `inside` to places `at` of a program of the cluster."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 here, there;
        setp.ne.s32 p, $4, 0;
        mov.u32 here, given;
        mad.lo.u32 here, $2, 4, here;
        mapa.shared::cluster.u32 there, here, $3;
        @p st.shared::cluster.f32 [there], $1;
        mov.b32 $0, 0;
        }""",
        "=r,f,r,r,r", [value, at, program, inside.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def exchange():
    """Wait until all have given what they have."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;",
        "=r", [], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def take(at):
    """The numbers at places `at` of what this program has been given."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 here; mov.u32 here, given; mad.lo.u32 here, $1, 4, here; ld.shared.f32 $0, [here]; }",
        "=f,r", [at], tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _meeting(x_ptr):
    enter(1)
    meet()
