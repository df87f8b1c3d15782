"""quantize_activation."""

import pytest
import torch
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.passes.quantize_activation import QuantizeActivation
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import INPUT_ROUNDING, put_rounding
from qcompile.stores import ActivationRounding

BEFORE = (*normalizing_passes(), QuantizeLinear())


@pytest.fixture
def rounded(graph, side_by_side):
    """`rounded("i8/token/dynamic", "i8/row/sym")`: a linear of rounded activations, as the passes before leave it; of
    any number of rows, or just so many."""

    def make(rounding, spec, scale=None, rows=None):
        module = nn.Linear(64, 8)
        side_by_side(module, spec=spec)
        put_rounding(module, INPUT_ROUNDING, ActivationRounding(ActivationSpec.parse(rounding), scale))
        if rows is None:
            return graph(module, torch.randn(3, 64)).prepare(*BEFORE)
        return graph(nn.Sequential(nn.Unflatten(0, (rows, 1)), module), torch.randn(rows, 64)).prepare(*BEFORE)

    return make


def test_text(rounded, golden):
    g = rounded("i8/token/dynamic/half", "i8/row/sym")
    before = g.text()
    g.apply(QuantizeActivation())
    golden("passes/quantize_activation", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize(
    ("rounding", "scale"),
    [
        ("i8/token/dynamic", None),
        ("i8/tensor/dynamic/half", None),
        ("i8/tensor/static", torch.tensor(0.02)),
        ("fp8_e4m3/token/dynamic", None),
    ],
)
def test_quantized(rounded, rounding, granularity, scale):
    g = rounded(rounding, f"{rounding.partition('/')[0]}/{granularity}/sym", scale)
    result = g.apply(QuantizeActivation())
    assert g.ops() == ["linear_w8a8"] and g.count(linear_w8a8.overload) == 1 and not result.misses


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u3/g32/shift", "i8/g64/sym", "u8/row/asym_int"])
def test_quantized_where_rows_are_many(rounded, spec):
    for rows in (None, 9):
        g = rounded("i8/token/dynamic", spec, rows=rows)
        assert len(g.apply(QuantizeActivation()).rewrites) == 1
        assert g.count(linear_w8a8.overload) == 1 and "round_activation" not in g.ops()
    for rows in (1, 8):
        result = rounded("i8/token/dynamic", spec, rows=rows).apply(QuantizeActivation())
        assert not result.rewrites and not result.misses
    assert rounded("i8/token/dynamic", "i8/row/sym", rows=1).apply(QuantizeActivation()).rewrites


@pytest.mark.parametrize(
    ("rounding", "spec"),
    [
        ("i8/token/dynamic", "nf4/g64/sym"),
        ("fp8_e4m3/token/dynamic", "u4/g64/asym"),
        ("u8/token/dynamic", "i8/row/sym"),
        ("fp8_e4m3/token/dynamic", "i8/row/sym"),
        ("i8/token/dynamic", "fp8_e4m3/row/sym"),
        ("fp8_e4m3/token/dynamic", "fp8_e4m3/b128x128/sym"),
        ("i8/g32/dynamic", "i8/row/sym"),
        ("i8/token/dynamic/outliers(6.0)", "i8/row/sym"),
    ],
)
def test_what_is_no_product_of_codes(rounded, rounding, spec):
    result = rounded(rounding, spec).apply(QuantizeActivation())
    assert not result.misses and not result.rewrites


def test_miss_written_between(graph, side_by_side):
    module = nn.Linear(64, 8)
    side_by_side(module, spec="i8/row/sym")
    rounding = ActivationRounding(ActivationSpec.parse("i8/token/dynamic"))

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            y = x + 1
            z = rounding(y)
            y.mul_(2)
            return y, self.inner(z)

    result = graph(Writes(), torch.randn(3, 64)).prepare(*BEFORE[1:]).apply(QuantizeActivation())
    assert [reason for reason, _ in result.misses] == ["x is written between its rounding and the linear"]


def test_a_linear_of_float_activations_is_not_our_business(graph, side_by_side):
    module = nn.Linear(64, 8)
    side_by_side(module, spec="i8/row/sym")
    result = graph(module, torch.randn(3, 64)).prepare(*BEFORE).apply(QuantizeActivation())
    assert not result.rewrites and not result.misses
