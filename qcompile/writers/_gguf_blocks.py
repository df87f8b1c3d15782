"""GGUF's types of blocks, written: the inverse of formats/_gguf_blocks.py, which says where the layouts are from.

A weight that a type was made for goes back into it, bit for bit. Other integers go into the smallest type of simple
blocks that holds them: Q4_0, Q5_0 and Q8_0, code - middle, and Q4_1 and Q5_1, which add a minimum. A minimum is fp16,
and zero * scale seldom is; then code - zero takes one bit more without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qcompile.quant.packing import unpack
from qcompile.quant.spec import Zero
from qcompile.quant.tensor import QTensor
from qcompile.writers._bits import neighbours
from qcompile.writers._integers import (
    Unwritable,
    by_inputs,
    exactly,
    in_order,
    integers,
    plain,
    powers_of_two,
    shared_by,
)
from qcompile.writers.contents import Weight


@dataclass(frozen=True)
class Blocks:
    """The type of a weight's blocks, what makes their bytes, uint8 (rows, bytes), and the factor of an NVFP4 weight."""

    kind: str
    make: Callable[[], Tensor]
    factor: Tensor | None = None


def blocks(weight: Weight) -> Blocks:
    """How a weight is written. Raises Unwritable."""
    in_order(weight)
    tensor, spec = weight.tensor, str(weight.spec)
    if spec in _TYPES:
        kind, elements, pack = _TYPES[spec]
        sides = _halves_of(tensor)
        if sides is not None and tensor.columns % elements == 0:
            return Blocks(kind, partial(_packed, tensor, elements, pack, sides))
    if spec.startswith("fp4_e2m1/"):
        return _fp4(tensor)
    return _simple(weight)


def _simple(weight: Weight) -> Blocks:
    tensor, half = weight.tensor, torch.float16
    if tensor.columns % 32:
        raise Unwritable(f"{tensor.columns} inputs; a block holds 32")
    if tensor.zero is not None and weight.spec.zero is Zero.SHIFT:
        (scale, size), (shift, _) = by_inputs(tensor, tensor.scale), by_inputs(tensor, tensor.zero)
        bits = next((bits for bits in (4, 5) if bits >= weight.spec.element.bits), None)
        if bits is None or size % 32:
            raise Unwritable(f"{weight.spec.element} codes with minimums by {size} inputs; it has 4 and 5 bits by 32")
        d, m = (_repeated(exactly(side, half, what), size) for side, what in ((scale, "scales"), (shift, "minimums")))
        return Blocks(f"Q{bits}_1", lambda: _with_minimum(_cut(tensor, 32), d, m, bits))
    one = integers(weight, (1, 2, 3, 4, 5, 6, 7, 8))
    if one.size % 32:
        raise Unwritable(f"groups of {one.size} inputs; a block holds 32")
    scale = _repeated(exactly(one.scale, half), one.size)

    def cut(codes: Tensor) -> Tensor:
        return codes.unflatten(1, (-1, 32))

    def symmetric(bits: int, offset: Tensor | int) -> Blocks:
        # The code of zero is 8, 16 or 128 there.
        middle = 2 ** (bits - 1)
        return Blocks(f"Q{bits}_0", lambda: _without_minimum(cut(one.codes()) - offset + middle, scale, bits))

    if one.zero is None:
        return symmetric(next(bits for bits in (4, 5, 8) if bits >= one.bits), 2 ** (one.bits - 1))
    zero = _repeated(one.zero, one.size)
    minimum = -zero.float() * scale.float()
    if one.bits <= 5 and torch.equal(minimum.half().float(), minimum):
        bits = 4 if one.bits <= 4 else 5
        return Blocks(f"Q{bits}_1", lambda: _with_minimum(cut(one.codes()), scale, minimum.half(), bits))
    least, most = -int(zero.max()), 2**weight.spec.element.bits - 1 - int(zero.min())
    bits = next((bits for bits in (4, 5, 8) if -(2 ** (bits - 1)) <= least and most < 2 ** (bits - 1)), None)
    if bits is None:
        raise Unwritable(f"codes from {least} to {most} about their zero points; it holds 8 bits")
    return symmetric(bits, zero[..., None])


def _fp4(tensor: QTensor) -> Blocks:
    codes = partial(_cut, tensor)
    if shared_by(tensor) == 32 and (powers := powers_of_two(tensor.scale)) is not None:
        return Blocks("MXFP4", lambda: _rows([powers[..., None], _planes(codes(32), 4)]))
    if shared_by(tensor) == 16 and tensor.columns % 64 == 0:
        scale, factor = tensor.scale, None
        if isinstance(scale, QTensor) and str(scale.spec) == "fp8_e4m3/tensor/sym":
            factor = exactly(plain(scale.scale), torch.float32, "factors").reshape(1)
            scale = unpack(scale.data, 8, scale.columns).contiguous().view(torch.float8_e4m3fn)
        if isinstance(scale, Tensor) and scale.dtype == torch.float8_e4m3fn:
            scales = scale.view(torch.uint8).unflatten(1, (-1, 4))
            return Blocks("NVFP4", lambda: _rows([scales, _halves(codes(64), 8, 4)]), factor)
    raise Unwritable("fp4 comes in groups of 32 with powers of two, or of 16 with fp8 scales")


# Codes are uint8 (rows, blocks, elements), scales fp16 (rows, blocks), codes of scales (rows, blocks, groups).


