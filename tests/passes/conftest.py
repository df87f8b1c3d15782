"""What every pass test needs: a captured graph, a quantized linear to put in it, and a comparison of numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile.graph import capture
from qcompile.graph.dump import dump
from qcompile.graph.rewrite import PassResult, Rule, apply
from qcompile.quant.packing import pack
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor
from qcompile.storage import Slot, install
from qcompile.stores import PackedWeight


class Flat(nn.Module):
    """A module or function that takes its inputs as *tensors, which is what `capture.export` captures."""

    def __init__(self, module: Callable[..., Any]):
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(*tensors)


class Graph:
    """A captured module with the inputs it was captured on."""

    def __init__(self, module: Callable[..., Any], inputs: Sequence[Tensor]):
        flat = Flat(module).eval()
        captured = capture.export(flat, inputs, prefix="module.")
        named: dict[str, Tensor] = dict(flat.named_parameters(remove_duplicate=False))
        named.update(flat.named_buffers(remove_duplicate=False))
        self.gm: GraphModule = captured.gm
        self.inputs: list[Any] = [
            named[f"module.{i.path}"] if i.path is not None else inputs[i.user] if i.user is not None else i.constant
            for i in captured.inputs
        ]

    def run(self) -> list[Tensor]:
        """The graph's results, then its inputs, which it may have written to; it runs on copies of them."""
        with torch.no_grad():
            inputs = copy.deepcopy(self.inputs)
            self.gm.recompile()
            return [*self.gm(*inputs), *inputs]

    def apply(self, rule: Rule[Any], rtol: float | None = None, atol: float | None = None) -> PassResult:
        """Run a pass and check what holds for every pass: the numbers stay, its nodes say what they are and where they
        come from, and a second run changes nothing."""
        before = self.run()
        result = apply(self.gm.graph, rule)
        torch.testing.assert_close(self.run(), before, rtol=rtol, atol=atol, equal_nan=True)
        for node in self.gm.graph.nodes:
            if node.meta.get("origin") == rule.name:
                assert "val" in node.meta and "module_path" in node.meta, node
        text = self.text()
        again = apply(self.gm.graph, rule)
        assert not again.rewrites and self.text() == text, "applied twice, it changed something again"
        return result

    def prepare(self, *rules: Rule[Any]) -> Graph:
        """Run passes that come before the one under test."""
        for rule in rules:
            apply(self.gm.graph, rule)
        return self

    def text(self) -> str:
        return dump(self.gm.graph)

    def ops(self) -> list[str]:
        """The names of the ops called, in order, without namespace and overload."""
        return [_name(node.target) for node in self.gm.graph.nodes if node.op == "call_function"]

    def count(self, *targets: object) -> int:
        return sum(node.target in targets for node in self.gm.graph.nodes)


def _name(target: Any) -> str:
    return target._schema.name.partition("::")[2] if hasattr(target, "_schema") else target.__name__


@pytest.fixture
def graph() -> Callable[..., Graph]:
    """`graph(module, *inputs)`: the forward of a module, or a function, captured."""
    return lambda module, *inputs: Graph(module, inputs)


@pytest.fixture
def quantized() -> Callable[..., QTensor]:
    """`quantized(rows, columns, spec="u4/g64/asym")`: random codes with scales that keep values near 1."""

    def make(rows: int, columns: int, spec: str = "u4/g64/asym") -> QTensor:
        q = QSpec.parse(spec)
        groups = q.scale_shape(rows, columns)
        codes = torch.randint(0, q.element.levels, (rows, columns), dtype=torch.uint8)
        scale = (torch.rand(groups) + 0.5) * 2 / q.element.levels
        zero = None
        if q.zero is not Zero.NONE:
            zero = torch.rand(groups) * (q.element.levels - 1)
            zero = zero.round().to(torch.uint8) if q.zero is Zero.INT else zero
        return QTensor(q, (rows, columns), pack(codes, q.element.bits), scale, zero)

    return make


@pytest.fixture
def side_by_side(quantized: Callable[..., QTensor]) -> Callable[..., None]:
    """`side_by_side(q, k, v, spec="u4/g64/asym")`: quantized weights for these modules, in one store, in this order.

    Biases go into the store, too, unless `biases=False`.
    """

    def store(*modules: nn.Linear, spec: str = "u4/g64/asym", biases: bool = True) -> None:
        parts = [quantized(m.out_features, m.in_features, spec) for m in modules]
        biases = biases and all(m.bias is not None for m in modules)
        packed, start = PackedWeight(parts, [m.bias.detach() for m in modules] if biases else ()), 0
        for m in modules:
            like, rows = torch.empty(0, dtype=m.weight.dtype), m.out_features
            slots = {"weight": Slot("packed", start, rows, (rows, m.in_features), False, like)}
            if biases:
                slots["bias"] = Slot("packed", start, rows, (rows,), False, like, bias=True)
            install(m, slots, {"packed": packed})
            start += rows

    return store


class Siblings(nn.Module):
    """Two linears of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 8, bias=False), nn.Linear(64, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


@pytest.fixture
def siblings(side_by_side: Callable[..., None]) -> Siblings:
    """Packed side by side."""
    module = Siblings()
    side_by_side(module.q, module.k)
    return module


class Step(nn.Module):
    """`function(q, k, v, cos, sin, *others)` on 4 query heads and 2 key and value heads of 8 columns."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> Any:
        # Sizes are written down: columns of a projection are no symbols.
        heads = (x.view(*x.shape[:2], n, 8).transpose(1, 2) for x, n in ((q, 4), (k, 2), (v, 2)))
        return self.function(*heads, cos.unsqueeze(1), sin.unsqueeze(1), *others)


@pytest.fixture
def step(graph: Callable[..., Graph]) -> Callable[..., Graph]:
    """`step(function, q, k, v, cos, sin, *others)`: a step of attention, captured, from projections and angles."""
    return lambda function, *inputs: graph(Step(function), *inputs)
