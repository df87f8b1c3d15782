"""Many rows times a quantized weight on Hopper: whole tiles of linear_wgmma, and the few rows that these leave over.

A tile of one row would take as long as a full one; linear_few makes up to eight rows in the time that reading the
weight takes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qcompile.kernels import _tuning, _turns
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_few import few, few_gated
from qcompile.kernels.linear_wgmma import wgmma, wgmma_gated


def many(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _turns.WgmmaTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) that _gluon.can_read."""
    if not (count := _left(x, weight, tile)):
        return wgmma(x, weight, bias, activation, tile)
    out = x.new_empty(x.shape[0], weight.rows)
    wgmma(x[:-count], weight, bias, activation, tile, out[:-count])
    few(x[-count:], weight, bias, activation, _few_tile(count, weight, x), out[-count:])
    return out


def many_gated(x: Tensor, weight: Weight, bias: Tensor | None, activation: str, tile: _turns.WgmmaTile) -> Tensor:
    """act(gate) * factor of the halves of x @ W.T + bias, for a tile without splits."""
    if not (count := _left(x, weight, tile)):
        return wgmma_gated(x, weight, bias, activation, tile)
    out = x.new_empty(x.shape[0], weight.rows // 2)
    wgmma_gated(x[:-count], weight, bias, activation, tile, out[:-count])
    few_gated(x[-count:], weight, bias, activation, replace(_few_tile(count, weight, x), parts=1), out[-count:])
    return out


def _left(x: Tensor, weight: Weight, tile: _turns.WgmmaTile) -> int:
    return _turns.left_over(x.shape[0], tile.tokens, weight.layout.bits)


def _few_tile(count: int, weight: Weight, x: Tensor) -> _tuning.FewTile:
    return _tuning.few_tile(count, weight.rows, weight.columns, weight.layout.bits, _tuning.Device.of(x.device))
