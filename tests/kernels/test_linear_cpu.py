"""linear and dequantize in C++ against their meanings, on odd shapes, all widths of code and all ways of lying."""

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.kernels.dequantize_cpu import dequantize_packed
from qcompile.kernels.linear_cpu import linear_packed
from qcompile.ops.linear import dequantize, linear
from qcompile.quant.granularity import PerBlock, PerGroup
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

SPECS = [
    *("u1/row/asym", "u1/g128/asym_int", "u2/g64/asym", "i2/tensor/sym", "ternary/row/sym", "ternary/g16/asym"),
    *("u3/g64/asym", "i3/g48/sym", "u4/g16/asym", "u4/g32/asym", "u4/g64/asym", "u4/g128/asym_int", "i4/row/sym"),
    *("i4/tensor/sym", "u5/g64/asym", "i5/row/sym", "i6/g32/sym", "u6/row/asym", "u7/g128/asym", "u8/g64/asym"),
    *("u8/g80/asym_int", "i8/row/sym", "i8/tensor/sym", "u1/g32/asym", "u2/g32/asym", "u3/g32/asym", "u2/g512/asym"),
    *("u4/g32/shift", "u5/g64/shift", "u8/row/shift", "u2/g16/shift", "nf4/g64/sym", "fp4_bnb/row/sym", "iq4/g32/sym"),
    *("fp4_e2m1/g16/sym", "fp4_e2m1/g32/sym", "fp6_e2m3/g32/sym", "fp6_e3m2/g48/sym", "fp8_e4m3/row/sym"),
    *("fp8_e4m3/b16x32/sym", "fp8_e4m3/b128x128/sym", "fp8_e4m3/tensor/sym", "fp8_e5m2/g64/sym", "i8/b5x64/sym"),
]
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 64, 130)
OUTPUTS = (1, 2, 5, 15, 16, 17, 48, 49, 100)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Rounding the result. What comes on top of it must stay below twice the error of torch's linear. In float32 the sum is
# rounded at each term, and of a result of ten numbers torch's error is small by chance: hence three bits.
ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """All widths at once: the first run compiles them."""
    with ThreadPoolExecutor(4) as pool:
        reasons = list(pool.map(packed.missing, {QSpec.parse(spec).element for spec in SPECS}))
    if reason := next(filter(None, reasons), None):
        pytest.skip(reason)


def columns_of(spec: QSpec) -> int:
    granularity = spec.granularity
    if isinstance(granularity, PerGroup):
        return granularity.size * random.choice((1, 2, 3, 9, 17))
    if isinstance(granularity, PerBlock):
        return granularity.width * random.choice((1, 2, 3, 9))
    return random.choice((1, 7, 16, 31, 64, 100, 129, 576, 1040))


