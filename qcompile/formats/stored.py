"""What a format reader says about a checkpoint, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.quant.codebook import CodebookTensor
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

# Reads a tensor of the checkpoint onto the device where the weight is to lie.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Rounding:
    """How a checkpoint wants activations rounded: an ActivationSpec as text, and the tensors with scale and zero
    point if it is static."""

    spec: str
    scale: str | None = None
    zero: str | None = None


@dataclass(frozen=True)
class Stored:
    """One quantized weight of a checkpoint.

    path     the parameter that it is, by the checkpoint's own module names, such as "model.layers.0.mlp.up_proj.weight"
    spec     how its numbers are read; as text where they are looked up in codebooks
    shape    (out_features, in_features)
    tensors  the tensors that it is made of, and those that merely describe it
    read     makes it: the checkpoint's own codes and scales, in packed form. Raises CheckpointError
    input    how the linear's input is rounded before it is multiplied, if it is
    output   how the linear's output is rounded, if it is
    """

    path: str
    spec: QSpec | str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    read: Callable[[Read], QTensor | CodebookTensor]
    input: Rounding | None = None
    output: Rounding | None = None


def finite(name: str, numbers: Tensor) -> Tensor:
    """The same numbers. Raises CheckpointError, naming the tensor, if some are infinite or not a number."""
    # Some 8-bit floats know no isfinite.
    if not (numbers if numbers.dtype.itemsize > 1 else numbers.float()).isfinite().all():
        raise CheckpointError(f"{name} holds numbers that are infinite or NaN, which no scale is; is the file damaged?")
    return numbers


@dataclass(frozen=True)
class Dense:
    """A float tensor of a checkpoint that the model has under another name or with another value.

    path     the parameter or buffer that it becomes
    tensor   its name in the checkpoint
    value    makes the one of the other
    """

    path: str
    tensor: str
    value: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Ignored:
    """Tensors that no parameter needs: used for something else by the reader, or left over from a calibration."""

    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """A float parameter that is made of several tensors of a checkpoint."""

    path: str
    tensors: tuple[str, ...]
    read: Callable[[Read], Tensor]


@dataclass(frozen=True)
class CacheCodes:
    """How a checkpoint wants the keys and values of an attention module to be cached.

    path     the module
    element  what their codes are, one of CODES in ops/row_codes.py
    tensors  with the scale of the keys, and of the values: one number, or one for each head
    """

    path: str
    element: str
    tensors: tuple[str, str]


Entry = Stored | Dense | Joined | Ignored | CacheCodes


class Format(Protocol):
    """One way of storing quantized weights."""

    name: str

    def claims(self, checkpoint: Checkpoint) -> bool:
        """Whether this checkpoint is written so. Tensors decide before the configuration does."""
        ...

    def weights(self, checkpoint: Checkpoint) -> Iterable[Entry]:
        """Every quantized weight, and the float tensors that are not the parameters of their own names.

        Raises CheckpointError where tensors and configuration contradict each other.
        """
        ...
