"""From a module to one normal form, from both entrances.

The normal form is ATen before decomposition: `aten.linear`, `silu` and `scaled_dot_product_attention` are single nodes.
Every node has meta["val"] (its fake value) and meta["module_path"] (the dotted module that made it), every weight is an
input with meta["input_path"], and inputs that are one tensor are one input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from qcompile import _torch
from qcompile.errors import CaptureError
from qcompile.graph.match import argument, aten, is_call, value


@dataclass(frozen=True)
class Input:
    """One input of a captured graph: a weight by its dotted path, a constant by value, or the caller's tensor."""

    path: str | None = None
    constant: Tensor | None = None
    user: int | None = None


@dataclass(frozen=True)
class Captured:
    """A graph in normal form and where its inputs come from, in order."""

    gm: GraphModule
    inputs: tuple[Input, ...]

    @property
    def fakes(self) -> list[Any]:
        return [node.meta["val"] for node in self.gm.graph.find_nodes(op="placeholder")]


def export(module: nn.Module, tensors: Sequence[Tensor], prefix: str = "", name: str = "") -> Captured:
    """Capture `module(*tensors)` ahead of time. Sizes above 1 are symbolic unless the module's code fixes them.

    `prefix` is cut from the front of every module and weight path; `name` is what errors call the module.

    Raises CaptureError with torch's reason where the forward depends on tensor values or leaves the traceable world.
    """
    auto = torch.export.Dim.AUTO
    # Sizes 0 and 1 are always fixed: torch specializes on them, and warns if asked not to.
    shapes = tuple({dim: auto for dim, size in enumerate(tensor.shape) if size > 1} for tensor in tensors)
    try:
        with torch.no_grad(), _torch.tracing_in_this_thread():
            program = torch.export.export(module, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
            _settle_copies(program.graph_module)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(f"{name or type(module).__name__}.forward could not be captured: {reason}") from error
    gm = program.graph_module
    kinds = torch.export.graph_signature.InputKind
    real = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    inputs: list[Input] = []
    seen: dict[int, Node] = {}
    users = 0
    for spec, node in zip(program.graph_signature.input_specs, gm.graph.find_nodes(op="placeholder"), strict=True):
        target, constant = spec.target or "", None
        if spec.kind in (kinds.PARAMETER, kinds.BUFFER):
            node.meta["input_path"] = target.removeprefix(prefix)
            tensor = real.get(target)
            if tensor is not None and (first := seen.setdefault(id(tensor), node)) is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)
                continue
            if tensor is None:
                constant = program.constants.get(target)
            inputs.append(Input(path=target.removeprefix(prefix)) if constant is None else _constant(constant))
        elif spec.kind == kinds.CONSTANT_TENSOR:
            inputs.append(_constant(program.constants[target]))
        elif spec.kind == kinds.USER_INPUT:
            inputs.append(Input(user=users))
            users += 1
        else:
            raise CaptureError(f"{type(module).__name__}.forward: input {node.name} is a {spec.kind.name}")
    names = [name.removeprefix(prefix) for name, _ in module.named_modules() if name.startswith(prefix)]
    _name_modules(gm, prefix, set(names))
    gm.recompile()
    return Captured(gm, tuple(inputs))


def _constant(value: Any) -> Input:
    return Input(constant=value)


def retrace(gm: GraphModule) -> GraphModule:
    """Bring a graph of Dynamo's into normal form; its placeholders stay, in order."""
    fakes = _torch.dynamo_fakes(gm)
    traced = _torch.trace(torch.fx.Interpreter(gm).run, fakes, pre_dispatch=True)
    _settle_copies(traced)
    _name_modules(traced)
    return traced


