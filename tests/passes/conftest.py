"""What every pass test needs: a captured graph, a quantized linear to put in it, and a comparison of numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile.graph import capture
from qcompile.quant.packing import pack
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor


class Graph:
    """A captured module with the inputs it was captured on."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]):
        captured = capture.export(module.eval(), inputs)
        self.gm: GraphModule = captured.gm
        named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
        self.inputs = [
            named[i.path] if i.path is not None else i.constant if i.user is None else inputs[i.user]
            for i in captured.inputs
        ]

    def run(self) -> list[Tensor]:
        """The graph's results; inputs are copied first, so a graph that writes to them can be run again."""
        with torch.no_grad():
            return list(self.gm(*copy.deepcopy(self.inputs)))

    def count(self, target: object) -> int:
        return sum(node.target is target for node in self.gm.graph.nodes)


@pytest.fixture
def graph() -> Callable[..., Graph]:
    """`graph(module, *inputs)`: the module's forward, captured."""
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
