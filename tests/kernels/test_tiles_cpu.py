"""Products by matrix instructions against the ops' meanings: in plain C++ anywhere, as they are where they exist."""

from __future__ import annotations

import itertools
import random
import subprocess
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.kernels import linear_w8a8_cpu as of_codes
from qcompile.kernels._cpp import text_of
from qcompile.kernels.linear_cpu import linear_packed
from qcompile.quant.activation import ActivationSpec, activation_codes
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Columns: one unit, ends within one, ends of panels, groups that end within units.
FLOATS = {
    "u4/g64/asym": (64, 192, 576),
    "u4/g128/asym_int": (128, 640),
    "u4/g32/asym": (32, 96, 544),
    "u4/g16/asym": (16, 80, 528),
    "u4/g48/shift": (48, 576),
    "i4/row/sym": (1, 33, 100, 1030),
    "i4/tensor/sym": (65,),
    "nf4/g64/sym": (64, 576),
    "nf4/row/sym": (7, 513),
    "u8/g64/asym": (64, 576),
    "u8/g80/asym_int": (80, 560),
    "i8/row/sym": (1, 100, 1030),
    "i8/b5x64/sym": (128, 576),
}
CODES = {spec: columns for spec, columns in FLOATS.items() if spec[:3] != "nf4"}
OUTPUTS = (1, 15, 16, 17, 32, 49, 300)
ROWS = (9, 16, 17, 32, 33, 64, 65)


@pytest.fixture(params=["in plain C++", "as they are"], autouse=True)
def tiles(request: pytest.FixtureRequest, compile_cpu_code: Callable[[str], None]) -> None:
    compile_cpu_code("#define EMULATE_TILES" if request.param == "in plain C++" else "")
    if (
        packed.missing(QSpec.parse("u4/g64/asym").element)
        or packed.Reader.of("u4/g64/asym", 64).many_rows_tiles is None
    ):
        pytest.skip("no matrix instructions here")


def weight(text: str, rows: int, columns: int, side: torch.dtype = torch.float32) -> QTensor:
    spec = QSpec.parse(text)
    codes = torch.randint(spec.element.levels, (rows, columns), dtype=torch.uint8)
    shape, zero = spec.scale_shape(rows, columns), None
    scale = (torch.rand(shape) * 0.02 + 0.01).to(side)
    if spec.zero is Zero.SHIFT:
        zero = (-torch.rand(shape) * 0.1).to(side)
    elif spec.zero is Zero.INT:
        zero = torch.randint(spec.element.levels, shape, dtype=torch.uint8)
    elif spec.zero is Zero.FLOAT:
        zero = (torch.rand(shape) * (spec.element.levels - 1)).to(side)
    return QTensor.from_codes(spec, codes, scale, zero)


def check_floats(x: Tensor, q: QTensor, bias: Tensor | None) -> None:
    assert linear_cpu.function_for(x.shape[0], x.dtype, packed.Reader.of(str(q.spec), q.columns)) is not None
    y = linear_packed(x, q.data, q.scale, q.zero, bias, str(q.spec))
    added = None if bias is None else bias.double()
    exact = F.linear(x.double(), q.dequantize(torch.float64), added)
    plain = F.linear(x.double(), q.dequantize(torch.bfloat16).double(), added)
    allowed = 1.5 * (plain - exact).norm() + 2.0**-8 * exact.norm()
    assert (y - exact).norm() <= allowed, f"{q.spec} {tuple(q.shape)} x {tuple(x.shape)}"


@pytest.mark.parametrize("spec", FLOATS)
def test_floats(spec: str) -> None:
    for rows, columns in itertools.product(ROWS, FLOATS[spec]):
        q = weight(spec, random.choice(OUTPUTS), columns, random.choice((torch.float32, torch.bfloat16, torch.float16)))
        bias = random.choice((None, torch.randn(q.rows), torch.randn(q.rows).bfloat16()))
        check_floats((torch.randn(rows, columns) + random.choice((0, 1))).bfloat16(), q, bias)


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return activation_codes(x, None, ActivationSpec.parse("i8/token/dynamic"))


