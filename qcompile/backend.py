"""`torch.compile(model, backend="qcompile")`: the same passes on the graphs that Dynamo captures.

The model stays float. The compiled callable exchanges the float parameters among its inputs for packed ones; a
parameter that was edited or replaced since is packed again before the call.

Edits in place are noticed by a tensor's version counter. Tensors made under torch.inference_mode() have none, and a
checksum would read every float weight at every call, which is what packing saves. So of those only the exchange is
noticed, of the tensor or of its memory, and a warning says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import _torch
from qcompile.algorithms import quantize
from qcompile.config import Config
from qcompile.errors import ConfigError
from qcompile.graph.capture import retrace
from qcompile.graph.dump import type_text
from qcompile.graph.rewrite import Rewriter
from qcompile.normal import normalize
from qcompile.ops.linear import dequantize
from qcompile.pipeline import Pipeline
from qcompile.plan import Entry, Plan, plan_graph
from qcompile.quant.spec import QSpec
from qcompile.regions import compile_graph
from qcompile.stores import PackedWeight

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def qcompile_backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Dynamo's entry. `options` are fields of Config, `mode` is one of torch.compile's; ConfigError names any other."""
    config = Config.of(dict(options or {}))
    if mode is not None and mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    patches = _torch.mode_options(mode)
    trainable = any(isinstance(x, nn.Parameter) and x.requires_grad for x in example_inputs)
    if torch.is_grad_enabled() and trainable:
        warnings.warn(
            "qcompile: gradients are on, so this graph is compiled in float; call the model under torch.no_grad()",
            stacklevel=2,
        )
        return _torch.inductor_training(gm, example_inputs, patches)
    _settle_floats(gm)
    normal = retrace(gm)
    normalize(normal.graph)
    weights = {index: x for index, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)}
    placeholders = normal.graph.find_nodes(op="placeholder")
    for index in weights:
        placeholders[index].meta["input_path"] = _path(gm, index)
    plan = plan_graph({placeholders[index]: weight for index, weight in weights.items()}, config)
    if config.strict:
        plan.insist()
    inputs, packed = _exchange(normal, plan, config, example_inputs, placeholders)
    if uncounted := sum(weight.is_inference() for group in packed for weight, _ in group.seen):
        warnings.warn(
            f"qcompile: {uncounted} weights were made under torch.inference_mode(), so edits of them in place will not "
            "be noticed; load the model outside of it, or call torch.compiler.reset() after an edit",
            stacklevel=2,
        )
    users = [node.meta["val"] for index, node in enumerate(placeholders) if index not in weights]
    symbols: dict[str, str] = {}
    outcome = Pipeline.of(config).transform(normal, " ".join(type_text(user, symbols) for user in users))
    if config.strict:
        outcome.insist()
    fakes = [node.meta["val"] for node in normal.graph.find_nodes(op="placeholder")]
    return _Exchanged(compile_graph(normal, fakes, patches), inputs, packed)


def _settle_floats(gm: GraphModule) -> None:
    """With dynamic=True a module's floats, as a norm's epsilon, are inputs. Patterns know numbers, and Inductor refuses
    inputs that are read by `item`: they are what they are now, and Dynamo's guards see them change."""
    for node in gm.graph.find_nodes(op="call_method", target="item"):
        if isinstance(number := node.meta.get("example_value"), torch.SymFloat):
            node.replace_all_uses_with(float(number))  # type: ignore[arg-type]
            gm.graph.erase_node(node)
    gm.recompile()


@dataclass
class _Packed:
    """A store and the float parameters it was made of: their places among the caller's inputs, and their states."""

    entries: tuple[Entry, ...]
    places: list[int]
    store: PackedWeight
    config: Config
    seen: list[tuple[Tensor, tuple[int, int]]]

    def refresh(self, args: Sequence[Any]) -> None:
        """Pack again if a parameter is another tensor than last time or was written to."""
        if all(args[i] is tensor and _state(tensor) == state for i, (tensor, state) in zip(self.places, self.seen)):
            return
        fresh = _pack(self.entries, [args[i] for i in self.places], self.config)
        for name, buffer in fresh.named_buffers():
            self.store.get_buffer(name).copy_(buffer)
        self.seen = [(args[i], _state(args[i])) for i in self.places]


