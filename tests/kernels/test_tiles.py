"""_tiles: kernels that are launched are compiled once for all numbers of rows."""

import importlib
import pkgutil
from types import ModuleType

import pytest

from qcompile import kernels
from qcompile.kernels._tiles import COUNTS, INTERPRET

jit = pytest.importorskip("triton.runtime.jit")
FASTER_BY_SIXTEENS = ["_wgmma"]
MODULES = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]


def launched(module: ModuleType) -> list:
    found = [one for one in vars(module).values() if isinstance(one, jit.JITFunction)]
    return [one for one in found if one.fn.__module__ == module.__name__ and "PDL" in one.arg_names]


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", MODULES)
def test_whether_sixteen_divides_a_count_does_not_matter(name: str) -> None:
    for kernel in launched(importlib.import_module(name)):
        if kernel.fn.__name__ in FASTER_BY_SIXTEENS:
            continue
        counts = [parameter for parameter in kernel.params if parameter.name in COUNTS and not parameter.is_constexpr]
        assert all(one.do_not_specialize or one.do_not_specialize_on_alignment for one in counts), kernel.fn.__name__


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_kernels_are_found() -> None:
    assert sum(len(launched(importlib.import_module(name))) for name in MODULES) > 20
