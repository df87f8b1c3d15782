"""Which real inputs a program made for others takes: by private parts of torch, checked on torch 2.11, 2.13, 2.14."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class ShapeGuards:
    """A predicate over real inputs, the function `accept` of this text. It can be pickled."""

    def __init__(self, source: str):
        self.source = source
        scope: dict[str, Any] = {"math": __import__("math")}
        exec(source, scope)
        self.accept: Callable[[Sequence[torch.Tensor]], bool] = scope["accept"]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self.accept(tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShapeGuards, (self.source,)


def shape_guards(fakes: Sequence[Any]) -> ShapeGuards:
    """Do the sizes and strides of real inputs satisfy all that was assumed about these fakes?"""
    import sympy
    from torch.utils._sympy.printers import PythonPrinter

    checks: list[str] = []
    symbols: dict[Any, str] = {}
    shape_env: Any = None
    for index, fake in enumerate(fakes):
        if not isinstance(fake, torch.Tensor):
            continue
        sizes = [(f"x[{index}].shape[{dim}]", size) for dim, size in enumerate(fake.shape)]
        # Over a single element any stride is the same.
        strides = [(f"x[{index}].stride({dim})", stride) for dim, stride in enumerate(fake.stride())]
        strides = [stride for stride, (_, size) in zip(strides, sizes) if not (isinstance(size, int) and size == 1)]
        for place, size in (*sizes, *strides):
            if isinstance(size, int):
                checks.append(f"{place} == {size}")
                continue
            shape_env = size.node.shape_env
            expression = shape_env.simplify(size.node.expr)
            if isinstance(expression, sympy.Symbol):
                if expression in symbols:
                    checks.append(f"{place} == {symbols[expression]}")
                else:
                    symbols[expression] = place
            elif expression.is_number:
                checks.append(f"{place} == {int(expression)}")
            else:
                checks.append(f"{place} == {PythonPrinter().doprint(expression)}")
    if shape_env is not None:
        for symbol in symbols:
            interval = shape_env.var_to_range.get(symbol)
            if interval is None:
                continue
            if interval.lower.is_number and interval.lower.is_finite:
                checks.append(f"{symbol} >= {int(interval.lower)}")
            if interval.upper.is_number and interval.upper.is_finite and interval.upper < 2**62:
                checks.append(f"{symbol} <= {int(interval.upper)}")
        for guard in shape_env.guards:
            expression = shape_env.simplify(guard.expr)
            if expression.free_symbols <= set(symbols) and expression is not sympy.true:
                checks.append(f"({PythonPrinter().doprint(expression)})")
    # A size is at least 2 where it is symbolic: torch specializes on 0 and 1.
    checks += [f"{symbol} >= 2" for symbol in symbols]
    bindings = "".join(f"    {symbol} = {place}\n" for symbol, place in symbols.items())
    body = " and ".join(dict.fromkeys(checks)) or "True"
    return ShapeGuards(f"def accept(x):\n{bindings}    return {body}\n")


def same_form(tensors: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], bool]:
    """A predicate: are as many other tensors of the same class, dtype, device, sizes and strides as these?

    Tensors that are one must be one again, and those of inference mode are others. It takes 0.06 microseconds a tensor
    and keeps none of them alive.
    """
    from torch._C._dynamo.guards import TensorGuards

    first: dict[int, int] = {}
    again = [(i, first[id(x)]) for i, x in enumerate(tensors) if first.setdefault(id(x), i) != i]
    places = list(first.values())
    # It takes each tensor once.
    check = TensorGuards(*(tensors[i] for i in places), dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    count = len(tensors)
    if not again:
        return lambda others: len(others) == count and check(*others)
    return lambda others: (
        len(others) == count and all(others[i] is others[j] for i, j in again) and check(*(others[i] for i in places))
    )
