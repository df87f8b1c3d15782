"""Packed weights inside a model: parameters leave, packed buffers come, and the model keeps working.

A quantized parameter becomes a property of its module that unpacks the weight, so the eager model, PEFT and every way
of using a weight stay right, and a captured graph shows `dequantize(codes, …)` where the parameter was. The codes live
in a `PackedWeight`; sibling modules (Q, K and V, gate and up) share one, output rows side by side, and each reads its
own rows. One shared submodule, not one shared tensor: `.to()` and deepcopy keep submodules shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


# The names under which a module has its roundings, if it has any.
INPUT_ROUNDING, OUTPUT_ROUNDING = "input_rounding", "output_rounding"


@dataclass
class Slot:
    """Where a parameter of a module lies: rows start … start + rows of the PackedWeight in submodule `store`.

    `transposed` is for modules that keep (in_features, out_features), such as Conv1D; `like` is an empty tensor whose
    dtype is the one the weight is unpacked to, and which follows `.to(dtype)`.
    """

    store: str
    start: int
    rows: int
    shape: tuple[int, ...]
    transposed: bool
    like: Tensor
    bias: bool = False


class _Packed:
    """Mixed into the class of a module that has packed parameters."""

    _slots: dict[str, Slot]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        assert isinstance(self, nn.Module)
        return _rebuild, (_base(self), tuple(self._slots), bool(roundings(self))), self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for slot in self._slots.values():
            slot.like = fn(slot.like)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        destination.update({prefix + name: piece for name, piece in self._pieces().items()})

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: Any):
        missing, unexpected, errors = lists
        mine = self._pieces()
        for name, piece in mine.items():
            if (new := state.get(prefix + name)) is None:
                missing.append(prefix + name)
            elif new.shape != piece.shape or new.dtype != piece.dtype:
                is_, needs = (f"{tuple(t.shape)} {t.dtype}" for t in (new, piece))
                errors.append(f"{prefix}{name} is {is_}, not {needs}")
            else:
                piece.copy_(new)
        rest = {key: tensor for key, tensor in state.items() if key.removeprefix(prefix) not in mine}
        super()._load_from_state_dict(rest, prefix, metadata, strict, *lists)  # type: ignore[misc]

    def _pieces(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, slot in self._slots.items():
            store = getattr(self, slot.store)
            if slot.bias:
                found[name] = store.bias.narrow(0, slot.start, slot.rows)
            else:
                found.update({f"{name}.{key}": t for key, t in store.pieces(slot.start, slot.rows).items()})
        return found


def packed_parameters(module: nn.Module) -> dict[str, Slot]:
    """The packed parameters of a module by name; empty for an ordinary one."""
    return dict(module._slots) if isinstance(module, _Packed) else {}


def packed_tensor(module: nn.Module, name: str) -> QTensor:
    """The QTensor behind a packed parameter, as stored: (out_features, in_features) also for a transposed one."""
    slot = packed_parameters(module)[name]
    shape = (*slot.shape[:-2], slot.shape[-1], slot.shape[-2]) if slot.transposed else slot.shape
    return getattr(module, slot.store).tensor(slot.start, slot.rows, shape)


@dataclass(frozen=True)
class Parameter:
    """A parameter that is packed: all its names, the first one first, and what the module sees of it.

    `shape` is the module's own, `transposed` says that it is that of the stored weight with its last two dimensions
    exchanged, `dtype` is what it is unpacked to.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False


def put(
    model: nn.Module,
    parameters: Sequence[Parameter],
    parts: Sequence[QTensor | CodebookTensor],
    biases: Sequence[Tensor] = (),
) -> None:
    """Store weights side by side and put them in the places of these parameters, each under all its names."""
    store, start = _store(parts, biases), 0
    for parameter, part in zip(parameters, parts, strict=True):
        # An empty tensor remembers the dtype to unpack to, and follows `.to(dtype)`.
        like = torch.empty(0, dtype=parameter.dtype, device=part.data.device)
        for path in parameter.paths:
            owner, _, name = path.rpartition(".")
            place = f"packed_{name}"
            slots = {name: Slot(place, start, part.rows, parameter.shape, parameter.transposed, like)}
            if biases:
                slots["bias"] = Slot(place, start, part.rows, (part.rows,), False, like, bias=True)
            module = model.get_submodule(owner)
            if getattr(module._modules.get(place), "data", None) is not store.data:  # one module may have many names
                install(module, slots, {place: store})
        start += part.rows