def _settle_copies(gm: GraphModule) -> None:
    """index_copy's source has the sizes of its target but for the one dimension. torch 2.11 does not conclude that: the
    heads of a key/value cache would be a symbol. Raises RuntimeError where they differ, as the op does."""
    for node in gm.graph.nodes:
        if not is_call(node, aten.index_copy_.default, aten.index_copy.default):
            continue
        x, dim, source = value(node), argument(node, 1, "dim"), value(argument(node, 3, "source"))
        if 0 < x.dim() == source.dim():
            for axis in set(range(x.dim())) - {dim % x.dim()}:
                torch._check(x.shape[axis] == source.shape[axis])


class Inliner:
    """Replaces calls by the graphs of functions. A function is traced once for all calls whose arguments agree in
    everything but their values: the layers of a model repeat."""

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self._traces: dict[Any, GraphModule] = {}

    def inline(self, node: Node, function: Callable[..., Any]) -> list[Node]:
        """Replace `node` by the graph of `function` on the same arguments; returns the new nodes.

        Arguments that are not nodes are constants of the traced function.
        """
        flat, spec = tree_flatten((node.args, node.kwargs))
        places = [index for index, arg in enumerate(flat) if isinstance(arg, Node)]
        key = (function, spec, *(_kind(arg) for arg in flat))
        if key not in self._traces:

            def on_values(*values: Any) -> Any:
                full = list(flat)
                for index, given in zip(places, values, strict=True):
                    full[index] = given
                args, kwargs = tree_unflatten(full, spec)
                return function(*args, **kwargs)

            # Calls of one trace share its fake values, and a value that is given twice would be one argument.
            values = (flat[index].meta["val"] for index in places)
            given = [value.detach() if isinstance(value, Tensor) else value for value in values]
            self._traces[key] = _torch.trace(on_values, given)
        return self._splice(node, self._traces[key], [flat[index] for index in places])

    def _splice(self, node: Node, traced: GraphModule, arguments: Sequence[Node]) -> list[Node]:
        graph, given, made = self.gm.graph, iter(arguments), []
        env: dict[Node, Any] = {}
        with graph.inserting_before(node):
            for inner in traced.graph.nodes:
                if inner.op == "placeholder":
                    env[inner] = next(given)
                elif inner.op == "output":
                    result: Any = map_arg(inner.args[0], lambda n: env[n])
                elif inner.op == "get_attr":
                    name = f"_const_{node.name}_{inner.target}"
                    self.gm.register_buffer(name, getattr(traced, inner.target), persistent=False)
                    env[inner] = graph.get_attr(name)
                    env[inner].meta["val"] = inner.meta.get("val", getattr(traced, inner.target))
                else:
                    env[inner] = graph.node_copy(inner, lambda n: env[n])
                    env[inner].meta["module_path"] = node.meta.get("module_path", "")
                    made.append(env[inner])
        if isinstance(result, (list, tuple)):
            for user in list(node.users):
                index: Any = user.args[1]
                user.replace_all_uses_with(result[index])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(result)
        graph.erase_node(node)
        return made


def _kind(arg: Any) -> Any:
    """What a trace depends on of an argument."""
    if not isinstance(arg, Node):
        return type(arg), arg
    val = arg.meta["val"]
    if not isinstance(val, Tensor):
        return str(val)
    return val.dtype, val.device, str(tuple(val.shape)), str(val.stride())


# Dynamo's `L['self'].`, torch.export's own wrapper, and slices of a ModuleList, which torch writes into the path.
_NOISE = re.compile(r"^L\['(?:self|fn)'\]\.|^_empty_nn_module_stack.*|slice\([^)]*\)\.")


def _name_modules(gm: GraphModule, prefix: str = "", known: Collection[str] = ()) -> None:
    """meta["module_path"] from torch's module stack: the dotted path inside the model.

    torch.export does not always put the wrapper's name in front, so `prefix` goes only where a known module is left.
    """
    for node in gm.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = _NOISE.sub("", str(stack[-1][0])) if stack else ""
        short = path.removeprefix(prefix) if path != prefix.rstrip(".") else ""
        node.meta["module_path"] = path if path in known and short not in known else short
