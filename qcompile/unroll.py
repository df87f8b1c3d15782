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
    with _torch.without_reports():
        captured, tensors, build = capture_call(few, function.__get__(few), kwargs)
    writer = _Writer(captured, model, flat)
    for path, (_, pattern, last) in lists.items():
        layers = model.get_submodule(path)._modules
        writer.write(path, pattern, [key for key in layers if f"{path}.{key}" in twins], last)
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


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


class _Writer:
    """Writes layers into a graph, a layer's nodes after those of the one before."""

    def __init__(self, captured: Captured, model: nn.Module, flat: calls.Flat):
        self.model, self.flat = model, flat
        self.graph = captured.gm.graph
        self.inputs = dict(zip(self.graph.find_nodes(op="placeholder"), captured.inputs, strict=True))
        self.users = {given.user: node for node, given in self.inputs.items()}

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
                return self._cached(given.user, other.user, path, pattern, key, last)
        raise CaptureError(f"layers {pattern} and {last} of {path} read {a.name} and {b.name}")

    def _weight(self, like: Node, path: str) -> Node:
        """The weight or buffer `path` as an input of the graph."""
        with self.graph.inserting_after(like):
            node = self.graph.placeholder(f"p_{path.replace('.', '_')}")
        val = value(like)
        with val.fake_mode:
            fake = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        node.meta |= like.meta | {"val": fake, "input_path": path}
        self.inputs[node] = Input(path=path)
        return node

    def _cached(self, user: int, other: int, path: str, pattern: str, key: str, last: str) -> Node:
        """The tensor of the cache that layer `key` has where `pattern` has `user` and `last` has `other`."""
        (mine, rest), (its, _), (new, same) = (self.flat.layers[int(each)] for each in (pattern, last, key))
        numbers = [vars(m).get(NUMBER, int(key)) for m in self.model.get_submodule(f"{path}.{key}").modules()]
        place = user - mine.start
        if user not in mine or other != its.start + place or {*numbers} != {int(key)} or rest != same:
            raise CaptureError(f"the cache has no layer {key} like layer {pattern} of {path}")
        x, y = self.flat.tensors[user], self.flat.tensors[new.start + place]
        if x.shape != y.shape or x.stride() != y.stride():
            raise CaptureError(f"layers {pattern} and {key} of the cache are of different sizes")
        node = self.users[new.start + place]
        fake, like = value(node), value(self.users[user])
        for size, known in zip((*fake.shape, *fake.stride()), (*like.shape, *like.stride()), strict=True):
            torch._check(size == known)  # torch has not met it yet, and holds its sizes for symbols of their own
        return node


def _rename(node: Node, like: Node, old: str, new: str) -> None:
    node.meta["module_path"] = new + module_path(like).removeprefix(old)
