"""What packed weights lie in: submodules that hold codes, scales and roundings as buffers.

Their numbers are data: `.to(dtype)` changes what a weight is unpacked to, never what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import FormatError
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.codebook import dequantize_codebook
from qcompile.ops.linear import dequantize, reorder
from qcompile.quant.activation import ActivationSpec
from qcompile.quant.codebook import CodebookTensor, stages
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor


class PackedWeight(nn.Module):
    """Codes, scales and zero points of one weight or of several stored side by side, as buffers.

    Buffers: data (rows, bytes) uint8, scale, zero, order; quantized scales nest as submodules of the same kind. `bias`
    holds the siblings' biases side by side, if they have any.
    """

    data: Tensor
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, parts: Sequence[QTensor], biases: Sequence[Tensor] = ()):
        super().__init__()
        first = parts[0]
        self.spec = str(first.spec)
        self.columns = first.columns
        self.register_buffer("order", None)
        for name, piece in first.parts().items():
            if isinstance(piece, QTensor):
                assert len(parts) == 1, "quantized scales are not stored side by side"
                self.add_module(name, PackedWeight([piece]))
            elif name == "order":
                assert len(parts) == 1, "columns in an order of their own are not stored side by side"
                self.order = piece
            else:
                pieces = [tensor for part in parts if isinstance(tensor := part.parts()[name], Tensor)]
                self.register_buffer(name, torch.cat(pieces) if len(pieces) > 1 else piece)
        self.register_buffer("bias", torch.cat(list(biases)) if biases else None)

    def part(self, name: str, start: int, rows: int, total: int) -> Tensor | None:
        """Rows `start … start + rows` of a piece; pieces with one row for all (per tensor, output groups) whole."""
        piece = getattr(self, name, None)
        if isinstance(piece, PackedWeight):
            return piece.dequantize(torch.float32)
        if piece is None or rows == total or piece.shape[0] != total:
            return piece
        return piece.narrow(0, start, rows)

    def dequantize(self, dtype: torch.dtype, start: int = 0, rows: int | None = None) -> Tensor:
        """Float rows of the weight, (rows, columns)."""
        total = self.data.shape[0]
        rows = total if rows is None else rows
        data, scale, zero = (self.part(name, start, rows, total) for name in ("data", "scale", "zero"))
        weight = dequantize(data, scale, zero, self.spec, [rows, self.columns], dtype)
        return weight if self.order is None else reorder(weight, self.order)

    def tensor(self, start: int, rows: int, shape: Sequence[int]) -> QTensor:
        """A QTensor over the same memory."""
        total = self.data.shape[0]
        parts: dict[str, Any] = {"order": self.order}
        for name in ("data", "scale", "zero"):
            piece = getattr(self, name, None)
            if isinstance(piece, PackedWeight):
                parts[name] = piece.tensor(0, piece.data.shape[0], (piece.data.shape[0], piece.columns))
            else:
                parts[name] = self.part(name, start, rows, total)
        return QTensor(QSpec.parse(self.spec), tuple(shape), **parts)

    def pieces(self, start: int, rows: int) -> dict[str, Tensor]:
        """Views of all stored tensors that belong to these rows, by dotted name."""
        total, found = self.data.shape[0], {}
        for name in ("data", "scale", "zero"):
            piece = getattr(self, name, None)
            if isinstance(piece, PackedWeight):
                nested = piece.pieces(0, piece.data.shape[0])
                found.update({f"{name}.{key}": tensor for key, tensor in nested.items()})
            elif piece is not None:
                found[name] = self.part(name, start, rows, total)
        return found if self.order is None else {**found, "order": self.order}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        bias = self.bias
        super()._apply(_keeping_dtype(fn), recurse)
        if bias is not None:
            self.bias = fn(bias)
        return self

    # Each module writes and reads its own rows (`_Packed`), so the shared buffers stay out of state_dict.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def extra_repr(self) -> str:
        return f"{self.spec}, rows={self.data.shape[0]}, columns={self.columns}"


class PackedCodebook(PackedWeight):
    """The pieces of a CodebookTensor as buffers; one weight, never siblings."""

    def __init__(self, weight: CodebookTensor):
        nn.Module.__init__(self)
        self.spec = weight.spec
        self.shape = weight.shape
        self.columns = weight.columns
        for name in ("order", "bias"):
            self.register_buffer(name, None)
        for name, piece in weight.parts().items():
            self.register_buffer(name, piece)

    def dequantize(self, dtype: torch.dtype, start: int = 0, rows: int | None = None) -> Tensor:
        parts = self.pieces(0, self.shape[0])
        sides = (parts.get(name) for name in ("outlier_codes", "outlier_book", "scale", "shift", "order"))
        return dequantize_codebook(*stages(parts), *sides, self.spec, list(self.shape), dtype)

    def tensor(self, start: int, rows: int, shape: Sequence[int]) -> Any:
        return CodebookTensor.from_parts(self.shape, self.pieces(0, self.shape[0]))

    def pieces(self, start: int, rows: int) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def extra_repr(self) -> str:
        return f"{self.spec}, rows={self.shape[0]}, columns={self.columns}"


def store(parts: Sequence[QTensor | CodebookTensor], biases: Sequence[Tensor] = ()) -> PackedWeight:
    """Weights side by side in one module."""
    if isinstance(parts[0], CodebookTensor):
        assert len(parts) == 1 and not biases, "codebooks are not stored side by side"
        return PackedCodebook(parts[0])
    return PackedWeight([part for part in parts if isinstance(part, QTensor)], biases)


class ActivationRounding(nn.Module):
    """Rounds what a module reads or returns: an ActivationSpec, and its scale and zero point if they are static."""

    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, spec: ActivationSpec, scale: Tensor | None = None, zero: Tensor | None = None):
        super().__init__()
        needs = [name for name, needed in (("scale", spec.needs_scale), ("zero", spec.needs_zero)) if needed]
        got = [name for name, given in (("scale", scale), ("zero", zero)) if given is not None]
        if got != needs:
            raise FormatError(
                f"{spec} needs {' and '.join(needs) or 'no scale'}, got {' and '.join(got) or 'no scale'}"
            )
        self.spec = str(spec)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        return round_activation(x, self.scale, self.zero, self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationRounding:
        return super()._apply(_keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return self.spec


# The name under which an attention module has its CacheScales, if it has any.
CACHE_SCALES = "cache_scales"


class CacheScales(nn.Module):
    """How generate() caches the keys and values of an attention module: as codes of `element`, one of CODES in
    ops/row_codes.py, by a static scale of the keys and one of the values, f32[1] or f32[heads, 1, 1]."""

    key: Tensor
    value: Tensor

    def __init__(self, element: str, key: Tensor, value: Tensor):
        super().__init__()
        self.element = element
        self.register_buffer("key", key)
        self.register_buffer("value", value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CacheScales:
        return super()._apply(_keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return self.element


class ScaledActivation(nn.Module):
    """An activation whose output is divided channel by channel."""

    def __init__(self, act: nn.Module, channels: int, dtype: torch.dtype):
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(torch.empty(channels, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`.to(dtype)`, `.half()` and `.float()` change what a weight is unpacked to, never the stored numbers."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