@dataclass
class _Exchanged:
    """The callable that Dynamo calls: float inputs in, compiled program on packed ones."""

    run: Callable[..., Any]
    inputs: list[int | Tensor]
    packed: list[_Packed]

    def __call__(self, *args: Any) -> Any:
        for packed in self.packed:
            packed.refresh(args)
        with torch.no_grad():
            return self.run(*[args[given] if isinstance(given, int) else given for given in self.inputs])


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to (unless it counts no writes), and when its `.data` is exchanged."""
    return (-1 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def _pack(entries: Sequence[Entry], weights: Sequence[Tensor], config: Config) -> PackedWeight:
    parts = []
    for entry, weight in zip(entries, weights, strict=True):
        assert isinstance(entry.spec, QSpec)
        weight = weight.detach()
        parts.append(quantize(weight.t() if entry.transposed else weight, entry.spec, config.algorithm))
    return PackedWeight(parts)


def _exchange(
    gm: GraphModule, plan: Plan, config: Config, example_inputs: Sequence[Any], placeholders: Sequence[Node]
) -> tuple[list[int | Tensor], list[_Packed]]:
    """Replace float weight inputs by packed ones in the graph; returns where each input of the new graph comes from."""
    index_of = {node.meta.get("input_path"): index for index, node in enumerate(placeholders)}
    inputs: dict[Node, int | Tensor] = {node: index for index, node in enumerate(placeholders)}
    first, g, packed = next(n for n in gm.graph.nodes if n.op != "placeholder"), Rewriter(gm.graph, "exchange"), []
    mode = _torch.fake_mode_of([node.meta["val"] for node in placeholders])
    for entries in plan.groups:
        places = [index_of[entry.path] for entry in entries]
        weights = [example_inputs[place] for place in places]
        store = _pack(entries, weights, config)
        packed.append(_Packed(entries, places, store, config, [(weight, _state(weight)) for weight in weights]))
        nodes = {}
        for name, buffer in store.named_buffers():
            with gm.graph.inserting_before(placeholders[places[0]]):
                node = gm.graph.placeholder(f"{placeholders[places[0]].name}_{name.replace('.', '_')}")
            node.meta.update(
                val=mode.from_tensor(buffer, static_shapes=True), input_path=f"{entries[0].path}.{name}", module_path=""
            )
            inputs[node] = buffer
            nodes[name] = node
        start = 0
        for entry, place in zip(entries, places, strict=True):
            with g.before(first):
                weight = _unpack(g, store, nodes, start, entry)
            g.replace(placeholders[place], weight)
            gm.graph.erase_node(placeholders[place])
            del inputs[placeholders[place]]
            start += entry.matrix[0]
    gm.graph.lint()
    gm.recompile()
    return [inputs[node] for node in gm.graph.find_nodes(op="placeholder")], packed


def _unpack(g: Rewriter, store: PackedWeight, nodes: Mapping[str, Node], start: int, entry: Entry) -> Node:
    """The float weight of one entry, as a node over its rows of the store."""
    rows, total = entry.matrix[0], store.data.shape[0]

    def part(name: str) -> Node | None:
        if f"{name}.data" in nodes:  # quantized scales
            nested = getattr(store, name)
            sides = [nodes.get(f"{name}.{side}") for side in ("data", "scale", "zero")]
            shape = [nested.data.shape[0], nested.columns]
            return g.call(dequantize.overload, *sides, nested.spec, shape, torch.float32)
        node = nodes.get(name)
        if node is None or rows == total or node.meta["val"].shape[0] != total:
            return node
        return g.call(torch.ops.aten.narrow.default, node, 0, start, rows)

    sides = [part(name) for name in ("data", "scale", "zero")]
    weight = g.call(dequantize.overload, *sides, store.spec, list(entry.matrix), entry.dtype)
    return g.call(torch.ops.aten.transpose.int, weight, 0, 1) if entry.transposed else weight


def _path(gm: GraphModule, index: int) -> str:
    """The dotted path of an input of Dynamo's: L['self']._modules['a']._parameters['weight'] is a.weight."""
    node = gm.graph.find_nodes(op="placeholder")[index]
    source = _torch.source_name(node)
    parts = re.findall(r"(?:_modules|_parameters|_buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)", source)
    names = [a or b for a, b in parts if (a or b) not in ("_modules", "_parameters", "_buffers")]
    return ".".join(names) or node.name
