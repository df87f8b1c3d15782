"""A call of a model as flat tensors plus a hashable key, and back; key/value caches are taken apart and put together.

Two calls with one key differ only in their tensors, so one captured graph can serve both. A cache's tensors are inputs
of the graph; what the call assigned to the cache is put back afterwards.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import UnsupportedError

# A call's key/value cache, and that of what it gives: the name of transformers from 5.24 on, and the one before.
CACHE_NAMES = ("cache", "past_key_values")
# What a key can hold as it is.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, type)


@dataclass
class Flat:
    """The tensors of a call, the key of everything else, and its caches; `cached` says which tensors are of caches, and
    `layers` which of each layer of them, with the key of its rest."""

    tensors: list[Tensor] = field(default_factory=list)
    key: list[Hashable] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    cached: set[int] = field(default_factory=set)
    layers: list[tuple[range, list[Hashable]]] = field(default_factory=list)


def flatten(value: Any) -> tuple[Flat, Callable[[Sequence[Any]], Any]]:
    """Take a value apart. The second result rebuilds it around other tensors, with copies of its caches; around None
    where a tensor is not looked at.

    Raises UnsupportedError where a value has no stable key, with the reason.
    """
    flat = Flat()
    return flat, _take(value, flat)


def _take(value: Any, flat: Flat) -> Callable[[Sequence[Any]], Any]:
    if isinstance(value, Tensor):
        index = len(flat.tensors)
        flat.tensors.append(value)
        flat.key.append(("tensor", value.dtype, value.device, value.dim()))
        return lambda tensors: tensors[index]
    if isinstance(value, PLAIN):
        flat.key.append((type(value), value))
        return lambda tensors: value
    if is_cache(value):
        return _take_cache(value, flat)
    if isinstance(value, dict):
        flat.key.append((type(value), tuple(value)))
        items = {name: _take(item, flat) for name, item in value.items()}
        if type(value) is dict:
            return lambda tensors: {name: item(tensors) for name, item in items.items()}
        return lambda tensors: type(value)(**{name: item(tensors) for name, item in items.items()})
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        flat.key.append((type(value), len(value)))
        parts = [_take(item, flat) for item in value]
        return lambda tensors: type(value)(part(tensors) for part in parts)
    raise UnsupportedError(f"an argument of type {type(value).__name__}")


def cache_name(names: Container[str]) -> str:
    """Which of CACHE_NAMES is among these names, of a forward's parameters or of a call's arguments."""
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[-1])


def is_cache(value: Any) -> bool:
    """Whether this is a key/value cache of transformers."""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _take_cache(cache: Any, flat: Flat) -> Callable[[Sequence[Any]], Any]:
    if (reason := why_not_traceable(cache)) is not None:
        raise UnsupportedError(reason)
    place = len(flat.caches)
    flat.caches.append(cache)
    flat.key.append((type(cache), len(cache.layers)))
    layers, first = [], len(flat.tensors)
    for layer in cache.layers:
        tensors, key = len(flat.tensors), len(flat.key)
        flat.key.append(type(layer))
        attributes = {}
        for name, item in sorted(vars(layer).items()):
            if name == "max_cache_len" and layer.is_initialized:
                continue  # the size of `keys`, which may be symbolic
            flat.key.append(name)
            attributes[name] = _take(item, flat)
        layers.append((layer, attributes))
        flat.layers.append((range(tensors, len(flat.tensors)), flat.key[key:]))
    flat.cached.update(range(first, len(flat.tensors)))

    def rebuild(tensors: Sequence[Any]) -> Any:
        shell = copy.copy(cache)
        shell.layers, shell._qcompile_before = [], []
        for layer, attributes in layers:
            twin = copy.copy(layer)
            for name, item in attributes.items():
                setattr(twin, name, item(tensors))
            if twin.is_initialized:
                # Nothing in a graph says that keys and values are equally many: each would be a size of its own.
                for x in vars(twin).values():
                    if isinstance(x, Tensor) and x.dim() > 2:
                        torch._check(x.shape[2] == twin.keys.shape[2])
                if hasattr(twin, "max_cache_len"):
                    twin.max_cache_len = None if twin.keys is None else twin.keys.shape[2]
            shell.layers.append(twin)
            shell._qcompile_before.append(dict(vars(twin)))
        shell._qcompile_place = place
        return shell

    return rebuild


def why_not_traceable(cache: Any) -> str | None:
    """Why calls with this cache run uncompiled: a layer that counts in Python would need a new graph every step."""
    utils = sys.modules["transformers.cache_utils"]
    steady = (*_static_layers(), utils.DynamicLayer)
    if not hasattr(cache, "layers"):
        return f"the cache {type(cache).__name__} has no layers"
    for layer in cache.layers:
        if type(layer) in steady:
            continue
        if type(layer) is utils.DynamicSlidingWindowLayer and not layer.is_initialized:
            continue
        return f"the cache layer {type(layer).__name__} keeps its position in Python"
    return None


def is_unallocated(cache: Any) -> bool:
    """Whether this is a static cache that has not been given its memory yet."""
    return any(type(layer) in _static_layers() and not layer.is_initialized for layer in cache.layers)


def is_static(cache: Any) -> bool:
    """Whether a call writes to this cache's own memory, and changes nothing else of it."""
    return bool(cache.layers) and all(type(layer) in _static_layers() for layer in cache.layers)


def _static_layers() -> tuple[type, ...]:
    from qcompile.quantized_layer import STATIC_LAYERS

    return STATIC_LAYERS