def _store(parts: Sequence[QTensor | CodebookTensor], biases: Sequence[Tensor]) -> PackedWeight:
    if isinstance(parts[0], CodebookTensor):
        assert len(parts) == 1 and not biases, "codebooks are not stored side by side"
        return PackedCodebook(parts[0])
    return PackedWeight([part for part in parts if isinstance(part, QTensor)], biases)


@dataclass(frozen=True)
class Packed:
    """A packed parameter of a model: where it is, how it is stored, how much that takes, and whether its rows may lie
    beside those of siblings."""

    parameter: Parameter
    spec: str
    nbytes: int
    stacks: bool


def packed_in(model: nn.Module) -> list[Packed]:
    """Every packed weight of a model, under all its names."""
    names: dict[Any, tuple[nn.Module, str, list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, slot in packed_parameters(module).items():
            if not slot.bias:
                path = f"{prefix}.{name}" if prefix else name
                key = (id(getattr(module, slot.store)), slot.start)
                names.setdefault(key, (module, name, []))[2].append(path)
    found = []
    for module, name, paths in names.values():
        slot = packed_parameters(module)[name]
        store = getattr(module, slot.store)
        parameter = Parameter(tuple(paths), slot.shape, slot.like.dtype, slot.transposed)
        nbytes = sum(piece.nbytes for piece in store.pieces(slot.start, slot.rows).values())
        found.append(Packed(parameter, store.spec, nbytes, getattr(store, "order", None) is None))
    return found


def data_path(path: str) -> str:
    """The buffer with the codes of a packed parameter."""
    owner, dot, name = path.rpartition(".")
    return f"{owner}{dot}packed_{name}.data"


def install(module: nn.Module, slots: Mapping[str, Slot], stores: Mapping[str, PackedWeight]) -> None:
    """Replace parameters of `module` by packed ones, in place. The module's class becomes a subclass of itself."""
    for name, slot in slots.items():
        if name not in module._parameters and name not in packed_parameters(module):
            raise FormatError(f"{type(module).__name__} has no parameter {name!r} to replace")
        module._parameters.pop(name, None)
        module._modules[slot.store] = stores[slot.store]
    every = {**packed_parameters(module), **slots}
    _become(module, every, bool(roundings(module)))


def put_rounding(module: nn.Module, name: str, rounding: ActivationRounding) -> None:
    """Round what a packed module reads (INPUT_ROUNDING) or returns (OUTPUT_ROUNDING) from now on."""
    module._modules[name] = rounding
    _become(module, packed_parameters(module), True)


def roundings(module: nn.Module) -> dict[str, ActivationRounding]:
    """The activation roundings of a module, by INPUT_ROUNDING and OUTPUT_ROUNDING."""
    found = {name: module._modules.get(name) for name in (INPUT_ROUNDING, OUTPUT_ROUNDING)}
    return {name: rounding for name, rounding in found.items() if isinstance(rounding, ActivationRounding)}


def _base(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before anything of it was packed."""
    return type(module).__mro__[2] if isinstance(module, _Packed) else type(module)


def _become(module: nn.Module, slots: dict[str, Slot], rounds: bool) -> None:
    object.__setattr__(module, "__class__", _packed_class(_base(module), tuple(slots), rounds))
    module.__dict__["_slots"] = slots


@functools.cache
def _packed_class(base: type[nn.Module], names: tuple[str, ...], rounds: bool) -> type[nn.Module]:
    body: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    if rounds:
        body["forward"] = _rounding_forward(base)
    return type(base.__name__, (_Packed, base), body)


def _rounding_forward(base: type[nn.Module]) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        before, after = (self._modules.get(name) for name in (INPUT_ROUNDING, OUTPUT_ROUNDING))
        y = base.forward(self, x if before is None else before(x))
        return y if after is None else after(y)

    return forward


def _rebuild(base: type[nn.Module], names: tuple[str, ...], rounds: bool = False) -> nn.Module:
    return _packed_class(base, names, rounds).__new__(_packed_class(base, names, rounds))


def _read(module: nn.Module, name: str) -> Tensor:
    slot = module.__dict__["_slots"][name]
    store = module._modules[slot.store]
    assert isinstance(store, PackedWeight)
    if slot.bias:
        assert store.bias is not None
        return store.bias.narrow(0, slot.start, slot.rows)
    weight = store.dequantize(slot.like.dtype, slot.start, slot.rows)
    if slot.transposed:
        weight = weight.reshape((*slot.shape[:-2], slot.shape[-1], slot.shape[-2]))
        return weight.transpose(-1, -2)
    return weight if weight.dim() == len(slot.shape) else weight.reshape(slot.shape)
