"""What each parameter is to its model.

The model's forward is captured once on fake tensors; roles and siblings are read off the graph, not off names. Where a
forward cannot be captured (no example inputs, say), the module tree decides and the source says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from qcompile import _torch
from qcompile.errors import CaptureError, UnsupportedError
from qcompile.few_layers import few_layers
from qcompile.graph.match import argument, aten, is_call, value
from qcompile.normal import normalize
from qcompile.ops.codebook import dequantize_codebook
from qcompile.ops.linear import dequantize, reorder
from qcompile.shelf import Shelf
from qcompile.step import capture_call
from qcompile.storage import data_path

log = logging.getLogger(__name__)

# A linear smaller than this saves nothing worth a kernel.
TINY = 1024

# Parameters in the model's order, each with all its names.
Names = Sequence[tuple[Tensor, tuple[str, ...]]]
Stated = Callable[[str], Any]


@dataclass(frozen=True)
class Role:
    """`transposed`: stored as (in_features, out_features). `reads`: what siblings must have in common, or None."""

    name: str
    transposed: bool = False
    reads: Any = None


def find_roles(
    model: nn.Module,
    names: Names,
    example: Mapping[str, Any] | None,
    stated: Stated = lambda module: None,
    disk_cache: bool = False,
) -> tuple[dict[str, Role], str]:
    """The role of every parameter, by the first of its names, and where the roles come from.

    `stated(module)` is what someone says that a linear reads; it counts where there is no graph.
    """
    why = "pass example inputs to find sibling layers"
    if example is not None:
        try:
            kinds, paths = {name: _kind(x) for name, x in example.items()}, [paths for _, paths in names]
            shelf = Shelf("roles", model, model.forward, kinds, paths, off=not disk_cache)
            return shelf.recall(lambda: _captured_roles(model, names, example)), "graph"
        except (CaptureError, UnsupportedError) as error:
            why = str(error)
    roles = roles_by_type(model, names, stated)
    by_hand = " and modules_to_fuse" if any(role.reads for role in roles.values()) else ""
    return roles, f"module types{by_hand}: {why}"


def _kind(x: Any) -> Any:
    """What a capture depends on of an argument."""
    return (x.dtype, x.device, *x.shape, *x.stride()) if isinstance(x, Tensor) else x


def _captured_roles(model: nn.Module, names: Names, example: Mapping[str, Any]) -> dict[str, Role]:
    few, twins = few_layers(model)
    if twins:
        try:
            with _torch.without_reports():
                roles = _roles_of(few, names, example)
        except CaptureError as error:
            log.info("qcompile: captured with all layers: %s", error)
        else:
            return roles | _roles_of_twins(names, roles, twins)
    return _roles_of(model, names, example)


def _roles_of_twins(names: Names, roles: Mapping[str, Role], twins: Mapping[str, str]) -> dict[str, Role]:
    """The roles of parameters in layers that were left out."""
    known = {path: roles[paths[0]] for _, paths in names for path in paths}
    found = {}
    for _, (path, *_) in names:
        if layer := next((layer for layer in _above(path) if layer in twins), None):
            role = known[twins[layer] + path.removeprefix(layer)]
            found[path] = replace(role, reads=role.reads and (layer, role.reads))
    return found


def _above(path: str) -> Iterator[str]:
    """The modules that a parameter is in, the nearest first."""
    while path := path.rpartition(".")[0]:
        yield path


def _roles_of(model: nn.Module, names: Names, example: Mapping[str, Any]) -> dict[str, Role]:
    captured, _, _ = capture_call(model, model.forward, example)
    normalize(captured.gm.graph)
    nodes = captured.gm.graph.find_nodes(op="placeholder")
    inputs = {n.meta["input_path"]: n for n in nodes if "input_path" in n.meta}
    return roles_in_graph(_weights(inputs, names), names)


def _weights(inputs: Mapping[str, Node], names: Names) -> dict[str, Node]:
    """Where each parameter's float weight is in the graph: an input, or what is unpacked from one."""
    found = {}
    for path in (path for _, paths in names for path in paths):
        if node := inputs.get(path):
            found[path] = node
        elif node := inputs.get(data_path(path)):
            unpacked = [user for user in node.users if is_call(user, dequantize.overload, dequantize_codebook.overload)]
            for user in [
                user for each in unpacked for user in each.users if is_call(user, reorder.overload)
            ] or unpacked:
                found[path] = user
    return found


