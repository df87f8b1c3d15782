"""Products of integers on the CPU against the op's meaning, by each way that multiplies them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_rounded
from qcompile.kernels import linear_w8a8_cpu as kernel
from qcompile.quant.activation import ActivationSpec, activation_codes
from qcompile.quant.granularity import PerGroup
from qcompile.quant.packing import pack
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Integers are summed exactly, groups in float32: what is left is half a last bit of the result. Linear on rounded x
# rounds x', too.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
EIGHT_BITS = ["i8/row/sym", "i8/tensor/sym"]
SPECS = [
    *("u1/g128/asym_int", "u2/g64/asym", "ternary/row/sym", "u3/g64/asym", "i3/g48/sym", "u4/g16/asym", "u4/g32/shift"),
    *("u4/g64/asym", "u4/g128/asym_int", "i4/row/sym", "i4/tensor/sym", "u5/g64/asym", "i6/g32/sym", "u7/g128/asym"),
    *("u8/g64/asym", "u8/g80/asym_int", "u8/g1200/asym", "i8/b5x64/sym"),
]


def weight(text: str, rows: int, columns: int) -> QTensor:
    spec = QSpec.parse(text)
    codes = torch.randint(spec.element.levels, (rows, columns), dtype=torch.uint8)
    shape, levels = spec.scale_shape(rows, columns), spec.element.levels
    scale, zero = torch.rand(shape) * 0.01 + 0.001, None
    if spec.zero is Zero.SHIFT:
        zero = -torch.rand(shape) * 0.1
    elif spec.zero is not Zero.NONE:
        zero = torch.rand(shape) * (levels - 1)
    if spec.zero is Zero.INT:
        assert zero is not None
        zero = zero.round().to(torch.uint8)
    return QTensor.from_codes(spec, codes, scale, zero)


def exact(x: Tensor, x_scale: Tensor | None, rounding: str, q: QTensor, bias: Tensor | None) -> Tensor:
    codes, step = activation_codes(x, x_scale, ActivationSpec.parse(rounding))
    y = (codes.double() * step.double()) @ q.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def check(x: Tensor, q: QTensor, rounding: str = "i8/token/dynamic", relu: bool = False) -> None:
    x_scale = torch.tensor(0.03) if "static" in rounding else None
    bias = torch.randn(q.rows).to(x.dtype) if x.shape[0] % 2 else None
    args = (x, x_scale, rounding, q.data, q.scale, q.zero, bias, str(q.spec), "relu" if relu else None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    got, want = kernel.linear_w8a8_cpu(*args), exact(x, x_scale, rounding, q, bias)
    want = want.relu() if relu else want
    assert got.dtype == x.dtype and got.shape == want.shape
    many = x.shape[:-1].numel() >= kernel.MIN_ROWS_OF_TORCH[x.dtype]
    tolerance = TOLERANCE[x.dtype] if many else ROUNDED[x.dtype]
    assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-6
    again = linear_rounded.linear_rounded(*args)
    assert (again.double() - want).norm() <= ROUNDED[x.dtype] * want.norm() + 1e-6


@pytest.fixture(params=["codes", "tiles", "torch"])
def way(
    request: pytest.FixtureRequest, compile_cpu_code: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own C++, the same by matrix instructions, and torch's product beside those that are not ours."""
    compile_cpu_code("#define EMULATE_TILES" if request.param == "tiles" else "#undef __AMX_TILE__")
    if request.param == "torch":
        monkeypatch.setattr(kernel, "processor_features", lambda: frozenset({"amx_int8", "avx512_vnni"}))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("spec", EIGHT_BITS)
@pytest.mark.parametrize("rounding", ["i8/token/dynamic", "i8/token/dynamic/half", "i8/tensor/static"])
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 8, 64), (3, 5, 33), (65, 37, 100), (130, 1, 16)])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_meaning(spec: str, rounding: str, rows: int, outputs: int, columns: int, dtype: torch.dtype) -> None:
    check(torch.randn(rows, columns).to(dtype), weight(spec, outputs, columns), rounding, relu=bool(rows % 3))


@pytest.mark.parametrize("spec", SPECS)
def test_groups(spec: str) -> None:
    random.seed(spec)
    granularity = QSpec.parse(spec).granularity
    size = granularity.size if isinstance(granularity, PerGroup) else 64 if "b5x64" in spec else 1
    for rows, dtype in ((64, torch.bfloat16), (65, torch.float32), (71, torch.float16), (515, torch.bfloat16)):
        columns = size * random.choice((1, 2, 3, 17)) if size > 1 else random.choice((7, 100, 1040, 2050))
        check(torch.randn(rows, columns).to(dtype) + 0.5, weight(spec, random.choice((1, 17, 48, 100)), columns))


