"""A digest of everything that a capture depends on: equal ones mean that a fresh capture would give the same graph.

A forward is Python: what it does is decided by its code, by what that code reads (attributes of modules, configs,
global names, closures) and by the state of torch. From the objects given, this walks to all of it: every value that
they hold, all that the classes of these define, and what the code of these functions names. Of what changes with its
version alone (pinned.py) it looks only at what somebody exchanged.

What has no stable text, such as a tensor in an attribute or an object written in C, raises Unknown, and so does code
that reaches for more than it names: by an import inside of a function, or by a name that is made as it runs.
"""

from __future__ import annotations

import dis
import enum
import hashlib
import logging
import re
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.pinned import FUNCTIONS, bindings, environment, exchanged, inside, is_pinned, is_pinned_module

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.layout)
_PLAIN += (torch.memory_format, slice, range)
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
    walk.value(bindings(walk.modules))
    return walk.digest.hexdigest()


class _Walk:
    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[Any, int] = {}
        self.alive: list[Any] = []  # so that no other object gets the id of a seen one
        self.open: set[int] = set()  # containers that the walk is in
        self.classes: list[type] = []  # whose methods are still to be looked at
        self.known: set[type] = set()
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
        elif isinstance(x, (*FUNCTIONS, types.ModuleType)):
            self.all(*inside(x))
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
            if not is_pinned(cls):
                if cls not in self.known:
                    self.known.add(cls)
                    self.classes.append(cls)
                continue
            self.modules.add(cls.__module__)
            if isinstance(forward := vars(cls).get("forward"), types.FunctionType):
                self.value(forward)

    def methods(self) -> None:
        """What the classes met define, until no new ones come up: any of it may be asked for, by their parents too."""
        while self.classes:
            cls = self.classes.pop()
            for name in sorted(vars(cls)):
                if name not in _NOT_READ:
                    self.note(cls.__qualname__, name)
                    self.value(vars(cls)[name])

    def function(self, x: types.FunctionType) -> None:
        self.note(x.__module__, x.__qualname__)
        if is_pinned(x):  # and yet somebody's function may be wrapped in it
            self.all(*(each for each in inside(x) if isinstance(each, FUNCTIONS)))
            return
        names = self.code(x.__code__)
        self.all(*inside(x))
        self.named(x.__globals__, names)

    def code(self, x: types.CodeType) -> set[str]:
        """Returns the names in it."""
        if found := _LOOKUPS.intersection(x.co_names):
            raise Unknown(f"code that calls {min(found)}: {x.co_name}")
        for step in dis.get_instructions(x):
            if step.opname == "IMPORT_NAME" and not is_pinned_module(step.argval):
                raise Unknown(f"an import of {step.argval} inside of {x.co_name}")
        self.note(x.co_code.hex(), x.co_varnames, x.co_freevars, x.co_names, x.co_flags)
        names = set(x.co_names)
        for constant in x.co_consts:
            if isinstance(constant, types.CodeType):
                names |= self.code(constant)
            else:
                self.note(repr(sorted(constant, key=repr)) if isinstance(constant, frozenset) else repr(constant))
        return names

    def named(self, scope: Mapping[str, Any], names: set[str]) -> None:
        """What these names are in a scope, also through modules, as in `torch.nn.functional.silu`."""
        for name in sorted(names):
            found = scope.get(name)
            if not isinstance(found, types.ModuleType):
                self.all(name, found)
            elif not is_pinned_module(found.__name__) and not names.isdisjoint(_GETTERS):
                raise Unknown(f"code that may look up names in the module {found.__name__}")
            elif (key := (id(found), *sorted(names))) not in self.seen:
                self.seen[key] = -1
                self.note(name, found.__name__)
                self.named(vars(found), names)


def _is_ours(x: Any) -> bool:
    """What optimize() hangs on a model, such as its new forward."""
    return callable(x) and not isinstance(x, (nn.Module, type)) and type(x).__module__.startswith("qcompile.")


# What a class has that no call reads.
_NOT_READ = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__", "__slots__"}
_NOT_READ |= {"__static_attributes__", "__annotate_func__", "__annotations_cache__", "__orig_bases__", "__reduce__"}
_NOT_READ |= {"__parameters__", "__abstractmethods__", "__subclasshook__", "__match_args__", "__reduce_ex__"}
# By these, code reads what it does not name: anything, the environment, a file; or what it is given.
_LOOKUPS = frozenset({"globals", "vars", "eval", "exec", "__import__", "import_module", "getenv", "open"})
_GETTERS = frozenset({"getattr", "__getattribute__", "__dict__", "attrgetter", "methodcaller"})


def _slots(cls: type) -> list[str]:
    found = [vars(each).get("__slots__", ()) for each in cls.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]