def roles_in_graph(inputs: Mapping[str, Node], names: Names) -> dict[str, Role]:
    """Roles from a normalized graph whose weight inputs are these nodes, by path."""
    tables = {value(n).shape[0] for n in inputs.values() if any(_use(n, user) == "embedding" for user in n.users)}
    roles = {}
    for tensor, paths in names:
        node = next((inputs[path] for path in paths if path in inputs), None)
        roles[paths[0]] = Role("unused") if node is None else _role(node, tensor, tables)
    return roles


def _role(weight: Node, tensor: Tensor, tables: set[int]) -> Role:
    transposed, users = False, list(weight.users)
    if len(users) == 1 and is_call(users[0], aten.transpose.int):
        transposed, users, weight = True, list(users[0].users), users[0]
    uses = {_use(weight, user) for user in users}
    if "embedding" in uses:
        return Role("embedding")
    if uses != {"linear"} or tensor.dim() != 2:
        return Role(_dense_role(uses, tensor))
    (linear, *more) = users
    rows = tensor.shape[1] if transposed else tensor.shape[0]
    has_bias = argument(linear, 2, "bias") is not None
    reads = (str(linear.args[0]), has_bias, tensor.device) if not more else None
    if _is_router(linear):
        return Role("router", transposed)
    if tensor.numel() < TINY:
        return Role("tiny", transposed)
    if rows in tables and _reaches_output(linear):
        return Role("lm_head", transposed)
    return Role("linear", transposed, reads)


def _use(weight: Node, user: Node) -> str:
    """How `user` uses a weight."""
    if is_call(user, aten.linear.default):
        return "linear" if user.args[1] is weight else "bias"
    if is_call(user, aten.embedding.default):
        return "embedding"
    name = str(user.target)
    if "conv" in name:
        return "conv"
    # A stack of matrices: multiplied as a batch, or one of them picked and multiplied.
    picked = is_call(user, aten.select.int, aten.index.Tensor, aten.transpose.int)
    return "experts" if picked or any(word in name for word in ("bmm", "matmul", "grouped_mm")) else "other"


def _dense_role(uses: set[str], tensor: Tensor) -> str:
    if tensor.dim() >= 3 and uses <= {"conv", "experts"}:
        return uses.pop()
    if tensor.dim() <= 1:
        return "bias" if uses <= {"bias", "conv"} else "norm"
    return uses.pop() if len(uses) == 1 else "other"


_POINTWISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.narrow.default,
}


def _reaches_output(node: Node) -> bool:
    """Whether a node's value is an output of the graph, apart from scaling, capping and reshaping."""
    return any(user.op == "output" or (user.target in _POINTWISE and _reaches_output(user)) for user in node.users)


def _is_router(linear: Node) -> bool:
    """Whether the values decide which experts run: they reach a top-k through pointwise steps."""
    frontier, seen = [linear], set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if is_call(user, aten.topk.default, aten.argsort.default, aten.one_hot.default):
                return True
            if user.target in _POINTWISE or is_call(user, aten.softmax.int, aten.sigmoid.default, aten.add.Tensor):
                frontier.append(user)
    return False


def roles_by_type(model: nn.Module, names: Names, stated: Stated) -> dict[str, Role]:
    """Roles where there is no graph: by the class of the owning module."""
    roles = {}
    for tensor, paths in names:
        module, reads = paths[0].rpartition(".")[0], None
        owners = [model.get_submodule(path.rpartition(".")[0]) for path in paths]
        if any(isinstance(owner, nn.Embedding) for owner in owners):
            name = "embedding"
        elif isinstance(owners[0], nn.Linear) and tensor.dim() == 2:
            name = "tiny" if tensor.numel() < TINY else "linear"
            if name == "linear" and (value_read := stated(module)) is not None:
                reads = (value_read, owners[0].bias is not None, tensor.device)
        else:
            use = "conv" if "Conv" in type(owners[0]).__name__ else "experts" if tensor.dim() >= 3 else "other"
            name = _dense_role({use}, tensor)
        roles[paths[0]] = Role(name, reads=reads)
    if (head := _output_embedding(model)) in roles:
        roles[head] = Role("lm_head" if roles[head].name == "linear" else roles[head].name)
    return roles


def _output_embedding(model: nn.Module) -> str:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")
