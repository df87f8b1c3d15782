"""The calls of a step of decoding that follow one another become one call.

    y = qcompile.fused_linear(x, qkv)                          y = qcompile.chain([x, qkv, …], keys, values, steps)
    q = qcompile.rope_into_cache(parts of y, K, V, …)
    a = qcompile.attention(q, K, V, …)                  ->
    b = qcompile.fused_linear(a, o, residual=x)
    …

Why: each of them forks and joins threads, and is called through Python; of a layer of SmolLM2 that is half the time.

A chain writes to one cache, and ends where anything else reads what its ops have made. Where no kernel for this type of
device has signed up, nothing is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qcompile.graph.alias import aliases, is_written_between
from qcompile.graph.match import aten, is_call, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention
from qcompile.ops.chain import CACHE, Given, Result, Step, chain
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.linear import linear
from qcompile.ops.registry import MEANING, known
from qcompile.ops.rope import rope_into_cache

LINKS = (fused_linear.overload, linear.overload, rope_into_cache.overload, attention.overload)

# A node that shows what a link makes: that link, and where it looks, as a tensor without memory.
Views = dict[Node, tuple[Node, Tensor]]


@dataclass(frozen=True)
class Chained:
    """`root`, the last of the links, is chain of these arguments; `inner` are the others and the views of them."""

    root: Node
    inner: tuple[Node, ...]
    arguments: tuple[Any, ...] = field(hash=False)


class FuseChain:
    name = "fuse_chain"

    def match(self, node: Node) -> Chained | None:
        if not is_call(node, *LINKS) or not chain.serves(value(node).device):
            return None
        links, views = _run(node)
        while len(links) > 1 and _caches(links):
            if _may_join(links, views):
                arguments = _arguments(links, views)
                if chain.choose(*map_arg(arguments, value)).name != MEANING:
                    inner = {view for view, (link, _) in views.items() if link in links[:-1]}
                    return Chained(links[-1], tuple(sorted(inner)), arguments)
            links.pop()
        return None

    def rewrite(self, g: Rewriter, m: Chained) -> None:
        with g.before(m.root):
            g.replace(m.root, g.call(chain.overload, *m.arguments))
        for node in (m.root, *reversed(m.inner)):
            g.erase(node)


def _run(node: Node) -> tuple[list[Node], Views]:
    """Links from this one on, up to what else reads their results and to a second cache; and what shows these."""
    links, views = list[Node](), Views()
    while node.op != "output":
        if is_call(node, *LINKS):
            if (view := _whole(node)) is None or (_caches([node]) and _caches(links)):
                break
            links.append(node)
            views[node] = node, view
        elif not views.keys().isdisjoint(node.all_input_nodes):
            if (found := _view(node, views)) is None:
                break
            views[node] = found
        node = node.next
    return links, views


def _whole(link: Node) -> Tensor | None:
    sizes = [known(size) for size in value(link).shape]
    return None if None in sizes else torch.empty([size or 0 for size in sizes], device="meta")


def _view(node: Node, views: Views) -> tuple[Node, Tensor] | None:
    """What is shown by a view of what `views` shows."""
    target = aten.view.default if is_call(node, aten.reshape.default) else node.target
    if target not in (aten.view.default, aten.transpose.int, aten.narrow.default, aten.unsqueeze.default):
        return None
    link, shown = views[node.args[0]]  # type: ignore[index]
    try:
        return link, target(shown, *_numbers(node.args[1:]))  # type: ignore[operator]
    except (RuntimeError, TypeError):  # a reshape that copies, sizes that are not known
        return None


def _numbers(args: Any) -> Any:
    return map_arg(args, lambda node: known(value(node)))


def _caches(links: list[Node]) -> tuple[Any, ...]:
    """Keys and values that one of the links writes to, and their scales if they are codes."""
    args = next((link.args for link in links if is_call(link, rope_into_cache.overload)), ())
    return (*args[5:7], *args[8:10])


def _may_join(links: list[Node], views: Views) -> bool:
    """Whether only the last result is seen outside, and all of the links may run where the last one does."""
    last, caches = links[-1], _caches(links)
    if any(
        link in links[:-1] and user not in {*links, *views} for node, (link, _) in views.items() for user in node.users
    ):
        return False
    for link in links:
        for operand in link.all_input_nodes:
            if operand in caches:
                users = (user for one in aliases(operand) for user in one.users if user not in links)
                if any(link < user < last for user in users):
                    return False
            elif operand not in views and is_written_between(operand, last):
                return False
    return True


def _arguments(links: list[Node], views: Views) -> tuple[Any, ...]:
    """Those of chain."""
    given: dict[Node, int] = {}
    caches = dict(zip(_caches(links), CACHE))

    def argument(arg: Any) -> Any:
        if not isinstance(arg, Node) or arg in caches:
            return caches.get(arg, arg)
        if arg in views and views[arg][0] in links:
            link, view = views[arg]
            return Result(links.index(link), int(view.storage_offset()), tuple(view.shape), view.stride())
        return Given(given.setdefault(arg, len(given)))

    steps = [Step(name, tuple(map(argument, args))) for name, args in map(_step, links)]
    keys, values, *scales = caches
    return list(given), keys, values, "\n".join(map(str, steps)), *scales


def _step(link: Node) -> tuple[str, tuple[Any, ...]]:
    """A link's op and arguments; linear is a fused_linear with nothing around it."""
    if is_call(link, linear.overload):
        x, data, scale, zero, bias, spec, activation = link.args
        return "fused_linear", (x, None, None, 0.0, data, scale, zero, bias, None, spec, activation, False)
    return link.target._schema.name.rpartition("::")[2], link.args  # type: ignore[union-attr]
