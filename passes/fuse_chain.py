"""The calls of a step of decoding that follow one another become one call.

    y = qcompile.fused_linear(x, qkv)                          y = qcompile.chain([x, qkv, …], [K, V, …], steps)
    q = qcompile.rope_into_cache(parts of y, K, V, …)
    a = qcompile.attention(q, K, V, …)                  ->
    b = qcompile.fused_linear(a, o, residual=x)
    …

Why: each of them forks and joins threads, and is called through Python; of a layer of SmolLM2 that is half the time.

A chain goes on through all layers, and ends where anything else reads what its ops have made, or where an op has no
kernel in a chain. Where no kernel for this type of device has signed up, nothing is looked at.
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
from qcompile.ops.chain import Cache, Given, Result, Step, chain
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.linear import linear
from qcompile.ops.registry import MEANING, known
from qcompile.ops.rope import rope_into_cache

VIEWS = (aten.view.default, aten.transpose.int, aten.narrow.default, aten.unsqueeze.default)
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
        while len(links) > 1 and (caches := _caches(links)):
            if _may_join(links, views, caches):
                arguments = _arguments(links, views, caches)
                if _is_served(arguments):
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
    """Links from this one on, up to what else reads their results or has no kernel; and what shows these."""
    links, views = list[Node](), Views()
    while node.op != "output":
        if is_call(node, *LINKS):
            if (view := _whole(node)) is None or not _is_served(_arguments([node], {}, _caches([node]))):
                break
            links.append(node)
            views[node] = node, view
        elif not views.keys().isdisjoint(node.all_input_nodes):
            if (found := _view(node, views)) is None:
                break
            views[node] = found
        node = node.next
    return links, views


def _is_served(arguments: tuple[Any, ...]) -> bool:
    return chain.choose(*map_arg(arguments, value)).name != MEANING


def _whole(link: Node) -> Tensor | None:
    sizes = [known(size) for size in value(link).shape]
    return None if None in sizes else torch.empty([size or 0 for size in sizes], device="meta")


def _view(node: Node, views: Views) -> tuple[Node, Tensor] | None:
    """What is shown by a view of what `views` shows."""
    target = aten.view.default if is_call(node, aten.reshape.default) else node.target
    if target not in VIEWS:
        return None
    link, shown = views[node.args[0]]  # type: ignore[index]
    try:
        return link, target(shown, *_numbers(node.args[1:]))  # type: ignore[operator]
    except (RuntimeError, TypeError):  # a reshape that copies, sizes that are not known
        return None


def _numbers(args: Any) -> Any:
    return map_arg(args, lambda node: known(value(node)))


def _caches(links: list[Node]) -> list[Any]:
    """Keys and values that the links write to, and their scales if they are codes."""
    ropes = (link.args for link in links if is_call(link, rope_into_cache.overload))
    return list(dict.fromkeys(cache for args in ropes for cache in (*args[5:7], *args[8:10])))


def _may_join(links: list[Node], views: Views, caches: list[Any]) -> bool:
    """Whether only the last result is seen outside, and all of the links may run where the last one does."""
    last, inner, inside = links[-1], set(links[:-1]), {*links, *views}
    if any(link in inner and not inside.issuperset(node.users) for node, (link, _) in views.items()):
        return False
    for operand in {operand for link in links for operand in link.all_input_nodes}.difference(caches, views):
        if is_written_between(operand, last):
            return False
    for cache in caches:
        first = next(link for link in links if cache in link.all_input_nodes)
        users = (user for one in aliases(cache) for user in one.users if user not in inside)
        if any(first < user < last for user in users):
            return False
    return True


def _arguments(links: list[Node], views: Views, caches: list[Any]) -> tuple[Any, ...]:
    """Those of chain."""
    given: dict[Any, tuple[int, Node]] = {}  # layers look at angles each for itself: what is looked at alike is one
    order = {link: index for index, link in enumerate(links)}
    places = {cache: Cache(index) for index, cache in enumerate(caches)}

    def argument(arg: Any) -> Any:
        if not isinstance(arg, Node) or arg in places:
            return places.get(arg, arg)
        if arg in views and views[arg][0] in order:
            link, view = views[arg]
            return Result(order[link], int(view.storage_offset()), tuple(view.shape), view.stride())
        key = (arg.target, str(arg.args)) if is_call(arg, *VIEWS) else arg
        return Given(given.setdefault(key, (len(given), arg))[0])

    steps = [Step(name, tuple(map(argument, args))) for name, args in map(_step, links)]
    return [node for _, node in given.values()], caches, "\n".join(map(str, steps))


def _step(link: Node) -> tuple[str, tuple[Any, ...]]:
    """A link's op and arguments; linear is a fused_linear with nothing around it."""
    if is_call(link, linear.overload):
        x, data, scale, zero, bias, spec, activation = link.args
        return "fused_linear", (x, None, None, 0.0, data, scale, zero, bias, None, spec, activation, False)
    return link.target._schema.name.rpartition("::")[2], link.args  # type: ignore[union-attr]