@dataclass
class Result:
    """What a traced call gave: tensors that the graph must return, and how to build the caller's result from them."""

    tensors: list[Any]
    build: Build


# Makes a part of the caller's result from the graph's outputs, the call's tensors and its caches. Plain data, for
# keeping it on disk.
Make = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]


def record(result: Any, inputs: Sequence[Any], shells: Sequence[Any]) -> Result:
    """Describe the result of a traced call.

    `inputs` are the tensors the call was given, `shells` the cache copies it ran on. `build(outputs, tensors, caches)`
    gives the caller's result and writes the new state into the caller's caches.
    """
    outputs: list[Any] = []
    given = {id(tensor): index for index, tensor in enumerate(inputs)}
    effects = [(place, _changes(shell, given, outputs)) for place, shell in enumerate(shells)]
    return Result(outputs, Build(effects, _give(result, given, outputs)))


@dataclass(frozen=True)
class Build:
    effects: list[tuple[int, list[dict[str, Make]]]]
    make: Make

    def __call__(self, values: Sequence[Any], tensors: Sequence[Any], caches: Sequence[Any]) -> Any:
        for place, changes in self.effects:
            _apply_changes(caches[place], changes, values, tensors, caches)
        return self.make(values, tensors, caches)

    def only(self, *names: str) -> Build:
        """The same for caches that have all their layers, and of a result that is a mapping a dict of what is there of
        these names: a ModelOutput takes 50 us to make."""
        if not isinstance(self.make, _Mapping):
            return self
        effects = [(place, changes) for place, changes in self.effects if any(changes)]
        return Build(effects, _Mapping(dict, {n: self.make.items[n] for n in names if n in self.make.items}))

    def place_of(self, name: str) -> int | None:
        """Which of the graph's outputs is what the result, a mapping, has under this name."""
        item = self.make.items.get(name) if isinstance(self.make, _Mapping) else None
        return item.index if isinstance(item, _Nth) and item.of == 0 else None


@dataclass(frozen=True)
class _Nth:
    """The value at `index` of the graph's outputs (0), the call's tensors (1) or its caches (2)."""

    of: int
    index: int

    def __call__(self, *state: Sequence[Any]) -> Any:
        return state[self.of][self.index]


@dataclass(frozen=True)
class _Always:
    value: Any

    def __call__(self, *state: Sequence[Any]) -> Any:
        return self.value


@dataclass(frozen=True)
class _Mapping:
    kind: type
    items: dict[str, Make]

    def __call__(self, *state: Sequence[Any]) -> Any:
        return self.kind(**{name: item(*state) for name, item in self.items.items()})


@dataclass(frozen=True)
class _Row:
    kind: type
    parts: list[Make]

    def __call__(self, *state: Sequence[Any]) -> Any:
        return self.kind(part(*state) for part in self.parts)


@dataclass(frozen=True)
class _NewCache:
    """A cache that the call made."""

    template: Any
    changes: list[dict[str, Make]]

    def __call__(self, *state: Sequence[Any]) -> Any:
        cache = copy.copy(self.template)
        cache.layers = [copy.copy(layer) for layer in self.template.layers]
        _apply_changes(cache, self.changes, *state)
        return cache


def _give(value: Any, given: dict[int, int], outputs: list[Any]) -> Make:
    if isinstance(value, Tensor) and id(value) in given:
        return _Nth(1, given[id(value)])
    if isinstance(value, (Tensor, torch.SymInt)):
        outputs.append(value)
        return _Nth(0, len(outputs) - 1)
    if is_cache(value):
        if (place := getattr(value, "_qcompile_place", None)) is not None:
            return _Nth(2, place)
        changes = _changes(value, given, outputs)
        template = copy.copy(value)
        template.layers = [_without_tensors(layer) for layer in value.layers]
        return _NewCache(template, changes)
    if isinstance(value, dict):
        return _Mapping(type(value), {name: _give(item, given, outputs) for name, item in value.items()})
    if isinstance(value, (list, tuple)):
        parts = [_give(item, given, outputs) for item in value]
        return _Row(type(value) if type(value) in (list, tuple) else tuple, parts)
    return _Always(value)


def _changes(shell: Any, given: dict[int, int], outputs: list[Any]) -> list[dict[str, Make]]:
    """Per layer, the attributes that the caller's cache must take over."""
    changes = []
    for layer, before in zip_longest(shell.layers, getattr(shell, "_qcompile_before", ()), fillvalue={}):
        mine: dict[str, Make] = {}
        for name, item in sorted(vars(layer).items()):
            if name in before and before[name] is item and not isinstance(item, torch.SymInt):
                continue
            if isinstance(item, Tensor) and id(item) in given:
                continue
            if name != "max_cache_len" and isinstance(item, (Tensor, torch.SymInt, *PLAIN)):
                mine[name] = _give(item, given, outputs)
        changes.append(mine)
    return changes


def _apply_changes(cache: Any, changes: list[dict[str, Make]], *state: Sequence[Any]) -> None:
    while len(cache.layers) < len(changes):  # a dynamic cache that grows its layers as they are met
        cache.layers.append(cache.layer_class_to_replicate())
    for layer, mine in zip(cache.layers, changes, strict=True):
        for name, item in mine.items():
            setattr(layer, name, item(*state))


def _without_tensors(layer: Any) -> Any:
    twin = copy.copy(layer)
    for name, item in list(vars(twin).items()):
        if isinstance(item, (Tensor, torch.SymInt)):
            setattr(twin, name, None)
    return twin
