"""A model with its layers of each kind left out but for two: what it does with their parameters is seen on these."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

# What tells layers of one kind apart.
_NUMBER = "layer_idx"
_PLAIN = (type(None), bool, int, float, str)


def few_layers(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy of the modules, over the same tensors, whose lists keep the first and the last layer of each kind, under
    their names; and for the path of each layer that is left out that of the first of its kind.

    Layers are of one kind whose modules have the same classes, the same plain attributes and the same types of
    parameters. A forward that counts its layers may fail on the copy.
    """
    twins: dict[str, str] = {}
    return _copied(model, "", twins), twins


def _copied(module: nn.Module, path: str, twins: dict[str, str]) -> nn.Module:
    """`module` itself where nothing is left out."""
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        place = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            children[name] = _thinned(child, place, twins)
        else:
            children[name] = child and _copied(child, place, twins)
    return module if children == module._modules else _with_children(module, children)


def _thinned(layers: nn.ModuleList, path: str, twins: dict[str, str]) -> nn.ModuleList:
    kinds: dict[Any, list[str]] = {}
    for name, layer in layers._modules.items():
        kinds.setdefault(_kind(layer), []).append(name)
    out = {name: first for first, *others in kinds.values() for name in others[:-1]}
    twins |= {f"{path}.{name}": f"{path}.{first}" for name, first in out.items()}
    kept = {name: layer for name, layer in layers._modules.items() if name not in out}
    return _with_children(layers, kept) if out else layers


def _with_children(module: Any, children: dict[str, Any]) -> Any:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = children
    return twin


def _kind(layer: nn.Module | None) -> Any:
    if layer is None:
        return None
    return tuple(
        (name, type(module), tuple((key, _attribute(x)) for key, x in vars(module).items() if key != _NUMBER))
        + tuple((key, _attribute(x)) for key, x in (*module._parameters.items(), *module._buffers.items()))
        for name, module in layer.named_modules()
    )


def _attribute(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.device, x.shape
    return (type(x), x) if isinstance(x, _PLAIN) else type(x)
