"""Where the Triton kernels' tests run: on a GPU, or in Triton's interpreter (see test_interpreter.py)."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

TRITON_TESTS = [
    "test_linear_gemv.py",
    "test_linear_gemm.py",
    "test_linear_w8a8_cuda.py",
    "test_scale_sums.py",
    "test_dequantize_gpu.py",
    "test_norm.py",
    "test_gated_act.py",
    "test_gated_codes.py",
    "test_rope.py",
    "test_attention_decode.py",
    "test_attention_prompt.py",
    "test_attention_codes.py",
    "test_rope_into_cache.py",
    "test_draw.py",
    "test_attention_into_cache.py",
]
GPU = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if GPU or INTERPRETER else TRITON_TESTS

if INTERPRETER:
    from triton.runtime import interpreter

    # A third of the time each: looking for overflows, which show in the numbers, and preparing triton.language anew at
    # each call of a helper.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    _prepare = functools.cache(interpreter._patch_lang)

    def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        _prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter, which is slow, the cases of a test take the dtypes in turn; a GPU has the whole product."""
    if not INTERPRETER:
        return
    tests: dict[tuple[Path, str], dict[str, dict[str, pytest.Item]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and "dtype" in getattr(item, "fixturenames", ()):
            dtype = item.callspec.params["dtype"]
            cases = tests.setdefault((item.path, item.originalname), {})
            cases.setdefault(item.name.replace(str(dtype), "", 1), {})[dtype] = item
    left = set()
    for cases in tests.values():
        both = [case for case in cases.values() if {"float32", "float16"} <= case.keys()]
        for number, case in enumerate(both if len(both) > 1 else ()):
            # By the parity of the number's bits: every other case often is of one kind.
            left.add(case[("float16", "float32")[number.bit_count() % 2]])
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


# The norm of the error by the norm of the result: the rounding of the result, and of the weight where `rounded`.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture
def triton_tests() -> list[str]:
    return TRITON_TESTS


@pytest.fixture
def device() -> str:
    if not GPU and not INTERPRETER:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return "cuda" if GPU else "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.param == "bfloat16" and device == "cpu":
        pytest.skip("the interpreter gets bfloat16 wrong")
    return getattr(torch, request.param)


@pytest.fixture
def random_tensor(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    def make(*shape: int) -> Tensor:
        return (torch.randn(shape) + 0.25).to(device, dtype)

    return make


@pytest.fixture
def random_weight(device: str) -> Callable[..., QTensor]:
    """`random_weight("u4/g64/asym", rows, columns, torch.float16)`: random codes, scales and zeros of that dtype.

    Codes that are inf or NaN are left out.
    """

    def make(spec: str, rows: int, columns: int, side: torch.dtype) -> QTensor:
        parsed = QSpec.parse(spec)
        groups, levels = parsed.scale_shape(rows, columns), parsed.element.levels
        codes = torch.randint(0, levels, (rows, columns), dtype=torch.uint8, device=device)
        codes = torch.where(parsed.element.decode(codes, torch.float32).isfinite(), codes, 1)
        scale = (torch.rand(groups) * 0.02 + 0.005).to(device, side)
        zero = None
        if parsed.zero is Zero.FLOAT:
            zero = (torch.rand(groups) * levels).to(device, side)
        elif parsed.zero is Zero.INT:
            zero = torch.randint(0, levels, groups, dtype=torch.uint8, device=device)
        elif parsed.zero is Zero.SHIFT:
            zero = (torch.randn(groups) * 0.02).to(device, side)
        return QTensor.from_codes(parsed, codes, scale, zero)

    return make


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """`assert_close(got, want)` with `want` in float64; `rounded` where the weight was rounded as well."""

    def check(got: Tensor, want: Tensor, rounded: bool = False) -> None:
        assert got.shape == want.shape
        assert torch.isfinite(got).all()
        error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
        assert error <= TOLERANCE[got.dtype] * (2 if rounded else 1), f"relative error {error:.1e}"

    return check


@pytest.fixture
def compile_cpu_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`compile_cpu_code("#undef __AVX512F__")`: the C++ for packed weights has this before it until the test's end."""
    caches, load = (packed.library, packed.missing, packed.Reader.of, linear_cpu.make_known), packed.load_cpp

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()
        if (op := linear_cpu.without_python()) is not None:
            op.forget()

    def compile_behind(text: str) -> None:
        monkeypatch.setattr(packed, "load_cpp", lambda source: load(f"{text}\n{source}"))
        forget()

    yield compile_behind
    forget()


@pytest.fixture
def chosen_for() -> Callable[..., None]:
    """`chosen_for(tile, query, value)` skips what attention_tile never chooses: such programs would not fit into
    registers or shared memory. The interpreter takes them all the same."""

    def check(tile: AttentionTile, query: Tensor, value: Tensor) -> None:
        wide = max(query.shape[3], value.shape[3]) > 128
        if query.is_cuda and (tile.beside > 1 or tile.cluster) and (wide or query.itemsize > 2):
            pytest.skip("warps are side by side, and programs in clusters, for up to 128 columns of two bytes")

    return check
