"""A call captured with few of a model's layers, and the others written after them.

    %b = linear(%a, layers.0.w)                           %b = linear(%a, layers.0.w)
    %c = linear(%b, layers.1.w)                           %c = linear(%b, layers.1.w)
                                                          %e = linear(%c, layers.2.w)
    %d = linear(%c, layers.3.w)                           %d = linear(%e, layers.3.w)

To trace a layer takes torch a quarter of a second, to write it down a hundredth of that. Which layers give the same
nodes is few_layers' to know; it reads code, which can be written to deceive it, so this is for code that is known.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from qcompile import _torch, calls
from qcompile.errors import CaptureError
from qcompile.few_layers import few_layers
from qcompile.graph.capture import Captured, Input
from qcompile.graph.match import module_path, value
from qcompile.graph.repeat import Stretch, correspond, externals
from qcompile.layer_loop import NUMBER
from qcompile.step import Forward, capture_call

log = logging.getLogger(__name__)

# Whose code is known to tell layers apart by nothing that few_layers does not see.
_KNOWN = ("torch.", "transformers.", "qcompile.")


def capture_unrolled(
    model: nn.Module, forward: Forward, kwargs: Mapping[str, Any]
) -> tuple[Captured, list[Tensor], Any]:
    """As step.capture_call; with few of the layers wherever the others can be written after them."""
    function = getattr(forward, "__func__", None)
    if function is not None and function is type(model).forward:
        bare = copy.copy(model)
        vars(bare).pop("forward", None)  # an optimized model's, which stands for the class' own
        try:
            return _captured(bare, function, kwargs)
        except CaptureError as error:
            log.info("qcompile: captured with all layers: %s", error)
    return capture_call(model, forward, kwargs)


def _captured(
    model: nn.Module, function: Callable[..., Any], kwargs: Mapping[str, Any]
) -> tuple[Captured, list[Tensor], Any]:
    """Raises CaptureError where a layer cannot be written like another."""
    few, twins = few_layers(model, first=2)
    lists = {path: list(few.get_submodule(path)._modules) for path in dict.fromkeys(map(_parent, twins))}
    flat, _ = calls.flatten(dict(kwargs))
    if (stranger := _stranger(model)) is not None:
        raise CaptureError(f"{stranger} may tell layers apart in ways that nobody has looked at")
    if not lists or any(len(kept) != 3 for kept in lists.values()):
        raise CaptureError("there are no layers alike, or layers of two kinds")
    if len(flat.caches) > 1 or not all(map(calls.is_static, flat.caches)):
        raise CaptureError("what a layer adds to a cache is a tensor of its own")
    out = {path: [key for key in model.get_submodule(path)._modules if f"{path}.{key}" in twins] for path in lists}
    spare = {
        place: like
        for path, (_, pattern, _) in lists.items()
        for key in out[path]
        for place, like in _spare(model.get_submodule(f"{path}.{key}"), flat, int(key), int(pattern)).items()
    }
    if any(_torch.in_one_memory(flat.tensors[x], y) for x in spare for i, y in enumerate(flat.tensors) if i != x):
        raise CaptureError("layers of the cache share memory")
    with _torch.without_reports():
        captured, tensors, build = capture_call(few, function.__get__(few), kwargs, spare)
    writer = _Writer(captured, flat, spare)
    for path, (_, pattern, last) in lists.items():
        writer.write(path, pattern, out[path], last)
    inputs = tuple(writer.inputs[node] for node in captured.gm.graph.find_nodes(op="placeholder"))
    return Captured(captured.gm, inputs), tensors, build


def _stranger(model: nn.Module) -> str | None:
    """Code in the model that is neither torch's nor transformers': a class, or an attention that is registered."""
    registry: Any = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    for module in model.modules():
        name = getattr(vars(module).get("config"), "_attn_implementation", None)
        for code in (type(module), registry.get(name)):
            if code is not None and not code.__module__.startswith(_KNOWN):
                return f"{code.__module__}.{code.__qualname__}"
    return None


def _spare(layer: nn.Module, flat: calls.Flat, key: int, pattern: int) -> dict[int, int]:
    """The tensors that layer `key` has in the cache, each with the one that layer `pattern` has, which it is like."""
    numbers = {vars(module)[NUMBER] for module in layer.modules() if NUMBER in vars(module)}
    if not numbers or not flat.layers:
        return {}
    if numbers != {key} or key >= len(flat.layers) or flat.layers[key][1] != flat.layers[pattern][1]:
        raise CaptureError(f"the cache has no layer {key} like layer {pattern}")
    found = dict(zip(flat.layers[key][0], flat.layers[pattern][0], strict=True))
    for x, y in ((flat.tensors[place], flat.tensors[like]) for place, like in found.items()):
        if x.shape != y.shape or x.stride() != y.stride():
            raise CaptureError(f"layers {pattern} and {key} of the cache are of different sizes")
    return found


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


class _Writer:
    """Writes layers into a graph, a layer's nodes after those of the one before. `spare` are the places of tensors that
    are no inputs yet, each with that of one that it is like."""

    def __init__(self, captured: Captured, flat: calls.Flat, spare: Mapping[int, int]):
        self.flat, self.spare = flat, spare
        self.graph = captured.gm.graph
        self.inputs = dict(zip(self.graph.find_nodes(op="placeholder"), captured.inputs, strict=True))
        self.users = {given.user: node for node, given in self.inputs.items() if given.user is not None}
        for place, like in sorted(spare.items()):  # inputs stay in the order of the caller's tensors
            name = f"{self.users[like].name}_{place}"
            self.users[place] = self._input(self.users[like], self.users[place - 1], name, Input(user=place))

    def write(self, path: str, pattern: str, keys: Sequence[str], last: str) -> None:
        """Write the layers `keys` of a list after its layer `pattern`, which they are like, and before `last`."""
        nodes, ending = self._layers(f"{path}.{pattern}")
        if not nodes or len(nodes) != len(ending) or not correspond(nodes, ending):
            raise CaptureError(f"layers {pattern} and {last} of {path} differ")
        known = {*nodes, *ending}
        if any(user not in known for node in nodes for user in node.users):
            raise CaptureError(f"more than the layer after it reads layer {pattern} of {path}")
        pairs = list(zip(externals(nodes), externals(ending), strict=True))
        before = {node: node for node in nodes}
        for key in keys:
            here = {a: before[b] if b in before else self._outside(a, b, path, pattern, key, last) for a, b in pairs}
            with self.graph.inserting_before(ending[0]):
                for node in nodes:
                    here[node] = self.graph.node_copy(node, here.__getitem__)
                    _rename(here[node], node, f"{path}.{pattern}", f"{path}.{key}")
            before = {node: here[node] for node in nodes}
        for node, like in zip(ending, nodes, strict=True):
            _rename(node, like, f"{path}.{pattern}", f"{path}.{last}")
            for each in node.all_input_nodes:
                node.replace_input_with(each, before.get(each, each))

    def _layers(self, path: str) -> tuple[Stretch, Stretch]:
        """The calls of a layer, and as many that follow."""
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        places = [i for i, node in enumerate(calls) if f"{module_path(node)}.".startswith(f"{path}.")]
        first, end = min(places, default=0), max(places, default=-1) + 1
        return tuple(calls[first:end]), tuple(calls[end : 2 * end - first])

    def _outside(self, a: Node, b: Node, path: str, pattern: str, key: str, last: str) -> Node:
        """What layer `key` reads where `pattern` reads `a` and `last` reads `b`."""
        given, other = self.inputs.get(a), self.inputs.get(b)
        if a is b and not (given and given.path and given.path.startswith(f"{path}.")):
            return a
        if isinstance(value(a), torch.SymInt) and str(value(a)) == str(value(b)):
            return a
        if given and other:
            if given.path and other.path and given.path.startswith(f"{path}.{pattern}."):
                name = given.path.removeprefix(f"{path}.{pattern}")
                if other.path == f"{path}.{last}{name}":
                    return self._weight(a, f"{path}.{key}{name}")
            if given.user is not None and other.user is not None:
                return self._cached(given.user, other.user, pattern, key, last)
        raise CaptureError(f"layers {pattern} and {last} of {path} read {a.name} and {b.name}")

    def _weight(self, like: Node, path: str) -> Node:
        """The weight or buffer `path` as an input of the graph."""
        node = self._input(like, like, f"p_{path.replace('.', '_')}", Input(path=path))
        node.meta["input_path"] = path
        return node

    def _input(self, like: Node, before: Node, name: str, given: Input) -> Node:
        """One more input of the graph, of the type of `like`, behind the input `before`."""
        with self.graph.inserting_after(before):
            node = self.graph.placeholder(name)
        val = value(like)
        with val.fake_mode:
            fake = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        node.meta |= like.meta | {"val": fake}
        self.inputs[node] = given
        return node

    def _cached(self, user: int, other: int, pattern: str, key: str, last: str) -> Node:
        """The tensor of the cache that layer `key` has where `pattern` has `user` and `last` has `other`."""
        mine, its, new = (self.flat.layers[int(each)][0] for each in (pattern, last, key))
        place = user - mine.start
        if user not in mine or other != its.start + place or self.spare.get(new.start + place) != user:
            raise CaptureError(f"the cache has no layer {key} like layer {pattern}")
        return self.users[new.start + place]


def _rename(node: Node, like: Node, old: str, new: str) -> None:
    node.meta["module_path"] = new + module_path(like).removeprefix(old)
