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

from qcompile.algorithms import quantize
from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.ops.chain import Cache, Given, Result, Step
from qcompile.ops.row_codes import quantize_rows
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
    "test_scores.py",
    "test_draw.py",
    "test_likeliest_cuda.py",
    "test_append.py",
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


class DecodeLayer:
    """A layer of decoding, of so many query rows, sequences, heads of `width` columns and heads of keys."""

    HIDDEN, CAPACITY = 96, 40
    CACHES, SCALES = (Cache(0), Cache(1)), (Cache(2), Cache(3))

    def __init__(
        self, dtype: torch.dtype, batch: int = 1, length: int = 1, heads: int = 4, kv: int = 2, width: int = 32,
        spec: str = "u4/g32/asym", mask: tuple[int, ...] | None = (1, 1), angles: int = 3,
        codes: torch.dtype | None = None, fixed: bool = False, rounding: tuple[str, ...] = (),
    ):  # fmt: skip
        self.dtype, self.tensors, self.steps, self.rounding = dtype, list[Tensor](), list[Step](), rounding
        wide = (heads + 2 * kv) * width
        x = self.give(torch.randn(batch, length, self.HIDDEN))
        y = self.linear(x, wide, self.HIDDEN, spec, norm=True)

        def part(first: int, count: int) -> Result:
            strides = (length * wide, width, wide, 1)
            return Result(y.step, first * width, (batch, count, length, width), strides)

        cos, sin = (self.give(torch.randn(*(batch, 1)[4 - angles :], length, width)) for _ in range(2))
        self.positions = self.give(torch.arange(17, 17 + length))
        self.steps.append(
            Step(
                "rope_into_cache",
                (
                    *(part(0, heads), part(heads, kv), part(heads + kv, kv), cos, sin, *self.CACHES, self.positions),
                    *((*self.SCALES, fixed) if codes else ()),
                ),
            )
        )
        shape = batch, heads, length, width
        q = Result(1, 0, shape, tuple(torch.empty(shape).stride()))
        hides = (
            None if mask is None else self.give(torch.arange(self.CAPACITY).expand(*mask, length, self.CAPACITY) < 20)
        )
        self.steps.append(
            Step("attention", (q, *self.CACHES, hides, False, 0.2, None, *(self.SCALES if codes else ())))
        )
        if length == 1:
            columns = heads * width
            a = Result(2, 0, (batch, 1, columns), (columns, columns, 1))
            o = self.linear(a, self.HIDDEN, columns, spec, residual=x)
            h = self.linear(o, 2 * 64, self.HIDDEN, spec, norm=True, gated=True)
            self.linear(h, self.HIDDEN, 64, spec, residual=o)
        self.caches = [torch.randn(batch, kv, self.CAPACITY, width).to(dtype) for _ in range(2)]
        if codes:
            pairs = [quantize_rows(cache, codes) for cache in self.caches]
            self.caches = [side for sides in zip(*pairs) for side in sides]

    def give(self, tensor: Tensor) -> Given:
        self.tensors.append(tensor.to(self.dtype) if tensor.is_floating_point() else tensor)
        return Given(len(self.tensors) - 1)

    def linear(
        self, x: Any, outputs: int, columns: int, spec: str, norm: bool = False, residual: Any = None,
        gated: bool = False,
    ) -> Result:  # fmt: skip
        q = quantize(torch.randn(outputs, columns) * columns**-0.5, QSpec.parse(spec), "rtn")
        sides = [None if side is None else self.give(side) for side in (q.data, q.scale, q.zero)]
        normed = (self.give(torch.randn(columns)), 1e-5) if norm else (None, None)
        activation = "silu" if gated else None
        self.steps.append(
            Step(
                "fused_linear",
                (x, *normed, 0.0, *sides, None, residual, str(q.spec), activation, gated, *self.rounding),
            )
        )
        sizes = self.tensors[0].shape[0], self.tensors[0].shape[1], outputs // (2 if gated else 1)
        return Result(len(self.steps) - 1, 0, sizes, tuple(torch.empty(sizes).stride()))

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.tensors, [cache.clone() for cache in self.caches], "\n".join(map(str, self.steps))


@pytest.fixture
def decode_layer() -> type[DecodeLayer]:
    return DecodeLayer
