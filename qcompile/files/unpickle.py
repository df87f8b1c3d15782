"""Pickles of tensors, as torch.save writes them, read without running anything.

A pickle is a program for a small stack machine. The machine here knows the instructions that build data. A call makes
one of its own few functions' results, or, for torchao's classes, an inert Record; a name that is neither ends the
reading.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.files.safetensors_file import DTYPES

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    @property
    def is_dtype(self) -> bool:
        # torch.int1 … torch.uint7 are names without arithmetic.
        return self.module == "torch" and bool(self.name in _DTYPES or re.fullmatch(r"u?int[1-7]", self.name))

    @property
    def is_storage(self) -> bool:
        return self.library == "torch" and self.name in _STORAGES

    @property
    def function(self) -> Callable[..., Any] | None:
        """What a call of it does here."""
        return _TORCH.get(self.name) if self.library == "torch" else _PYTHON.get(str(self))


@dataclass(frozen=True)
class Place:
    """A tensor: where its numbers lie."""

    storage: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Record:
    """An object of a class that is not run: what it was made from, and what it holds. `wraps`: it is a tensor."""

    kind: Global
    arguments: tuple[Any, ...]
    state: dict[Any, Any]
    wraps: bool = False


class Machine:
    """Runs a pickle: the instructions that build data, and those calls that have an answer in `_TORCH` or `_PYTHON`."""

    def __init__(self, pickled: bytes):
        self.pickled = pickled
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for code, argument, _ in pickletools.genops(self.pickled):
            if code.name == "STOP":
                return self.stack.pop()
            self._step(code.name, argument)
        raise CheckpointError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHES:
            stack.append(argument)
            return
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({} if name == "EMPTY_DICT" else () if name == "EMPTY_TUPLE" else [])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._take(1) if name == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._take(2) if name == "SETITEM" else self._since_mark()
                for key, item in zip(items[::2], items[1::2], strict=True):
                    self._top(dict)[_key(key)] = item
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                module, _, attribute = argument.partition(" ") if argument else self._dotted()
                stack.append(_known(Global(module, attribute)))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._take(2)
                stack.append(_call(function, arguments))
            case "BUILD":
                (state,) = self._take(1)
                _build(stack[-1], state)
            case "BINPERSID":
                (identity,) = self._take(1)
                stack.append(_storage(identity))
            case _:
                raise CheckpointError(f"the pickle has the instruction {name}, which no file of weights needs")

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise CheckpointError("the pickle takes more than it has put there")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        return self._take(len(self.stack) - self.marks.pop())

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise CheckpointError(f"the pickle fills a {kind.__name__} that is none")
        return self.stack[-1]

    def _dotted(self) -> tuple[str, str, str]:
        module, name = self._take(2)
        return str(module), " ", str(name)


# Instructions that push their argument.
_PUSHES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _key(key: Any) -> str | int:
    if not isinstance(key, str | int):
        raise CheckpointError(f"{short(key)} is the key of a mapping")
    return key


def _known(name: Global) -> Global:
    if name.library != "torchao" and not name.is_dtype and not name.is_storage and name.function is None:
        raise CheckpointError(
            f"it asks for {name}, which is not data; nothing of it was run. "
            "Weights are named tensors, as torch.save(model.state_dict(), …) writes them"
        )
    return name


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise CheckpointError(f"the pickle calls {short(function)}")
    if known := function.function:
        return known(*arguments)
    return Record(function, arguments, {})


def _build(target: Any, state: Any) -> None:
    """Attributes of an object. Those of a mapping, such as a state dict's `_metadata`, say nothing of its tensors."""
    if isinstance(target, Record):
        for part in state if isinstance(state, tuple) else (state,):  # the object's dict, and its slots
            if isinstance(part, dict):
                target.state.update(part)
    elif not isinstance(target, dict):
        raise CheckpointError(f"the pickle sets attributes of {short(target)}")


def _storage(identity: Any) -> tuple[str, torch.dtype]:
    if not isinstance(identity, tuple) or len(identity) < 3 or identity[0] != "storage":
        raise CheckpointError(f"{short(identity)} is no storage")
    kind, key = identity[1:3]
    if not isinstance(kind, Global) or not kind.is_storage or not isinstance(key, str):
        raise CheckpointError(f"{short(identity)} is no storage of a kind that is read here")
    return key, _STORAGES[kind.name]


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Place:
    key, dtype = storage
    return Place(key, dtype, offset, tuple(size), tuple(stride))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Place:
    if not isinstance(dtype, Global) or dtype.name not in _DTYPES:
        raise CheckpointError(f"{short(dtype)} is no dtype that is read here")
    return Place(storage[0], _DTYPES[dtype.name], offset, tuple(size), tuple(stride))


def _rebuild_wrapper(kind: Any, dtype: Any, size: Any, *rest: Any) -> Record:
    if not isinstance(kind, Global):
        raise CheckpointError(f"{short(kind)} is no class of tensors")
    return Record(kind, (), {"dtype": dtype, "shape": list(size)}, wraps=True)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    made = _call(function, arguments)
    if isinstance(made, Record):
        _build(made, state)
    return made


def _attribute(owner: Any, name: Any) -> Record:
    """How Python 3.11 writes a member of an enum."""
    if not isinstance(owner, Global) or not isinstance(name, str):
        raise CheckpointError(f"it asks for an attribute of {short(owner)}")
    return Record(owner, (name,), {})


# What a call of the pickle does, by the name of the function that it asks for.
_TORCH: Mapping[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": lambda data, *rest: data,
    "_rebuild_parameter_with_state": lambda data, *rest: data,
    "_rebuild_wrapper_subclass": _rebuild_wrapper,
    "_rebuild_from_type_v2": _rebuild_from_type,
    "Size": lambda size=(): tuple(size),
    "device": lambda *parts: ":".join(map(str, parts)),
    "_get_layout": lambda name: name,
}
_PYTHON: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): {_key(key): item for key, item in pairs},
    "builtins.set": list,
    "__builtin__.set": list,
    "builtins.getattr": _attribute,
    "__builtin__.getattr": _attribute,
    "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),
}


def short(value: Any) -> str:
    """What an unexpected value is, without its contents, which may be endless."""
    return str(value) if isinstance(value, Global) else f"a {type(value).__name__}"
