"""linear, dequantize and embedding: what they mean, for every kind of spec and input."""

import pytest
import torch
import torch.nn.functional as F

from qcompile.ops.linear import dequantize, embedding, linear
from qcompile.quant.packing import pack
from qcompile.quant.spec import QSpec, Zero

SPECS = [
    "u4/g16/asym",
    "u3/g16/asym_int",
    "u8/row/asym",
    "i8/row/sym",
    "i4/g32/sym",
    "i2/tensor/sym",
    "ternary/row/sym",
]
each_spec = pytest.mark.parametrize("spec", SPECS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def packed(spec, rows, columns, dtype=torch.float32):
    """Packed codes, scales and zero points, and the exact weight, number by number."""
    q = QSpec.parse(spec)
    codes = torch.randint(0, q.element.levels, (rows, columns), dtype=torch.uint8)
    groups = q.scale_shape(rows, columns)
    scale, zero = (torch.rand(groups) + 0.1).to(dtype), None
    if q.zero is not Zero.NONE:
        zero = torch.rand(groups) * q.element.levels
        zero = zero.floor().to(torch.uint8) if q.zero is Zero.INT else zero.to(dtype)
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            group = (i * groups[0] // rows, j * groups[1] // columns)
            shift = q.offset if zero is None else zero[group].item()
            weight[i, j] = (codes[i, j].item() - shift) * scale[group].item()
    return (pack(codes, q.element.bits), scale, zero), weight


@each_spec
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(agrees, spec, dtype):
    weight, exact = packed(spec, 6, 64)
    agrees(dequantize, *weight, spec, [6, 64], dtype, exact=exact, opcheck=dtype == torch.bfloat16)


def test_dequantize_scales_in_bf16_and_more_dimensions(agrees):
    weight, exact = packed("u4/g16/asym", 6, 32, torch.bfloat16)
    agrees(dequantize, *weight, "u4/g16/asym", [2, 3, 32], torch.float32, exact=exact.reshape(2, 3, 32))


INPUTS = {
    "one row": lambda: torch.randn(1, 64),
    "sequences": lambda: torch.randn(2, 5, 64),
    "bf16": lambda: torch.randn(2, 3, 64).bfloat16(),
    "f16": lambda: torch.randn(3, 64).half(),
    "f64": lambda: torch.randn(3, 64, dtype=torch.float64),
    "no rows": lambda: torch.randn(0, 64),
    "one vector": lambda: torch.randn(64),
    "transposed": lambda: torch.randn(64, 5).t(),
    "cut from wider rows": lambda: torch.randn(4, 96)[:, 16:80],
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(("bias", "activation"), [(False, None), (True, None), (True, "gelu"), (False, "relu2")])
def test_linear(make, bias, activation):
    x = make()
    (data, scale, zero), weight = packed("u4/g16/asym", 6, 64)
    added = torch.randn(6).to(x.dtype) if bias else None
    args = (x, data, scale, zero, added, "u4/g16/asym", activation)
    if bias:
        torch.library.opcheck(linear.overload, args)
    exact = x.double() @ weight.to(x.dtype).double().T + (0 if added is None else added.double())
    exact = {None: exact, "gelu": F.gelu(exact), "relu2": exact.relu().square()}[activation]
    got = linear(*args)
    assert got.shape == exact.shape and got.dtype == x.dtype
    # The sum is rounded to the dtype of x, and once more behind an activation.
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-6, torch.float16: 2**-9}[x.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=rtol * 8)


@each_spec
def test_linear_specs(spec):
    x = torch.randn(3, 64, dtype=torch.float64)
    (data, scale, zero), weight = packed(spec, 6, 64)
    torch.testing.assert_close(linear(x, data, scale, zero, None, spec, None), x @ weight.T)


INDICES = {
    "tokens": lambda: torch.tensor([[0, 5, 5], [3, 1, 0]]),
    "int32": lambda: torch.tensor([2, 4], dtype=torch.int32),
    "one": lambda: torch.tensor(3),
    "none": lambda: torch.zeros(0, dtype=torch.long),
    "transposed": lambda: torch.tensor([[0, 5, 5], [3, 1, 0]]).t(),
    "every other": lambda: torch.arange(6)[::2],
}


@pytest.mark.parametrize("make", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("spec", ["u4/g16/asym", "u3/g16/asym_int", "i8/row/sym"])
def test_embedding(agrees, make, spec):
    indices = make()
    weight, exact = packed(spec, 6, 48)
    agrees(embedding, indices, *weight, spec, 48, torch.bfloat16, exact=exact[indices.long()])


def test_symbolic_sizes(symbolic):
    (data, scale, zero), _ = packed("u4/g16/asym", 6, 64)
    rest = (data, scale, zero, None, "u4/g16/asym", None)
    symbolic(lambda x: linear(x, *rest), (torch.randn(3, 2, 64),), (torch.randn(9, 2, 64),))
    rest = (data, scale, zero, "u4/g16/asym", 64, torch.float32)
    symbolic(lambda i: embedding(i, *rest), (torch.tensor([1, 2]),), (torch.tensor([1, 2, 5, 0]),))
