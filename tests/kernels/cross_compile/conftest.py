"""Compiling Triton kernels for every GPU generation without a GPU.

A kernel is compiled for one representative signature. Its shared memory must fit, and no more than a few bytes of its
registers may be kept in memory.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from qcompile.kernels._gluon import gl
from qcompile.kernels._tuning import Device

# The interpreter does not compile.
collect_ignore_glob = (
    ["test_*"] if os.environ.get("TRITON_INTERPRET") == "1" or not importlib.util.find_spec("triton") else []
)

# Compute capability → shared memory of a program, in KiB. 8.6 has the instructions of 8.0 and the tiles of 8.9.
GPUS = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227, 120: 99}

WIDELY = (80, 90)  # where cases marked `widely` are tried, to save time

# What pointers point to that is no 16-bit float.
POINTED = {
    "data_ptr": "*i32",
    "places_ptr": "*i32",
    "positions_ptr": "*i64",
    "tokens_ptr": "*i64",
    "mask_ptr": "*i1",
    **dict.fromkeys(("parts_ptr", "sums_ptr", "table_ptr", "scores_ptr", "noise_ptr", "best_ptr"), "*fp32"),
}
NUMBERS = ("eps", "scale", "softcap", "tail", "min_p", "factor")

# Sizes that are multiples of 16.
ALIGNED = ("N", "K", "columns", "keys", "capacity")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"widely: compiled for compute capabilities {WIDELY} only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if item.get_closest_marker("widely") and _gpu_of(item) not in WIDELY]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def _gpu_of(item: pytest.Item) -> int:
    assert isinstance(item, pytest.Function)
    return int(str(item.callspec.params["gpu"]))


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def chip(gpu: int) -> Device:
    return Device(gpu // 10, GPUS[gpu] << 10)


@pytest.fixture
def compiled(gpu: int) -> Callable[..., Any]:
    """`compiled(kernel, warps, absent=("bias_ptr",), BLOCK=64)`: `kernel` for this GPU, without those of these
    arguments that it has.

    Pointers are to 16-bit floats unless `types` or POINTED say otherwise.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    short = "fp16" if gpu < 80 else "bf16"

    def type_of(name: str) -> str:
        if name in POINTED:
            return POINTED[name]
        if name.endswith(("scales_ptr", "k_scale_ptr", "v_scale_ptr")):
            return "*fp32"
        if name.endswith("_ptr"):
            return f"*{short}"
        return "fp32" if name in NUMBERS else "i32"

    def compile_it(
        kernel: Any,
        warps: int,
        stages: int = 3,
        absent: tuple[str, ...] = (),
        registers: int | None = None,
        types: Mapping[str, str] = MappingProxyType({}),
        **constants: Any,
    ) -> Any:
        if "PDL" in kernel.arg_names:
            constants["PDL"] = gpu >= 90
        constants.update({name: None for name in absent if name in kernel.arg_names})
        signature, attributes = {}, {}
        for i, name in enumerate(kernel.arg_names):
            signature[name] = "constexpr" if name in constants else types.get(name) or type_of(name)
            aligned = name.endswith(("_ptr", "_batch", "_head", "_row", "_stride")) or name in ALIGNED
            if aligned and name not in constants:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
        options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)

    return compile_it


@pytest.fixture
def assert_fits(chip: Device, told: Callable[[Any, str], str]) -> Callable[..., None]:
    """`assert_fits(kernel, stack)`: in shared memory, with at most so many bytes of local memory a thread."""

    def check(kernel: Any, stack: int = 32) -> None:
        assert kernel.metadata.shared <= chip.shared_bytes
        assert max(map(int, re.findall(r"STACK:(\d+)", told(kernel, "-res-usage"))), default=0) <= stack

    return check


@pytest.fixture
def told() -> Callable[[Any, str], str]:
    """`told(kernel, "-sass")`: what cuobjdump says of a compiled kernel, or nothing where there is none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def ask(kernel: Any, option: str) -> str:
        if not tool.exists():
            return ""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            return subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout

    return ask


@pytest.fixture
def described() -> Callable[[str, int, int], str]:
    """`described("bf16", 64, 128)`: the type of what the copy engine takes 64 rows of 128 columns of at a time."""

    def describe(element: str, rows: int, columns: int) -> str:
        return (
            f"tensordesc<{element}[{rows},{columns}],{gl.NVMMASharedLayout(128, 16 if element == 'bf16' else 8, 2)!r}>"
        )

    return describe


@pytest.fixture
def assert_overlaps(told: Callable[[Any, str], str]) -> Callable[[Any], None]:
    """ptxas makes each product of warp groups wait for the one before it where it cannot tell who writes the sums
    (C7515)."""

    def check(kernel: Any) -> None:
        code = told(kernel, "-sass")
        products = code.count("GMMA.64x")
        assert not products or code.count("WARPGROUP.DEPBAR") < products

    return check