def _packed(tensor: QTensor, elements: int, pack: Callable[..., Tensor], sides: Sequence[Tensor]) -> Tensor:
    return pack(_cut(tensor, elements), *sides)


def _cut(tensor: QTensor, elements: int) -> Tensor:
    return unpack(tensor.data, tensor.spec.element.bits, tensor.columns).unflatten(1, (-1, elements))


def _repeated(side: Tensor, size: int) -> Tensor:
    return side.repeat_interleave(size // 32, 1).contiguous()


def _rows(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces of each block one after the other: fp16 numbers and bytes."""
    return torch.cat([_bytes(piece) for piece in pieces], dim=-1).flatten(1)


def _bytes(piece: Tensor) -> Tensor:
    return piece[..., None].contiguous().view(torch.uint8) if piece.dtype == torch.float16 else piece


def _planes(codes: Tensor, bits: int) -> Tensor:
    """All lowest fields of the bytes, then all next ones: (…, n) → (…, n * bits/8)."""
    parts = codes.chunk(8 // bits, -1)
    found = parts[0]
    for place, part in enumerate(parts[1:], start=1):
        found = found | part << bits * place
    return found


def _halves(codes: Tensor, width: int, bits: int) -> Tensor:
    """`_planes` for each run of `width` bytes."""
    return _planes(codes.unflatten(-1, (-1, width * 8 // bits)), bits).flatten(-2)


def _without_minimum(codes: Tensor, d: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return _rows([d, codes ^ 128])
    return _rows([d, *([neighbours(codes >> 4, 1)] if bits == 5 else []), _planes(codes & 15, 4)])


def _with_minimum(codes: Tensor, d: Tensor, m: Tensor, bits: int) -> Tensor:
    return _rows([d, m, *([neighbours(codes >> 4, 1)] if bits == 5 else []), _planes(codes & 15, 4)])


def _halves_of(tensor: QTensor) -> list[Tensor] | None:
    """Of scales and minimums the fp16 number of a block, then their codes if they have some; None where those numbers
    are no fp16."""
    found: list[Tensor] = []
    for side in (tensor.scale, tensor.zero):
        if side is None:
            continue
        inner = side.scale if isinstance(side, QTensor) else side
        if not isinstance(inner, Tensor) or not torch.equal(inner.half().double(), inner.double()):
            return None
        found.append(inner.half())
        if isinstance(side, QTensor):
            found.append(_cut(side, side.columns // inner.shape[1]))
    return found


def _twelve(sc: Tensor, mn: Tensor) -> Tensor:
    """Eight scales and eight minimums of six bits."""
    low, high = (slice(None, 4), slice(4, None))
    first = [side[..., low] | side[..., high] >> 4 << 6 for side in (sc, mn)]
    return torch.cat([*first, sc[..., high] & 15 | (mn[..., high] & 15) << 4], dim=-1)


def _q2_k(q: Tensor, d: Tensor, sc: Tensor, m: Tensor, mn: Tensor) -> Tensor:
    return _rows([sc | mn << 4, _halves(q, 32, 2), d, -m])


def _q3_k(q: Tensor, d: Tensor, sc: Tensor) -> Tensor:
    return _rows([_planes(q >> 2, 1), _halves(q & 3, 32, 2), _planes(sc & 15, 4), _planes(sc >> 4, 2), d])


def _q4_k(q: Tensor, d: Tensor, sc: Tensor, m: Tensor, mn: Tensor) -> Tensor:
    return _rows([d, -m, _twelve(sc, mn), _halves(q, 32, 4)])


def _q5_k(q: Tensor, d: Tensor, sc: Tensor, m: Tensor, mn: Tensor) -> Tensor:
    return _rows([d, -m, _twelve(sc, mn), _planes(q >> 4, 1), _halves(q & 15, 32, 4)])


def _q6_k(q: Tensor, d: Tensor, sc: Tensor) -> Tensor:
    return _rows([_halves(q & 15, 64, 4), _halves(q >> 4, 32, 2), sc ^ 128, d])


def _iq4_xs(q: Tensor, d: Tensor, sc: Tensor) -> Tensor:
    return _rows([d, neighbours(sc >> 4, 2), neighbours(sc & 15, 4), _halves(q, 16, 4)])


def _iq4_nl(q: Tensor, d: Tensor) -> Tensor:
    return _rows([d, _planes(q, 4)])


def _tq2_0(q: Tensor, d: Tensor) -> Tensor:
    return _rows([_halves(q, 32, 2), d])


# Spec: type, elements of a block, what packs codes, scales and minimums.
_TYPES: dict[str, tuple[str, int, Callable[..., Tensor]]] = {
    "u2/g16/shift/scale(u4/g16/sym)/zero(u4/g16/sym)": ("Q2_K", 256, _q2_k),
    "i3/g16/sym/scale(i6/g16/sym)": ("Q3_K", 256, _q3_k),
    "u4/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)": ("Q4_K", 256, _q4_k),
    "u5/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)": ("Q5_K", 256, _q5_k),
    "i6/g16/sym/scale(i8/g16/sym)": ("Q6_K", 256, _q6_k),
    "iq4/g32/sym/scale(i6/g8/sym)": ("IQ4_XS", 256, _iq4_xs),
    "iq4/g32/sym": ("IQ4_NL", 32, _iq4_nl),
    "ternary/g256/sym": ("TQ2_0", 256, _tq2_0),
}
