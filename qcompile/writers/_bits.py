"""Codes into the words that formats pack them into."""

from __future__ import annotations

import torch
from torch import Tensor


def words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes as a continuous bit stream along the last dimension, low bits first: (…, n) → int32 (…, n * bits/32).

    Where `bits` divides 32 that is 32/bits codes a word; the last word is padded with zeros.
    """
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % 32)).unflatten(-1, (-1, 32))
    if 8 % bits == 0:
        return neighbours(padded.flatten(-2), bits).contiguous().view(torch.int32)[..., : -(-count * bits // 32)]
    found = torch.zeros((*padded.shape[:-1], bits), dtype=torch.int64, device=codes.device)  # 32 codes are `bits` words
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = padded[..., place].to(torch.int64)
        found[..., word] |= value << shift
        if shift + bits > 32:
            found[..., word + 1] |= value >> (32 - shift)
    return signed(found.flatten(-2)[..., : -(-count * bits // 32)])


def neighbours(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes 8/bits to a byte, the first in its lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits))
    found = parts[..., 0]
    for place in range(1, 8 // bits):
        found = found | parts[..., place] << bits * place
    return found


def signed(values: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers as int32."""
    return (((values & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
