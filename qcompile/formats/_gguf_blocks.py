"""GGUF's types of blocks: where codes, scales and minimums lie among a block's bytes.

    d, m, dmin   fp16, little-endian            qs, ql   low bits of the codes      qh, hmask   their high bits

The layouts are those of ggml (https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h and ggml-quants.c), whose
weights are `d * q`, `d * q + m`, and in blocks with quantized scales `d * sc * q` and `d * sc * q - dmin * mn`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.files.gguf_file import BLOCKS
from qcompile.formats._bits import fields
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

Side = Callable[[Tensor], Tensor | QTensor]
SIZES = {name: (elements, size) for name, elements, size in BLOCKS.values()}


@dataclass(frozen=True)
class BlockType:
    """How blocks are read, given as uint8 (rows, blocks, bytes).

    codes   → (rows, blocks, elements) uint8
    scale   → (rows, groups), and zero likewise
    """

    spec: QSpec
    codes: Callable[[Tensor], Tensor]
    scale: Side
    zero: Side | None = None


def unpack(name: str, rows: Tensor) -> QTensor:
    """The weight behind rows of blocks, uint8 (rows, bytes)."""
    kind, (elements, size) = TYPES[name], SIZES[name]
    blocks = rows.unflatten(1, (-1, size))
    shape = (rows.shape[0], blocks.shape[1] * elements)
    zero = kind.zero(blocks) if kind.zero else None

    def codes(start: int, stop: int) -> Tensor:
        return kind.codes(blocks[start:stop]).flatten(1)

    return QTensor.from_rows(kind.spec, shape, codes, kind.scale(blocks), zero)


def _planes(qs: Tensor, bits: int) -> Tensor:
    """All lowest fields of the bytes, then all next ones: (…, bytes) → (…, bytes * 8/bits)."""
    return torch.cat([(qs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def _halves(qs: Tensor, width: int, bits: int) -> Tensor:
    """`_planes` of each run of `width` bytes."""
    return _planes(qs.unflatten(-1, (-1, width)), bits).flatten(-2)


def _half(at: int, sign: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda b: sign * b[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nested(spec: str, codes: Callable[[Tensor], Tensor], at: int, sign: int = 1) -> Side:
    """Scales that are codes themselves, with one fp16 scale a block."""
    return lambda b: QTensor.from_codes(QSpec.parse(spec), codes(b).flatten(1), _half(at, sign)(b), None)


def _float8(at: int, count: int, dtype: torch.dtype) -> Side:
    return lambda b: b[..., at : at + count].flatten(1).contiguous().view(dtype)


def _six_bit_scales(b: Tensor) -> Tensor:
    """Q4_K and Q5_K: eight scales and eight minimums of six bits in the twelve bytes behind d and dmin."""
    s = b[..., 4:16]
    return torch.cat([s[..., :4] & 63, s[..., 8:] & 15 | s[..., :4] >> 6 << 4], dim=-1)


def _six_bit_minimums(b: Tensor) -> Tensor:
    s = b[..., 4:16]
    return torch.cat([s[..., 4:8] & 63, s[..., 8:] >> 4 | s[..., 4:8] >> 6 << 4], dim=-1)


def _q3_k_scales(b: Tensor) -> Tensor:
    return _planes(b[..., 96:104], 4) | _planes(b[..., 104:108], 2) << 4


def _iq4_xs_scales(b: Tensor) -> Tensor:
    return fields(b[..., 4:8], 4) | fields(b[..., 2:4], 2) << 4


def _q6_k(b: Tensor) -> Tensor:
    return _halves(b[..., :128], 64, 4) | _halves(b[..., 128:192], 32, 2) << 4


def _tq1_0(b: Tensor) -> Tensor:
    """Five trits a byte, as the digits of a fraction in base 3: 3**k times the byte brings digit k to the top."""
    parts = [(b[..., :32], 5), (b[..., 32:48], 5), (b[..., 48:52], 4)]
    digits = [(part * 3**k).to(torch.int16) * 3 >> 8 for part, count in parts for k in range(count)]
    return torch.cat(digits, dim=-1).to(torch.uint8)


def _type(spec: str, codes: Callable[[Tensor], Tensor], scale: Side, zero: Side | None = None) -> BlockType:
    return BlockType(QSpec.parse(spec), codes, scale, zero)


TYPES: dict[str, BlockType] = {
    "Q4_0": _type("i4/g32/sym", lambda b: _planes(b[..., 2:], 4), _half(0)),
    "Q4_1": _type("u4/g32/shift", lambda b: _planes(b[..., 4:], 4), _half(0), _half(2)),
    "Q5_0": _type("i5/g32/sym", lambda b: _planes(b[..., 6:], 4) | fields(b[..., 2:6], 1) << 4, _half(0)),
    "Q5_1": _type("u5/g32/shift", lambda b: _planes(b[..., 8:], 4) | fields(b[..., 4:8], 1) << 4, _half(0), _half(2)),
    "Q8_0": _type("i8/g32/sym", lambda b: b[..., 2:] ^ 128, _half(0)),
    "Q2_K": _type(
        "u2/g16/shift/scale(u4/g16/sym)/zero(u4/g16/sym)",
        lambda b: _halves(b[..., 16:80], 32, 2),
        _nested("u4/g16/sym", lambda b: b[..., :16] & 15, 80),
        _nested("u4/g16/sym", lambda b: b[..., :16] >> 4, 82, -1),
    ),
    "Q3_K": _type(
        "i3/g16/sym/scale(i6/g16/sym)",
        lambda b: _halves(b[..., 32:96], 32, 2) | _planes(b[..., :32], 1) << 2,
        _nested("i6/g16/sym", _q3_k_scales, 108),
    ),
    "Q4_K": _type(
        "u4/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)",
        lambda b: _halves(b[..., 16:], 32, 4),
        _nested("u6/g8/sym", _six_bit_scales, 0),
        _nested("u6/g8/sym", _six_bit_minimums, 2, -1),
    ),
    "Q5_K": _type(
        "u5/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)",
        lambda b: _halves(b[..., 48:], 32, 4) | _planes(b[..., 16:48], 1) << 4,
        _nested("u6/g8/sym", _six_bit_scales, 0),
        _nested("u6/g8/sym", _six_bit_minimums, 2, -1),
    ),
    "Q6_K": _type("i6/g16/sym/scale(i8/g16/sym)", _q6_k, _nested("i8/g16/sym", lambda b: b[..., 192:208] ^ 128, 208)),
    "IQ4_NL": _type("iq4/g32/sym", lambda b: _planes(b[..., 2:], 4), _half(0)),
    "IQ4_XS": _type(
        "iq4/g32/sym/scale(i6/g8/sym)",
        lambda b: _halves(b[..., 8:], 16, 4),
        _nested("i6/g8/sym", _iq4_xs_scales, 0),
    ),
    "MXFP4": _type("fp4_e2m1/g32/sym", lambda b: _planes(b[..., 1:], 4), _float8(0, 1, torch.float8_e8m0fnu)),
    "NVFP4": _type("fp4_e2m1/g16/sym", lambda b: _halves(b[..., 4:], 8, 4), _float8(0, 4, torch.float8_e4m3fn)),
    "TQ1_0": _type("ternary/g256/sym", _tq1_0, _half(52)),
    "TQ2_0": _type("ternary/g256/sym", lambda b: _halves(b[..., :64], 32, 2), _half(64)),
}
