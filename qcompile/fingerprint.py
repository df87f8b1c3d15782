"""A digest of everything that a capture depends on: equal ones mean that a fresh capture would give the same graph.

A forward is Python: what it does is decided by its code, by what that code reads (attributes of modules, configs,
global names, closures) and by the state of torch. From the objects given, this walks to all of it: the code of every
function that those reached so far can name, and the values that they can name.

Python's own library, torch, transformers and qcompile change with their versions, so the walk ends at their functions;
but for those that somebody exchanged (`exchanged`). What has no stable text, such as a tensor in an attribute or an
object written in C, raises Unknown: nothing is known to be the same then.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import os
import platform
import re
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.kernels._cpp import processor_features
from qcompile.ops.registry import OPS

# These change with their versions, or with qcompile's own files, which are part of every digest.
PINNED = frozenset({"torch", "triton", "numpy", "sympy", "transformers", "qcompile"})
VERSIONS = (*sorted(PINNED), "accelerate", "peft")
# Where somebody may exchange what a forward calls, beside the modules of the classes met.
OPEN = re.compile(r"transformers\.(?!models\b|tokenization|utils\b|trainer|data\b|generation\b)|torch\.nn\.functional$")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.layout)
_PLAIN += (torch.memory_format, slice, range)
_FUNCTIONS = (types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial)
# Objects whose state says nothing about a graph.
_STATELESS = (logging.Logger, types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType)
_STATELESS += (types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType)
_STATELESS += (types.ClassMethodDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class Unknown(Exception):
    """Something has no stable text; the message says what."""


def fingerprint(*roots: Any) -> str:
    """The digest of `roots`, such as a model and its forward, of what they reach, and of where this runs."""
    walk = _Walk()
    for root in (environment(), *roots):
        walk.value(root)
    walk.methods()
    walk.value(exchanged(walk.modules))
    walk.methods()
    return walk.digest.hexdigest()


class _Walk:
    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[Any, int] = {}
        self.alive: list[Any] = []  # so that no other object gets the id of a seen one
        self.open: set[int] = set()  # containers that the walk is in
        self.names: set[str] = {"forward"}  # what some function may ask an object for
        self.classes: dict[type, set[str]] = {}  # with the names that were looked at
        self.modules: set[str] = set()  # where pinned classes are defined

    def note(self, *words: Any) -> None:
        self.digest.update("\0".join(map(str, words)).encode() + b"\1")

    def is_new(self, x: Any) -> bool:
        number = self.seen.setdefault(id(x), len(self.alive))
        if number < len(self.alive):
            self.note("again", number)
            return False
        self.alive.append(x)
        self.note(type(x).__module__, type(x).__qualname__)
        return True

    def value(self, x: Any) -> None:
        if isinstance(x, _PLAIN):
            self.note(type(x).__name__, repr(x))
        elif type(x) in (dict, list, tuple, set, frozenset):  # which of them are one and which are equal says nothing
            self.note(type(x).__name__)
            if id(x) not in self.open:
                self.open.add(id(x))
                self.content(x)
                self.open.remove(id(x))
        elif self.is_new(x):
            self.content(x)

    def content(self, x: Any) -> None:
        if isinstance(x, Tensor):
            if x.numel() == 0:
                return self.parameter(x)
            raise Unknown(f"a tensor of shape {tuple(x.shape)} that is no parameter and no buffer")
        if isinstance(x, nn.Module):
            self.module(x)
        elif isinstance(x, type):
            self.type(x)
        elif isinstance(x, types.FunctionType):
            self.function(x)
        elif isinstance(x, (*_FUNCTIONS, types.ModuleType)):
            self.all(*_inside(x))
        elif isinstance(x, _STATELESS):
            self.note(getattr(x, "__name__", x))
        elif isinstance(x, (enum.Enum, re.Pattern)):
            self.note(x)
        else:
            self.object(x)
        return None

    def all(self, *values: Any) -> None:
        for x in values:
            self.value(x)

    def items(self, values: Mapping[Any, Any]) -> None:
        self.note(len(values))
        for name, x in values.items():
            self.all(name, x)

    def object(self, x: Any) -> None:
        """A container, an instance of a class, or both."""
        attributes = {name: getattr(x, name, None) for name in _slots(type(x))} | getattr(x, "__dict__", {})
        attributes.pop("_original_object_hash", None)  # transformers': it is of this process
        if isinstance(x, dict):
            self.items(dict(dict.items(x)))
        elif isinstance(x, (list, tuple, deque)):
            self.all(len(x), *x)
        elif isinstance(x, (set, frozenset)) and all(isinstance(each, _PLAIN) for each in x):
            self.note(*sorted(map(repr, x)))
        elif not attributes and not hasattr(x, "__dict__") and type(x) is not object:  # written in C
            raise Unknown(f"an object of type {type(x).__module__}.{type(x).__qualname__}")
        if type(x) not in (dict, list, tuple, set, frozenset):
            self.value(type(x))
            self.items(attributes)

    def module(self, x: nn.Module) -> None:
        self.value(type(x))
        for name, tensor in (*x._parameters.items(), *x._buffers.items()):
            self.note(name)
            if tensor is None or self.is_new(tensor):
                self.parameter(tensor)
        for name, attribute in vars(x).items():
            if name not in ("_parameters", "_buffers") and not _is_ours(attribute):
                self.all(name, attribute)

    def parameter(self, x: Tensor | None) -> None:
        """A tensor that is an input of the graph: any other of this kind would do."""
        if x is None:
            self.note("None")
        elif type(x) in (Tensor, nn.Parameter, nn.Buffer):
            self.note(x.dtype, x.device, tuple(x.shape), x.stride(), x.layout, x.is_conj(), x.is_inference())
        else:
            raise Unknown(f"a parameter of type {type(x).__name__}")

    def type(self, x: type) -> None:
        for cls in x.__mro__:
            self.note(cls.__module__, cls.__qualname__)
            if not _is_pinned(cls):
                self.classes.setdefault(cls, set())
                continue
            self.modules.add(cls.__module__)
            if isinstance(forward := vars(cls).get("forward"), types.FunctionType):
                self.value(forward)

    def methods(self) -> None:
        """What functions may ask of the classes met, until nothing new comes up."""
        while found := [
            (cls, name)
            for cls, known in self.classes.items()
            for name in sorted(vars(cls))
            if name not in known and (name in self.names or _is_operator(name))
        ]:
            for cls, name in found:
                self.classes[cls].add(name)
                self.note(cls.__qualname__, name)
                self.value(vars(cls)[name])

    def function(self, x: types.FunctionType) -> None:
        self.note(x.__module__, x.__qualname__)
        names, inside = self.code(x.__code__), _inside(x)
        if _is_pinned(x):  # and yet somebody's function may be wrapped in it
            self.all(*(each for each in inside if isinstance(each, _FUNCTIONS)))
            return
        self.names |= names
        self.all(*inside)
        self.named(x.__globals__, names)

    def code(self, x: types.CodeType) -> set[str]:
        """Returns the names in it."""
        self.note(x.co_code.hex(), x.co_varnames, x.co_freevars, x.co_names, x.co_flags)
        names = set(x.co_names)
        for constant in x.co_consts:
            if isinstance(constant, types.CodeType):
                names |= self.code(constant)
            else:
                self.note(repr(sorted(constant, key=repr)) if isinstance(constant, frozenset) else repr(constant))
        return names

    def named(self, scope: Mapping[str, Any], names: Iterable[str]) -> None:
        """What these names are in a scope, also through modules, as in `torch.nn.functional.silu`."""
        for name in sorted(names):
            found = scope.get(name)
            if not isinstance(found, types.ModuleType):
                self.all(name, found)
            elif (key := (id(found), *sorted(names))) not in self.seen:
                self.seen[key] = -1
                self.note(name, found.__name__)
                self.named(vars(found), names)


def _inside(x: Any) -> list[Any]:
    """What a function and its kind are made of, code aside."""
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
        return [*cells, x.__defaults__, x.__kwdefaults__]
    if isinstance(x, property):
        return [x.fget, x.fset]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, types.ModuleType):
        return [x.__name__]
    return [x.__func__, getattr(x, "__self__", None)]


def _is_pinned(x: Any) -> bool:
    file = x.__code__.co_filename if isinstance(x, types.FunctionType) else "<>"
    if not file.startswith("<"):
        return file.startswith(_pinned_folders())
    root = str(x.__module__).partition(".")[0]
    return root in PINNED or root in sys.stdlib_module_names or root.startswith("namedtuple_")


@functools.cache
def _pinned_folders() -> tuple[str, ...]:
    needed = [re.split(r"\W", line, maxsplit=1)[0] for package in PINNED for line in _requires(package)]
    specs = [_spec(package) for package in (*PINNED, *needed)]
    found = [place for spec in specs if spec for place in spec.submodule_search_locations or (spec.origin or "<>",)]
    library = sysconfig.get_path("stdlib")
    folders = [name for name in os.listdir(library) if name not in ("site-packages", "dist-packages")]
    found += [os.path.join(library, name) for name in folders]
    return tuple(path for folder in map(str, found) for path in (folder, os.path.realpath(folder)))


def _is_ours(x: Any) -> bool:
    """What optimize() hangs on a model, such as its new forward."""
    return callable(x) and not isinstance(x, (nn.Module, type)) and type(x).__module__.startswith("qcompile.")


def _is_operator(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in _NOT_CALLED


_NOT_CALLED = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__", "__slots__"}
_NOT_CALLED |= {"__static_attributes__", "__annotate_func__", "__annotations_cache__", "__orig_bases__", "__reduce__"}
_NOT_CALLED |= {"__parameters__", "__abstractmethods__", "__subclasshook__", "__match_args__", "__reduce_ex__"}


def _slots(cls: type) -> list[str]:
    found = [vars(each).get("__slots__", ()) for each in cls.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def exchanged(modules: Collection[str]) -> list[tuple[str, Any]]:
    """What others have put into pinned modules, by name: functions, methods of classes, entries of registries."""
    names = sorted(name for name in sys.modules if name in modules or OPEN.match(name))
    members = (member for name in names for member in _members(name, getattr(sys.modules[name], "__dict__", {})))
    return [(path, x) for path, x in members if _is_foreign(x)]


def _members(path: str, scope: Mapping[Any, Any], depth: int = 2) -> Iterator[tuple[str, Any]]:
    entries = dict.items(scope) if isinstance(scope, dict) else scope.items()  # some registries import what they give
    for name, x in list(entries):
        where = f"{path}.{name}"
        if isinstance(x, _FUNCTIONS):
            yield where, x
        elif isinstance(x, type):
            if depth and x.__module__ == path:
                yield from _members(where, vars(x), depth - 1)
        elif depth and isinstance(x, dict):
            yield from _members(where, x, depth - 1)
        elif depth and type(x).__module__ == path and hasattr(x, "__dict__"):
            yield from _members(where, vars(x), depth - 1)


def _is_foreign(x: Any, depth: int = 4) -> bool:
    """Whether a function, or one wrapped in it, is in no file of a pinned package."""
    if isinstance(x, types.FunctionType) and not _is_pinned(x):
        return True
    return bool(depth) and any(isinstance(each, _FUNCTIONS) and _is_foreign(each, depth - 1) for each in _inside(x))


def environment() -> list[Any]:
    """Where this runs: versions, the processor and the GPUs, and the state of torch that a trace or a choice reads."""
    sdp = torch.backends.cuda
    state: list[Any] = [
        sys.version,
        platform.machine(),
        sorted(processor_features()),
        [_version(package) for package in VERSIONS],
        _source(),
        os.environ.get("TRITON_INTERPRET"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,  # pyright: ignore[reportAttributeAccessIssue]
        [sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled()],
        [(each.name, each.function, each.refuses) for op in OPS.values() for each in op.implementations],
    ]
    if torch.cuda.is_available():
        state += [torch.version.cuda, torch.cuda.current_device()]
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            state += [gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count, gpu.total_memory]
    return state


def _requires(package: str) -> list[str]:
    try:
        return [line.replace("-", "_") for line in requires(package) or ()]
    except PackageNotFoundError:
        return []


def _spec(package: str) -> ModuleSpec | None:
    try:
        return find_spec(package)
    except (ImportError, ValueError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def _source() -> str:
    """The digest of qcompile's own files."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for folder in (root, root / "passes", root / "kernels"):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".h", ".cpp"):
                digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()
