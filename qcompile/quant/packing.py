"""How codes lie in memory: bit planes in 16-byte chunks, one row of bytes per output row.

A code's bits are cut into planes of 8, 4, 2 or 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), low bits first, and a row is
the concatenation of its planes. A plane of p bits is a run of 16-byte chunks; a chunk holds 16 * 8/p codes, and bits
[i*p, i*p + p) of its byte j belong to code 16*i + j. Unpacking is then a shift and a mask over whole 16-byte vectors
that yields sixteen neighbouring codes: no shuffles on AVX or NEON, and four neighbouring codes a 32-bit word for dp4a.
Rows are independent, so weights that are stored side by side are one weight. Each plane is padded to a whole chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def plane_bytes(columns: int, width: int) -> int:
    """Bytes of one row of a plane of `width` bits."""
    codes_per_chunk = CHUNK * 8 // width
    return -(-columns // codes_per_chunk) * CHUNK


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes."""
    return sum(plane_bytes(columns, width) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes below 2**bits → (rows, row_bytes(columns, bits)) uint8."""
    rows, columns = codes.shape
    planes, low = [], 0
    for width in PLANES[bits]:
        fields = 8 // width
        padded = plane_bytes(columns, width) * fields
        plane = torch.nn.functional.pad((codes >> low) & (2**width - 1), (0, padded - columns))
        plane = plane.reshape(rows, -1, fields, CHUNK)
        packed = plane[:, :, 0]
        for field in range(1, fields):
            packed = packed | (plane[:, :, field] << (field * width))
        planes.append(packed.reshape(rows, -1))
        low += width
    return torch.cat(planes, dim=1) if len(planes) > 1 else planes[0]


def unpack(data: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: (rows, row_bytes(columns, bits)) uint8 → (rows, columns) uint8."""
    rows, codes, start, low = data.shape[0], None, 0, 0
    for width in PLANES[bits]:
        length = plane_bytes(columns, width)
        plane = data.narrow(1, start, length)
        if width < 8:
            plane = plane.reshape(rows, length // CHUNK, CHUNK)
            # Shifts by numbers: torch cannot shift by a tensor where the number of rows is symbolic.
            plane = torch.stack([(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)], dim=2)
        plane = plane.reshape(rows, length * 8 // width)[:, :columns] << low
        codes = plane if codes is None else codes | plane
        start, low = start + length, low + width
    assert codes is not None
    return codes
