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
from qcompile.quant.codebook import CodebookTensor
from qcompile.quant.tensor import QTensor
from qcompile.stores import ActivationRounding, PackedWeight, store

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
    packed, start = store(parts, biases), 0
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
            if getattr(module._modules.get(place), "data", None) is not packed.data:  # one module may have many names
                install(module, slots, {place: packed})
        start += part.rows


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