@pytest.mark.parametrize("spec", CODES)
def test_codes(spec: str) -> None:
    for rows, columns in itertools.product(ROWS, CODES[spec]):
        if packed.Reader.of(spec, columns).many_codes_tiles is None:
            assert columns > QSpec.parse(spec).granularity.size % 64 > 0  # type: ignore[union-attr]
            continue
        q, x = weight(spec, random.choice(OUTPUTS), columns), torch.randn(rows, columns) + 0.5
        bias = random.choice((None, torch.randn(q.rows)))
        codes, step = codes_of(x)
        y = of_codes.linear_codes(codes, step, q.data, q.scale, q.zero, bias, spec, torch.float32)
        exact = (codes.double() * step.double()) @ q.dequantize(torch.float64).T
        exact = exact if bias is None else exact + bias.double()
        assert (y - exact).norm() <= 1e-6 * exact.norm() + 1e-6, f"{spec} {tuple(q.shape)} x {tuple(x.shape)}"


@pytest.mark.parametrize("columns", [4096, 70000])
def test_extremes_of_codes_are_summed_exactly(columns: int) -> None:
    q = QTensor.from_codes(
        QSpec.parse("u8/row/asym"), torch.full((17, columns), 255, dtype=torch.uint8), torch.ones(17, 1),
        torch.zeros(17, 1),
    )  # fmt: skip
    codes, step = torch.full((33, columns), -127, dtype=torch.int8), torch.ones(33, 1)
    y = of_codes.linear_codes(codes, step, q.data, q.scale, q.zero, None, "u8/row/asym", torch.float32)
    assert ((y / (-127 * 255 * columns) - 1).abs() < 1e-6).all()


def test_more_rows_than_a_thread_takes_at_a_time() -> None:
    q, x = weight("u4/g64/asym", 40, 128), torch.randn(1100, 128)
    check_floats(x.bfloat16(), q, None)
    codes, step = codes_of(x)
    y = of_codes.linear_codes(codes, step, q.data, q.scale, q.zero, None, "u4/g64/asym", torch.float32)
    exact = (codes.double() * step.double()) @ q.dequantize(torch.float64).T
    assert (y - exact).norm() <= 1e-6 * exact.norm()


def test_x_and_weights_of_larger_buffers() -> None:
    q, x = weight("u4/g64/asym", 100, 192), torch.randn(40, 300).bfloat16()[:, 17:209]
    check_floats(x, q, None)
    wide = torch.cat([q.data, q.data], dim=1)[:, : q.data.shape[1]]
    sides = [side.narrow(0, 37, 20) for side in (wide, q.scale, q.zero)]
    whole = linear_packed(x, q.data, q.scale, q.zero, None, "u4/g64/asym")
    assert torch.equal(linear_packed(x, *sides, None, "u4/g64/asym"), whole[:, 37:57])


@pytest.mark.parametrize("rows", [17, 200])
def test_threads_do_not_change_the_result(rows: int) -> None:
    q, x, before = weight("u4/g64/asym", 700, 640), torch.randn(rows, 640), torch.get_num_threads()
    sides, results = (q.data, q.scale, q.zero, None, "u4/g64/asym"), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            floats = linear_packed(x.bfloat16(), *sides)
            results.append((floats, of_codes.linear_codes(*codes_of(x), *sides, torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_infinite_and_nan_rows_stay_alone() -> None:
    q, x = weight("i4/row/sym", 5, 64), torch.ones(20, 64).bfloat16()
    x[3, 3], x[4, 5] = torch.inf, torch.nan
    y = linear_packed(x, q.data, q.scale, None, None, "i4/row/sym")
    assert y[4].isnan().all() and not y[3].isfinite().all()
    assert y[[*range(3), *range(5, 20)]].isfinite().all()


def test_the_instructions_are_known_to_the_compiler(tmp_path) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    source, flags = tmp_path / "tiles.cpp", ["-std=c++20", "-fopenmp", "-march=sapphirerapids"]
    source.write_text("")
    command = [get_cpp_compiler(), *flags, "-O1", "-c", str(source), "-o", str(tmp_path / "tiles.o")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this compiler does not know the processor")
    source.write_text("#define BITS 4\n" + text_of(*packed.SOURCES))
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert b"tdpbf16ps" in subprocess.run(["objdump", "-d", tmp_path / "tiles.o"], capture_output=True).stdout
