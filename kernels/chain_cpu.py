"""chain of a few rows on the CPU: one call of C++, in which threads fork and join once (cpu/chain_op.cpp)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qcompile import _torch
from qcompile.kernels import attention_cpu, fused_linear_cpu, linear_cpu
from qcompile.kernels._follower_cpu import Follower
from qcompile.kernels._packed_cpu import FLOATS
from qcompile.ops.chain import Result, Step, chain, run
from qcompile.ops.registry import OPS, binder, declare, opaque
from qcompile.ops.rope import rope_into_cache

MOST_DIMS = 8  # in chain_text.h, too

# Where a step may read what others make: by arguments of which there is no tensor.
_TAKES_RESULTS = {"fused_linear": (0, 8), "rope_into_cache": (0, 1, 2, 3, 4), "attention": (0, 1, 2, 3)}


class _Refused(Exception):
    """Why a step cannot run."""


def refuses(tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str) -> str | None:
    """Why this kernel cannot run the steps, or None."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"needs cpu, got {', '.join(sorted({tensor.device.type for tensor in tensors}))}"
    if any(tensor.dim() > MOST_DIMS for tensor in tensors):
        return f"handles tensors of up to {MOST_DIMS} dimensions"
    for step in map(Step.parse, steps.split("\n")):
        for index, argument in enumerate(step.arguments):
            if isinstance(argument, Result) and index not in _TAKES_RESULTS.get(step.op, ()):
                return f"argument {index} of {step.op} is what another step makes"

    def call(op: str, arguments: list[Any]) -> Tensor:
        if reason := _REFUSES[op](*arguments) if op in _REFUSES else f"has no step {op}":
            raise _Refused(reason)
        return _torch.call_on_fakes(OPS[op].fake, *arguments)

    try:
        run(tensors, caches, steps, call)
    except _Refused as refused:
        return str(refused)
    return None if linear_cpu.without_python() else "the C++ that torch calls does not compile here"


def _refuses_rope(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, key_scales: Tensor | None = None, *rest: Any,
) -> str | None:  # fmt: skip
    numbers = (query, key, value, *((keys, values) if key_scales is None else ()))
    if any(tensor.dtype != query.dtype or tensor.dtype not in FLOATS for tensor in numbers):
        return f"handles queries, keys and values of one of float32, bfloat16 and float16, not {query.dtype}"
    if query.shape[2] > attention_cpu.MAX_LENGTH:
        return f"handles up to {attention_cpu.MAX_LENGTH} query rows, not {query.shape[2]}"
    return None


def _refuses_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any) -> str | None:
    if mask is not None and mask.dim() != 4:
        return f"handles masks of 4 dimensions, not {mask.dim()}"
    return attention_cpu.refuses(query, key, value, mask, *rest)


_REFUSES: dict[str, Callable[..., str | None]] = {
    "fused_linear": fused_linear_cpu.refuses,
    "rope_into_cache": _refuses_rope,
    "attention": _refuses_attention,
}
_CALLS: dict[str, Callable[..., Tensor]] = {
    "fused_linear": fused_linear_cpu.fused_packed,
    "rope_into_cache": rope_into_cache.meaning,
    "attention": attention_cpu.attention_cpu,
}


@opaque(chain.fake, writes=("caches",))
def chain_anyhow(tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str) -> Tensor:
    return run(tensors, caches, steps, lambda op, arguments: _CALLS[op](*arguments))


@opaque(chain.fake, writes=("caches",))
def chain_packed(tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str) -> Tensor:
    # chain_op.cpp takes this one's place, and gives back what is not for it.
    return chain_anyhow(tensors, caches, steps)


_bind = declare("bind_chain(Tensor[] given, int[] moving, Tensor(a!)[] caches, str steps) -> int")
_bound = declare("bound_chain(int bound, Tensor[] moving) -> Tensor")


class BoundChain:
    """chain_packed of tensors that C++ has been given once, but for those that are None: a call brings these.

    To hand over some hundred tensors, and to look at each of them, takes longer than a layer does. Memory that one of
    them has now is read from now on, and kept, even if the tensor is given other memory. Not for two threads at once.

    What stays is looked at at its first call alone: nobody may resize its storage afterwards. generate() binds a chain
    anew for each text.
    """

    def __init__(self, op: ctypes.CDLL, tensors: Sequence[Tensor | None], caches: Sequence[Tensor], steps: str):
        given = [tensor.detach() for tensor in tensors if tensor is not None]
        moving = [index for index, tensor in enumerate(tensors) if tensor is None]
        self.op, self.bound = op, _bind(given, moving, [cache.detach() for cache in caches], steps)
        self.followers: list[Follower] = []
        weakref.finalize(self, op.release_chain, self.bound)

    def __call__(self, *moving: Tensor) -> Tensor:
        return _bound(self.bound, moving)

    def let_follow(self, follower: object) -> bool:
        """Whether each call does this from now on, too, on its result."""
        if not isinstance(follower, Follower):
            return False
        self.op.let_follow(self.bound, follower.bound)
        self.followers.append(follower)
        return True


@binder(chain_packed, pays=True)
def bind_chain(tensors: Sequence[Tensor | None], caches: Sequence[Tensor], steps: str) -> BoundChain | None:
    op = linear_cpu.without_python()
    return None if op is None else BoundChain(op, tensors, caches, steps)


@chain.implementation("cpu", refuses, device="cpu")
def chain_cpu(tensors: Sequence[Tensor], caches: Sequence[Tensor], steps: str) -> Tensor:
    return chain_packed(tensors, caches, steps)