def weight(text: str, rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> QTensor:
    spec = QSpec.parse(text)
    shape, levels = spec.scale_shape(rows, columns), spec.element.levels
    codes = torch.randint(levels, (rows, columns), dtype=torch.uint8)
    size = 1.0
    if spec.element.is_float:
        numbers = spec.element.decode(codes, torch.float32)
        codes = torch.where(numbers.isfinite(), codes, 0)
        size = float(numbers.nan_to_num(0, 0, 0).abs().max()) / 16
    scale = ((torch.rand(shape) * 0.02 + 0.01) / size).to(scale_dtype)
    zero = None
    if spec.zero is Zero.SHIFT:
        zero = (-torch.rand(shape) * 0.1).to(scale_dtype)
    if spec.zero is Zero.FLOAT:
        zero = (torch.rand(shape) * (levels - 1)).to(scale_dtype)
    if spec.zero is Zero.INT:
        zero = torch.randint(levels, shape, dtype=torch.uint8)
    return QTensor.from_codes(spec, codes, scale, zero)


def parts(q: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    assert isinstance(q.scale, Tensor) and not isinstance(q.zero, QTensor)
    return q.data, q.scale, q.zero


def check(x: Tensor, q: QTensor, bias: Tensor | None = None) -> None:
    y = linear_packed(x, *parts(q), bias, str(q.spec))
    exact = F.linear(x.double(), q.dequantize(torch.float64), None if bias is None else bias.double())
    torch_bias = None if bias is None else bias.to(x.dtype)
    plain = F.linear(x, q.dequantize(x.dtype), torch_bias)
    assert (y.shape, y.dtype) == (plain.shape, plain.dtype)
    error, allowed = (y - exact).norm(), 2 * (plain - exact).norm() + ROUNDING[x.dtype] * exact.norm()
    assert error <= allowed, f"{q.spec} {tuple(q.shape)} x {tuple(x.shape)} {x.dtype}: {error:.2e} > {allowed:.2e}"


def close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> None:
    assert (got - want).norm() <= 8 * ROUNDING[dtype or want.dtype] * want.norm()


def check_many(spec: str, rows: tuple[int, ...] = ROWS) -> None:
    random.seed(spec)
    for m, dtype in itertools.product(rows, FLOATS):
        q = weight(spec, random.choice(OUTPUTS), columns_of(QSpec.parse(spec)), random.choice(FLOATS))
        x = (torch.randn(m, q.columns) + random.choice((0, 1))).to(dtype)
        check(x, q, random.choice((None, torch.randn(q.rows, dtype=random.choice((dtype, torch.float32))))))


@pytest.mark.parametrize("spec", SPECS)
def test_linear(spec: str) -> None:
    check_many(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_dequantize(spec: str) -> None:
    random.seed(spec)
    for rows, dtype in itertools.product((1, 5, 33), FLOATS):
        q = weight(spec, rows, columns_of(QSpec.parse(spec)), random.choice(FLOATS))
        w = dequantize_packed(*parts(q), spec, [rows, q.columns], dtype)
        if q.spec.zero is Zero.SHIFT:
            close(w, q.dequantize(torch.float64), dtype)
        else:
            assert torch.equal(w, q.dequantize(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_shift_where_the_scale_is_zero(dtype: torch.dtype) -> None:
    """GGUF writes a group of equal numbers so."""
    q = weight("u4/g32/shift", 8, 64)
    assert isinstance(q.scale, Tensor)
    q.scale[3] = 0
    check(torch.randn(2, 64).to(dtype), q)
    got = dequantize_packed(*parts(q), "u4/g32/shift", [8, 64], dtype)
    close(got[3], q.dequantize(torch.float64)[3], dtype)


def test_dequantize_more_dimensions() -> None:
    q = weight("u4/g32/asym", 6, 64)
    assert torch.equal(
        dequantize_packed(*parts(q), "u4/g32/asym", [2, 3, 64], torch.float32), q.dequantize().view(2, 3, 64)
    )


@pytest.fixture(
    params=["__AMX_TILE__", "__AVX512BF16__", "__GFNI__", "__AVX512VNNI__", "__AVX512F__", "__AVX512F__ __AVX2__"]
)
def lesser_processor(request: pytest.FixtureRequest, compile_cpu_code: Callable[[str], None]) -> str:
    """The code for processors without these instructions, whose names it gives."""
    compile_cpu_code("\n".join(f"#undef {name}" for name in request.param.split()))
    return request.param


def test_lesser_processor(lesser_processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "SLAB_BYTES", 1 << 12)
    specs = ["u4/g64/asym", "u4/g16/asym_int", "i4/row/sym", "i4/tensor/sym"]
    if lesser_processor == "__GFNI__":  # narrow codes, and those of two planes, are taken apart in another way
        specs = ["u1/g64/asym", "u2/g64/asym", "u3/g64/asym", "u3/row/asym", "u4/g64/asym"]
    if "__AVX512F__" in lesser_processor:  # the others multiply in other ways, but decode in the same
        specs += ["nf4/g64/sym", "fp8_e4m3/row/sym"]
    for spec in specs:
        check_many(spec, (1, 3, 8, 17))
        q = weight(spec, 9, 128)
        for dtype in FLOATS:
            assert torch.equal(dequantize_packed(*parts(q), spec, [9, 128], dtype), q.dequantize(dtype))


def test_beside_amx_that_is_not_ours(compile_cpu_code: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cpu_code("#undef __AMX_TILE__")
    monkeypatch.setattr(linear_cpu, "processor_features", lambda: {"amx_bf16"})
    monkeypatch.setattr(linear_cpu, "SLAB_BYTES", 1 << 12)
    linear_cpu._rows_without_copy.cache_clear()
    try:
        for spec in ("u4/g64/asym", "i8/row/sym", "i8/tensor/sym"):
            q = weight(spec, 49, 128)
            for rows in (linear_cpu.ROWS_BESIDE_AMX, linear_cpu.ROWS_BESIDE_AMX + 1):
                check(torch.randn(rows, 128, dtype=torch.bfloat16), q, torch.randn(49))
    finally:
        linear_cpu._rows_without_copy.cache_clear()


def test_float16_at_its_ends() -> None:
    """Subnormal, the largest, infinite and nan scales, in and out."""
    codes, ends = torch.ones(8, 16, dtype=torch.uint8), [2.0**-24, 1e-6, 6e-5, 65504.0, torch.inf, torch.nan, -1.5, 0.0]
    spec, scale = "u4/row/asym", torch.tensor(ends, dtype=torch.float16)[:, None]
    q = QTensor.from_codes(QSpec.parse(spec), codes, scale, torch.zeros_like(scale))
    got = dequantize_packed(*parts(q), spec, [8, 16], torch.float16)
    torch.testing.assert_close(got, q.dequantize(torch.float16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes_of_x(dtype: torch.dtype) -> None:
    q = weight("u4/g64/asym", 33, 128)
    check(torch.randn(128).to(dtype), q)
    check(torch.randn(2, 3, 128).to(dtype), q)
    for empty in ((0, 128), (2, 0, 128)):
        assert linear_packed(torch.empty(empty, dtype=dtype), *parts(q), None, "u4/g64/asym").shape == (*empty[:-1], 33)


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_that_is_not_contiguous(rows: int, dtype: torch.dtype) -> None:
    q = weight("u4/g64/asym", 33, 128)
    check(torch.randn(128, rows).to(dtype).t(), q)
    check(torch.randn(rows, 300).to(dtype)[:, 17:145], q)
    check(torch.randn(1, 128).to(dtype).expand(rows, 128), q)
    check(torch.randn(rows, 256).to(dtype)[:, ::2], q)
    check(torch.randn(3, rows, 128).to(dtype).transpose(0, 1), q)


@pytest.mark.parametrize("spec", ["u4/g64/asym", "i8/row/sym", "u3/row/asym"])
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_of_a_larger_buffer(spec: str, rows: int) -> None:
    q, x = weight(spec, 100, 192), torch.randn(rows, 192, dtype=torch.bfloat16)
    wide = torch.cat([q.data, q.data], dim=1)[:, : q.data.shape[1]]
    scale = torch.stack([q.scale, q.scale], dim=2)[:, :, 0]
    whole = linear_packed(x, *parts(q), None, spec)
    narrowed = [side if side is None else side.narrow(0, 37, 20) for side in (wide, scale, q.zero)]
    assert torch.equal(linear_packed(x, *narrowed, None, spec), whole[:, 37:57])
    w = dequantize_packed(*narrowed, spec, [20, 192], torch.float32)
    assert torch.equal(w, q.dequantize()[37:57])


@pytest.mark.parametrize("rows", [1, 20])
def test_offsets_beyond_32_bits(rows: int) -> None:
    """Three rows, a gigabyte apart: memory that is never touched is never there."""
    q, x = weight("i8/row/sym", 3, 64), torch.randn(rows, 64)
    far = torch.empty(2**31 + 64, dtype=torch.uint8).as_strided((3, 64), (2**30, 1))
    far.copy_(q.data)
    y = linear_packed(x, far, q.scale, None, None, "i8/row/sym")
    assert torch.equal(y, linear_packed(x, *parts(q), None, "i8/row/sym"))


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_implementation(activation: str | None, dtype: torch.dtype) -> None:
    q, x = weight("u4/g64/asym", 33, 128), torch.randn(2, 3, 128).to(dtype)
    arguments = (x, *parts(q), torch.randn(33, dtype=dtype), "u4/g64/asym", activation)
    choice = linear.choose(*arguments)
    assert (choice.name, choice.refusals) == ("cpu", ())
    close(choice.function(*arguments), linear(*arguments))


def test_dequantize_implementation() -> None:
    q = weight("u4/g64/asym", 33, 128)
    arguments = (*parts(q), "u4/g64/asym", [33, 128], torch.bfloat16)
    choice = dequantize.choose(*arguments)
    assert choice.name == "cpu"
    assert torch.equal(choice.function(*arguments), dequantize(*arguments))


@pytest.mark.parametrize("rows", [1, 5, 70, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(rows: int, dtype: torch.dtype) -> None:
    q, x, before = weight("u4/g64/asym", 100, 1024), torch.randn(rows, 1024).to(dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear_packed(x, *parts(q), None, "u4/g64/asym"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_more_threads_than_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [packed.threads(work) for work in (1, packed.WORK_OF_A_THREAD, 2**40)] == [1, 2, 6]


@pytest.mark.parametrize(("spec", "columns"), [("u4/g64/asym", 256), ("u8/g64/asym", 256), ("u8/g64/asym", 4160)])
def test_both_ways_agree_where_they_meet(spec: str, columns: int) -> None:
    q = weight(spec, 100, columns)
    for dtype in FLOATS:
        few = linear_cpu.most_few_rows(dtype, packed.Reader.of(spec, columns))
        x = torch.randn(few + 1, columns).to(dtype)
        last = linear_packed(x[:few], *parts(q), None, spec)
        many = linear_packed(x, *parts(q), None, spec)[:few]
        close(last, many)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbours_of_very_different_size(dtype: torch.dtype) -> None:
    """Large numbers of x, zeros and the smallest ones, whose scales would not be finite, in neighbouring groups."""
    q, x = weight("u4/g64/asym", 33, 256), torch.randn(3, 256)
    x[:, 64:128] *= 1e4
    x[:, 128:192] = 0
    x[:, 192:] *= 1e-38 if dtype == torch.bfloat16 else 1e-6
    check(x.to(dtype), q)
    x[:, 64:128] = 0
    check(x.to(dtype), q)


def test_infinite_and_nan_inputs_stay_so() -> None:
    q = weight("i4/row/sym", 5, 64)
    for rows, dtype in itertools.product((1, 20), FLOATS):
        for end in (torch.inf, torch.nan):
            x = torch.ones(rows, 64, dtype=dtype)
            x[0, 3] = end
            y = linear_packed(x, *parts(q), None, "i4/row/sym")
            assert not y[0].isfinite().any() or (end is torch.inf and (q.codes()[:, 3] == 8).any())
            assert y[1:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 20])
def test_opcheck(rows: int) -> None:
    q = weight("u4/g64/asym", 17, 128)
    x, bias = torch.randn(2, rows, 128, dtype=torch.bfloat16), torch.randn(17, dtype=torch.bfloat16)
    torch.library.opcheck(linear_packed, (x, *parts(q), bias, "u4/g64/asym"))
    torch.library.opcheck(linear_packed, (x.transpose(0, 1), q.data, q.scale, q.zero, None, "u4/g64/asym"))
    torch.library.opcheck(dequantize_packed, (*parts(q), "u4/g64/asym", [17, 128], torch.bfloat16))


def test_symbolic_rows() -> None:
    q = weight("u4/g64/asym", 17, 128)
    compiled = torch.compile(
        lambda x: linear_packed(x * 2, *parts(q), None, "u4/g64/asym") + 1, backend="aot_eager", dynamic=True
    )
    for rows in (3, 40):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(compiled(x), F.linear(x * 2, q.dequantize()) + 1)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q = weight("u4/g64/asym", 16, 128)
    x, (data, scale, zero), row = torch.randn(2, 128), parts(q), weight("i4/row/sym", 16, 128)

    def reason(
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        spec: str,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> str:
        choice = linear.choose(x, data, scale, zero, bias, spec, activation)
        assert choice.name != "cpu"
        return dict(choice.refusals)["cpu"]

    assert "needs cpu, got meta" in reason(x.to("meta"), scale, zero, "u4/g64/asym")
    assert "not float64" in reason(x.double(), scale, zero, "u4/g64/asym")
    assert "along the output" in reason(x, scale, zero, "u4/o64/asym")
    assert "multiple of 16" in reason(x, scale, zero, "u4/g8/asym")
    assert "run on over the row ends" in reason(x, scale, zero, "u4/g48/asym")
    assert "scale is torch.float64" in reason(x, scale.double(), zero, "u4/g64/asym")
    assert "zero is torch.int8" in reason(x, scale, scale.to(torch.int8), "u4/g64/asym_int")
    assert "bias is torch.float64" in reason(x, scale, zero, "u4/g64/asym", torch.zeros(16, dtype=torch.float64))
    assert "activation nope" in reason(x, scale, zero, "u4/g64/asym", None, "nope")
    assert "no inputs" in reason(x[:, :0], row.scale, None, "i4/row/sym")
    assert "not float64" in dict(dequantize.choose(*parts(q), "u4/g64/asym", [16, 128], torch.float64).refusals)["cpu"]


def test_wrong_shapes_are_not_read() -> None:
    q, x = weight("u4/g64/asym", 16, 128), torch.randn(1, 128)
    data, scale, zero = parts(q)
    linear_packed(x, data, scale, zero, None, "u4/g64/asym")
    for wrong in ((data[:, :-16], scale, zero), (data, scale[:8], zero), (data, scale, zero[:, :1])):
        with pytest.raises(FormatError, match=r"of \(16, 128\) cannot be"):
            linear_cpu.linear_anyhow(x, *wrong, None, "u4/g64/asym")
        with pytest.raises((FormatError, RuntimeError)):  # torch's C interface knows one kind of error
            linear_packed(x, *wrong, None, "u4/g64/asym")


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u4/g32/shift", "i8/row/sym", "i4/tensor/sym", "fp8_e4m3/b16x32/sym"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_op_without_python_gives_the_same(spec: str, dtype: torch.dtype) -> None:
    if linear_cpu.without_python() is None:
        pytest.skip("torch's headers do not compile here")
    q, bias = weight(spec, 48, 128, torch.float16), torch.randn(48)
    for shape in ((128,), (1, 128), (2, 1, 128), (3, 128), (2, 3, 128), (50, 128), (0, 128)):
        x = torch.randn(shape).to(dtype)
        for each in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            arguments = (each, *parts(q), bias, spec)
            assert torch.equal(linear_packed(*arguments), linear_cpu.linear_anyhow(*arguments))
