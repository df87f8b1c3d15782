"""A graph as text: one line a node, the same bytes every run.

%linear_3 : bf16[1,s0,64] = qcompile.linear(%reshape_2, …)     # model.layers.0.self_attn.o_proj  <- quantize_linear
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.graph.match import module_path, value

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_WIDTH = 100


def dump(graph: Graph) -> str:
    """The graph as text."""
    symbols: dict[str, str] = {}
    return "\n".join(_line(node, symbols) for node in graph.nodes) + "\n"


def write_dump(folder: Path, index: int, name: str, text: str) -> None:
    """`folder/index-name.txt`, folder made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index:03d}-{name}.txt").write_text(text)


def type_text(val: Any, symbols: dict[str, str] | None = None) -> str:
    """`bf16[1,7,64]` for a tensor; tuples in parentheses; `int` and the like for numbers."""
    if isinstance(val, torch.Tensor):
        dtype = _DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
        sizes = ",".join(_rename(str(size), symbols) for size in val.shape)
        return f"{dtype}[{sizes}]"
    if isinstance(val, (list, tuple)):
        return "(" + ", ".join(type_text(v, symbols) for v in val) + ")"
    return type(val).__name__.removeprefix("Sym").lower() if val is not None else "none"


def _line(node: Node, symbols: dict[str, str]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    left = f"%{node.name} : {type_text(value(node), symbols)} = {_call(node)}"
    right = "  ".join(filter(None, [module_path(node), f"<- {origin}" if (origin := node.meta.get("origin")) else ""]))
    return f"{left:<{_WIDTH}} # {right}" if right else left


def _call(node: Node) -> str:
    if node.op == "placeholder":
        return f"input[{node.meta.get('input_path', node.name)}]"
    if node.op == "get_attr":
        return f"attribute[{node.target}]"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _argument(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, Sequence) and not isinstance(arg, str):
        return "[" + ", ".join(_argument(a) for a in arg) + "]"
    if isinstance(arg, torch.dtype):
        return _DTYPES.get(arg, str(arg))
    return repr(arg) if isinstance(arg, str) else str(arg)


def _rename(size: str, symbols: dict[str, str] | None) -> str:
    """Symbols by order of appearance: torch numbers them by hashes that change between releases, and sorts by them."""
    if symbols is None:
        return size
    size = re.sub(r"\b[su]\d+\b", lambda m: symbols.setdefault(m.group(), f"s{len(symbols)}"), size)
    if re.fullmatch(r"\w+(( \+ |\*)\w+)*", size):
        size = " + ".join(sorted("*".join(sorted(term.split("*"))) for term in size.split(" + ")))
    return size
