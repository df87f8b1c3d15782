"""Attention of few query rows on the CPU, as in decoding, in C++ of our own (kernels/cpu/attention.h).

Keys and values, numbers or codes, are read once for all heads that share them, and only where the mask lets anyone
attend: of a static cache, what is filled.
"""

from __future__ import annotations

import ctypes
import functools

from torch import Tensor

from qcompile.kernels._cpp import load_cpp, text_of
from qcompile.kernels._packed_cpu import FLOATS
from qcompile.ops.attention import attention
from qcompile.ops.registry import known, opaque
from qcompile.ops.row_codes import CODES

SOURCES = (
    "op.h",
    "vectors.h",
    "team.h",
    "cache_rows.h",
    "attention.h",
    "panels.h",
    "attention_prompt.h",
    "attention_op.cpp",
)
MAX_LENGTH = 8
CODED = {*CODES.values()}


def refuses(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run the call, or None."""
    if (length := known(query.shape[2])) is None or length > MAX_LENGTH:
        return f"handles up to {MAX_LENGTH} query rows, not {query.shape[2]}"
    if is_causal:
        return "handles a mask, not is_causal"
    return refuses_tensors(query, key, value, mask, key_scale, value_scale)


def refuses_tensors(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_scale: Tensor | None, value_scale: Tensor | None
) -> str | None:
    """Why our C++ cannot read these, or None."""
    if query.device.type != "cpu":
        return f"needs cpu, got {query.device.type}"
    cached = {key.dtype, value.dtype}
    if query.dtype not in FLOATS or not (cached == {query.dtype} if key_scale is None else cached < CODED):
        return f"handles float32, bfloat16, float16 and codes, not {query.dtype}, {key.dtype} and {value.dtype}"
    width, value_width = known(query.shape[3]), known(value.shape[3])
    if width is None or value_width is None or width % 16 or value_width % 16:
        return f"handles heads of multiples of 16 columns, not {query.shape[3]} and {value.shape[3]}"
    if any(known(tensor.stride(3)) != 1 for tensor in (query, key, value)):
        return "the columns of query, key or value are not neighbours"
    if any(scale is not None and known(scale.stride(2)) != 1 for scale in (key_scale, value_scale)):
        return "the scales of a head are not neighbours"
    if mask is not None and known(mask.shape[-1]) != 1 and known(mask.stride(-1)) not in (0, 1):
        return "the columns of the mask are not neighbours"
    return missing()


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions. RuntimeError where they do not compile; seconds where that was never done."""
    return load_cpp(text_of(*SOURCES))


@functools.cache
def missing() -> str | None:
    """Why the library cannot be had, or None."""
    try:
        library()
    except RuntimeError as error:
        return f"C++ does not compile here: {error}"
    return None


@opaque(lambda query, key, value, *others: query.new_empty((*query.shape[:3], value.shape[3])))
def attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None,
    key_scale: Tensor | None, value_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    missing()  # after this call attention_op.cpp takes this one's place
    return attention.meaning(query, key, value, mask, False, scale, softcap, key_scale, value_scale)


@attention.implementation("cpu_decode", refuses)
def attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    return attend_cpu(query, key, value, mask, scale, softcap, key_scale, value_scale)
