"""A layer of a static key/value cache that holds codes. Importing it needs transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from qcompile.ops.row_codes import SCALE, dequantize_rows, quantize_rows, quantize_rows_by


class QuantizedStaticLayer(StaticLayer):
    """Keys and values as codes of the dtype `codes` (see row_codes), with a scale for each token and head.

    keys, values (batch, heads, max_cache_len, …), key_scales, value_scales (batch, heads, max_cache_len). What is new
    is quantized when it comes, and attention gets all of it back from the codes. Where `scales` are given, of the keys
    and of the values one number or one a head, they are those of all tokens.
    """

    def __init__(self, max_cache_len: int, codes: torch.dtype, scales: tuple[Tensor, Tensor] | None = None):
        super().__init__(max_cache_len)
        self.codes = codes
        self.fixed = scales is not None
        self.scales = scales  # until there is memory for them
        self.key_scales: Any = None
        self.value_scales: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states.to(self.codes), value_states.to(self.codes))
        self.dtype = key_states.dtype
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        self.key_scales = torch.zeros(shape, dtype=SCALE, device=self.device)
        self.value_scales = torch.zeros_like(self.key_scales)
        if self.scales is not None:
            self.fix(self.scales)
        self.scales = None

    def fix(self, scales: tuple[Tensor, Tensor]) -> None:
        """Let these be the scales of all tokens."""
        for own, given in zip((self.key_scales, self.value_scales), scales, strict=True):
            own.copy_(given.reshape(-1, 1))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[-2]
        positions = torch.arange(length, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(length)
        return (
            _update(key_states, self.keys, self.key_scales, positions, self.fixed),
            _update(value_states, self.values, self.value_scales, positions, self.fixed),
        )

    def reset(self) -> None:
        super().reset()
        if self.is_initialized and not self.fixed:  # what is no number would be none times zero
            self.key_scales.zero_()
            self.value_scales.zero_()


def _update(states: Tensor, codes: Tensor | None, scales: Tensor, positions: Tensor, fixed: bool) -> Tensor:
    assert codes is not None
    if fixed:
        new = quantize_rows_by(states, scales.index_select(2, positions), codes.dtype)
    else:
        new, scale = quantize_rows(states, codes.dtype)
        scales.index_copy_(2, positions, scale)
    codes.index_copy_(2, positions, new)
    return dequantize_rows(codes, scales, states.dtype)


# Layers of all tokens that know their position from a tensor.
STATIC_LAYERS = (StaticLayer, QuantizedStaticLayer)
