"""An in-place op on a value that nothing else sees becomes the op itself.

    y = linear(x, w); z = relu_(y)           ->        y = linear(x, w); z = relu(y)

Why: `nn.ReLU(inplace=True)` and `x.add_(y)` are common, and no other pass has to know the in-place spellings.
What other code can see, such as a write to a cache, stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qcompile.graph.alias import shared_operand
from qcompile.graph.match import aten, is_tensor, only_user, same_type, value
from qcompile.graph.rewrite import Rewriter
from qcompile.graph.spelling import Build, Spelling


class RemoveInPlace:
    name = "remove_in_place"

    def match(self, node: Node) -> Spelling | None:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not is_tensor(node.args[0]):
            return None
        x: Any = node.args[0]
        if x.op != "call_function" or shared_operand(x) is not None or only_user(x) is not node:
            return None
        target = _out_of_place(schema)
        return None if target is None else Spelling(node, _build(node, target))

    def rewrite(self, g: Rewriter, m: Spelling) -> None:
        m.write(g)


def _out_of_place(schema: Any) -> Any:
    """The op whose name lacks the last underscore and that takes the same arguments, or None."""
    name = schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    target = getattr(getattr(aten, name[:-1], None), schema.overload_name or "default", None)
    if target is None or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    same = [a.name for a in target._schema.arguments] == [a.name for a in schema.arguments]
    return target if same else None


def _build(node: Node, target: Any) -> Build:
    def build(g: Rewriter) -> Node:
        new = g.call(target, *node.args, **node.kwargs)
        # In place, the result keeps the dtype of its operand.
        return new if same_type(new, node) else g.call(aten.to.dtype, new, value(node).dtype)

    return build