@pytest.mark.parametrize("rows", [*range(kernel.MIN_ROWS, 18), 31])
def test_numbers_of_rows(rows: int) -> None:
    if kernel.way_of("u4/g64/asym", 192, torch.float32) is not kernel._multiply_codes:
        pytest.skip("codes of groups are not multiplied here")
    x, q = torch.randn(rows, 192), weight("u4/g64/asym", 50, 192)
    got = kernel.linear_w8a8_cpu(x, None, "i8/token/dynamic", q.data, q.scale, q.zero, None, "u4/g64/asym", None)
    want = exact(x, None, "i8/token/dynamic", q, None)
    many = rows >= kernel.least_rows("u4/g64/asym", 192, torch.float32)
    assert (got - want).norm() <= (TOLERANCE if many else ROUNDED)[torch.float32] * want.norm()


@pytest.mark.usefixtures("way")
def test_slabs_and_more_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SLAB_BYTES", 200)
    for spec in ("i8/row/sym", "i8/tensor/sym"):
        check(torch.randn(5, 7, 64), weight(spec, 10, 64))


def test_views() -> None:
    """Rows of a larger buffer, and x that is not contiguous."""
    q = weight("u4/g64/asym", 100, 192)
    wide, x = torch.cat([q.data, q.data], dim=1)[:, : q.data.shape[1]], torch.randn(192, 40).t()
    sides = [side.narrow(0, 37, 20) for side in (wide, q.scale, q.zero)]
    args = (x, None, "i8/token/dynamic", *sides, None, "u4/g64/asym", None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    whole = kernel.linear_w8a8_cpu(*args[:3], q.data, q.scale, q.zero, *args[6:])
    assert torch.equal(kernel.linear_w8a8_cpu(*args), whole[:, 37:57])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("columns", [4096, 70000])
def test_extremes_are_summed_exactly(columns: int) -> None:
    x = torch.full((32, columns), -1.0)
    data = pack(torch.zeros(16, columns, dtype=torch.uint8), 8)
    args = (x, torch.tensor(1 / 128), "i8/tensor/static", data, torch.ones(16, 1), None, None, "i8/row/sym", None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    assert (kernel.linear_w8a8_cpu(*args) == columns * 128).all()


def test_threads_do_not_change_the_result() -> None:
    q, x = weight("u4/g64/asym", 200, 256), torch.randn(300, 256)
    args = (x, None, "i8/token/dynamic", q.data, q.scale, q.zero, None, "u4/g64/asym", None)
    if reason := kernel.refuses(*args):
        pytest.skip(reason)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(kernel.linear_w8a8_cpu(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


Arguments = Callable[..., tuple]


@pytest.fixture
def arguments() -> Arguments:
    def make(spec: str, dtype: torch.dtype = torch.bfloat16) -> tuple:
        q = weight(spec, 4, 64)
        return (torch.randn(2, 64, dtype=dtype), None, "i8/token/dynamic", q.data, q.scale, q.zero, None, spec, None)

    return make


def test_the_way_follows_the_processor(
    arguments: Arguments, compile_cpu_code: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_cpu_code("#undef __AMX_TILE__")

    def ways(*features: str) -> list[str | None]:
        monkeypatch.setattr(kernel, "processor_features", lambda: frozenset(features))
        found = []
        for spec, dtype in (("i8/row/sym", torch.bfloat16), ("u4/g64/asym", torch.bfloat16), ("u4/g64/asym", None)):
            args = arguments(spec, dtype or torch.float32)
            way, reason = kernel.way_of(spec, 64, args[0].dtype), kernel.refuses(*args)
            assert (way is None) == (reason is not None) and (reason is None or "nothing faster" in reason)
            found.append(way and way.__name__)
        return found

    ours = "_multiply_codes" if packed.Reader.of("u4/g64/asym", 64).many_codes else None
    assert ways("avx512_vnni") == [ours or "_multiply_in_torch", ours, ours]
    assert ways("avx512_vnni", "amx_int8", "amx_bf16") == ["_multiply_in_torch", None, ours]


def test_refuses_without_exact_sums(arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "processor_features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(
        packed.Reader, "of", lambda *_: type("None", (), {"many_codes": None, "many_codes_tiles": None})
    )
    for spec in ("i8/row/sym", "u4/g64/asym"):
        assert "nothing faster" in str(kernel.refuses(*arguments(spec)))


def test_both_refuse_what_linear_has_no_kernel_for(arguments: Arguments) -> None:
    args = arguments("i8/row/sym", torch.float64)
    assert "float64" in str(kernel.refuses(*args)) and "float64" in str(linear_rounded.refuses(*args))
