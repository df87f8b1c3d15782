"""A model with its layers of each kind left out but for two: what it does with their parameters is seen on these."""

from __future__ import annotations

import copy
import functools
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.layer_loop import NUMBER, Loop, loop_over, mentions, numbers_only_caches

# What nn.Module keeps apart from attributes.
_CONTENTS = ("_parameters", "_buffers", "_modules", NUMBER)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def few_layers(model: nn.Module, first: int = 1) -> tuple[nn.Module, dict[str, str]]:
    """A copy of the modules, over the same tensors, whose lists keep so many `first` layers of each kind and the last,
    under their names; and for the path of each layer that is left out that of the first of its kind.

    Layers are of one kind whose modules have the same classes, equal attributes and the same types of parameters:
    plain data is equal by value, all else, tensors in attributes included, is equal only to itself. A list stays whole
    unless code shows that its layers are called one after the other, each alike, and that their own numbers tell them
    only their places in a cache.
    """
    twins: dict[str, str] = {}
    if any("forward" in vars(module) for module in model.modules()):  # bound to this model
        return model, twins
    return _Thinner(model, twins, first).copied(model, ""), twins


class _Thinner:
    def __init__(self, model: nn.Module, twins: dict[str, str], first: int):
        self._twins, self._first = twins, first
        self._modules = list(model.modules())
        self._uses = _uses(model)

    def copied(self, module: nn.Module, path: str) -> nn.Module:
        """`module` itself where nothing is left out."""
        twin = module
        for name, child in module._modules.items():
            place = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList):
                twin = self._with_few(twin, name, child, place)
            elif child is not None and (new := self.copied(child, place)) is not child:
                twin = _with(twin, {**twin._modules, name: new})
        return twin

    def _with_few(self, owner: nn.Module, name: str, layers: nn.ModuleList, path: str) -> nn.Module:
        loop = self._loop(owner, name, layers)
        if loop is None or not all(numbers_only_caches(type(m), NUMBER) for m in layers.modules()):
            return owner
        types = vars(vars(owner)["config"])["layer_types"] if loop.by_type else [None] * len(layers)
        kinds: dict[Any, list[str]] = {}
        for (key, layer), layer_type in zip(layers._modules.items(), types, strict=True):
            kinds.setdefault((layer_type, _kind(layer, self._uses)), []).append(key)
        out = {key: keys[0] for keys in kinds.values() for key in keys[self._first : -1]}
        if not out:
            return owner
        self._twins |= {f"{path}.{key}": f"{path}.{first}" for key, first in out.items()}
        kept = {key: layer for key, layer in layers._modules.items() if key not in out}
        twin = _with(owner, {**owner._modules, name: _with(layers, kept)})
        if loop.by_type:
            here = [each for key, each in zip(layers._modules, types, strict=True) if key in kept]
            vars(twin)["config"] = config = copy.copy(vars(owner)["config"])
            vars(config)["layer_types"] = here + list(types[len(here) :])
        return twin

    def _loop(self, owner: nn.Module, name: str, layers: nn.ModuleList) -> Loop | None:
        """How `owner` goes through all these layers, where that is plain to see and nobody else touches them."""
        loop, config = loop_over(type(owner), name), vars(owner).get("config")
        if owner._forward_hooks or owner._forward_pre_hooks:
            return None
        if loop is None or any(mentions(type(m), name) for m in self._modules if name not in m._modules):
            return None
        if loop.sliced and (getattr(config, "num_hidden_layers", None) or 0) < len(layers):
            return None
        if loop.by_type and len(getattr(config, "__dict__", {}).get("layer_types") or ()) != len(layers):
            return None
        return loop


def _with(module: Any, children: dict[str, Any]) -> Any:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = children
    return twin


def _uses(module: nn.Module) -> Counter[int]:
    """By how many names each parameter and buffer is known."""
    names = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return Counter(id(x) for _, x in chain(*names))


def _kind(layer: nn.Module | None, uses: Mapping[int, int]) -> Any:
    """`uses` are the whole model's: what others have, too, is equal only to itself."""
    if layer is None:
        return None
    mine, numbers = _uses(layer), {}

    def held(x: Tensor | None) -> Any:
        if x is None:
            return None
        number = numbers.setdefault(id(x), len(numbers))  # which names of the layer are one tensor
        return type(x), x.dtype, x.device, x.shape, x.stride(), number, mine[id(x)] != uses[id(x)] and id(x)

    return tuple(
        (name, type(module))
        + tuple((key, _value(x)) for key, x in vars(module).items() if key not in _CONTENTS)
        + tuple((key, held(x)) for key, x in (*module._parameters.items(), *module._buffers.items()))
        for name, module in layer.named_modules(remove_duplicate=False)
    )


def _value(x: Any) -> Any:
    """Equal for what a forward cannot tell apart."""
    if type(x) in _PLAIN:
        return type(x), x
    if type(x) in (tuple, list, torch.Size):
        return type(x), tuple(map(_value, x))
    if type(x) in (dict, OrderedDict):
        return type(x), tuple((_value(key), _value(each)) for key, each in x.items())
    if type(x) in (set, frozenset):
        return type(x), frozenset(map(_value, x))
    if type(x) is functools.partial:
        return type(x), id(x.func), _value(x.args), _value(x.keywords)
    if is_dataclass(x) and hasattr(x, "__dict__"):
        return type(x), _value(vars(x))
    if isinstance(x, Tensor) and x.numel() == 0:  # its type is all that it says
        return type(x), x.dtype, x.device, x.shape
    return type(x), id(x)
