"""What the code of modules says of their layers: whether each is called alike, whatever its number."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# What tells layers of one kind apart.
NUMBER = "layer_idx"


@dataclass(frozen=True)
class Loop:
    """`sliced`: over `[: self.config.num_hidden_layers]`. `by_type`: a layer's arguments are picked by
    `self.config.layer_types[i]`, where i counts the rounds."""

    sliced: bool
    by_type: bool


@functools.cache
def loop_over(owner: type[nn.Module], name: str) -> Loop | None:
    """The one loop of forward over the list `self.<name>`, if it is `for layer in self.<name>: x = layer(x, …)`, with
    nothing else in it; None where anything else is done with the list, or its code cannot be read."""
    forward: Any = inspect.unwrap(owner.forward)
    if any(each is not forward for each in _mentioning(owner, name)) or (tree := _parsed(forward)) is None:
        return None
    if any(_names(each.__code__, name) for each in _helpers(owner)):
        return None
    this = forward.__code__.co_varnames[0]
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and _mentioned(node, name)]
    return _plain(loops[0], tree, this, name) if len(loops) == 1 == len(_mentioned(tree, name)) else None


def _plain(loop: ast.For, tree: ast.AST, this: str, name: str) -> Loop | None:
    match loop.target, loop.iter:
        case ast.Name(id=layer), over:
            number = None
        case (
            ast.Tuple(elts=[ast.Name(id=number), ast.Name(id=layer)]),
            ast.Call(func=ast.Name(id="enumerate"), args=[over], keywords=[]),
        ):
            pass
        case _:
            return None
    sliced = ast.unparse(over) == f"{this}.{name}[:{this}.config.num_hidden_layers]"
    match loop:
        case ast.For(
            body=[ast.Assign(targets=[ast.Name()], value=ast.Call(func=ast.Name(id=called)) as call)], orelse=[]
        ) if called == layer and (sliced or ast.unparse(over) == f"{this}.{name}"):
            picked = [node for node in ast.walk(call) if _picks_type(node, this, number)]
        case _:
            return None
    # The loop's names stand nowhere else, and what is given is read, not made: neither can count rounds.
    plain = _names_of(tree).count(layer) == 2 and (number is None or _names_of(tree).count(number) == 1 + len(picked))
    return Loop(sliced, bool(picked)) if plain and all(map(_is_read, (*call.args, *call.keywords))) else None


def _picks_type(node: ast.AST, this: str, number: str | None) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node) == f"{this}.config.layer_types[{number}]"


def _names_of(tree: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


_READS = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Starred, ast.keyword, ast.expr_context)


def _is_read(given: ast.AST) -> bool:
    return all(isinstance(node, _READS) for node in ast.walk(given))


@functools.cache
def mentions(module: type[nn.Module], name: str) -> bool:
    """Whether a method other than __init__, or a function of its file that one names, names this attribute."""
    return bool(_mentioning(module, name)) or any(_names(each.__code__, name) for each in _helpers(module))


@functools.cache
def numbers_only_caches(module: type[nn.Module], number: str) -> bool:
    """Whether its methods, and the functions of their files that they name, use an attribute of this name for nothing
    but as an argument of a cache's update()."""
    helpers = [each for each in _helpers(module) if _names(each.__code__, number)]
    return all(_only_in_updates(_parsed(each), number) for each in (*_mentioning(module, number), *helpers))


def _mentioning(module: type[nn.Module], name: str) -> list[FunctionType]:
    return [function for function in _methods(module) if _names(function.__code__, name)]


def _helpers(module: type[nn.Module]) -> list[FunctionType]:
    """Functions of their own files that methods name, and those that these name."""
    left, seen = list(_methods(module)), set()
    while left:
        each = left.pop()
        named = [each.__globals__.get(name) for name in _all_names(each.__code__)]
        new = {f for f in named if isinstance(f, FunctionType) and f.__globals__ is each.__globals__} - seen
        seen |= new
        left += new
    return list(seen)


def _all_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _all_names(inner)


def _methods(module: type[nn.Module]) -> Iterator[FunctionType]:
    """All but __init__, and the functions in their closures, which they may wrap."""
    classes = module.__mro__[: module.__mro__.index(nn.Module)]
    left: list[Any] = [member for each in classes for key, member in vars(each).items() if key != "__init__"]
    seen = set()
    while left:
        each = left.pop()
        function = getattr(each, "fget", None) or getattr(each, "__func__", each)
        if isinstance(function, FunctionType) and function not in seen:
            seen.add(function)
            for cell in function.__closure__ or ():
                with suppress(ValueError):  # an empty one
                    left.append(cell.cell_contents)
            yield function


def _names(code: CodeType, name: str) -> bool:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return name in code.co_names or name in code.co_consts or any(_names(each, name) for each in inner)


def _parsed(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _only_in_updates(tree: ast.AST | None, number: str) -> bool:
    if tree is None:
        return False
    given: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=cache), attr="update")) if (
                "past" in cache or "cache" in cache
            ):
                given |= {*node.args, *(each.value for each in node.keywords)}
    return given.issuperset(_mentioned(tree, number))


def _mentioned(tree: ast.AST, name: str) -> list[ast.AST]:
    """Where an attribute is named, be it in a string, as getattr takes it."""
    return [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.Constant) and node.value == name)
    ]
