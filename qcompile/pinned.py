"""What changes with its version alone, and where a process runs: the part of a fingerprint that no model decides.

Python's own library, torch, transformers and what they need are not read; their versions are, and of those that trace
or run a forward the sizes and times of files. Somebody may exchange their functions: `exchanged` finds others' ones,
`bindings` tells which of their own have which names.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
import sysconfig
import types
from collections.abc import Collection, Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import torch

from qcompile.installed import installed
from qcompile.kernels._cpp import processor_features
from qcompile.ops.registry import OPS

PINNED = frozenset({"torch", "triton", "numpy", "sympy", "transformers", "accelerate", "peft", "qcompile"})
# Where somebody may exchange what a forward calls, beside the modules of the classes met.
OPEN = re.compile(r"transformers\.(?!models\b|tokenization|utils\b|trainer|data\b|generation\b)|torch\.nn\.functional$")
# What the models of transformers share, always there with one of them.
SHARED = {f"transformers.{name}" for name in ("activations", "cache_utils", "masking_utils", "modeling_utils")}
SHARED |= {"transformers.integrations.sdpa_attention", "transformers.modeling_rope_utils", "torch.nn.functional"}
FUNCTIONS = (types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial)


def is_pinned(x: Any) -> bool:
    """Whether a function or a class is in a file that changes with a version."""
    if isinstance(x, types.FunctionType):
        file = x.__code__.co_filename
    else:
        file = getattr(sys.modules.get(x.__module__), "__file__", None) or "<>"
    if not file.startswith("<"):
        return file.startswith(_pinned_folders()) or file in _pinned_files()
    root = str(x.__module__).partition(".")[0]  # made by a text, as namedtuples are, or built in
    return root in PINNED or root in sys.stdlib_module_names or root.startswith("namedtuple_")


def is_pinned_module(name: str) -> bool:
    """Whether all modules of this name's package change with a version."""
    root = name.partition(".")[0]
    spec = _spec(root)
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        return root in sys.builtin_module_names or (spec is not None and root in sys.stdlib_module_names)
    return spec.origin.startswith(_pinned_folders()) or spec.origin in _pinned_files()


def inside(x: Any) -> list[Any]:
    """What a function and its kind are made of, code aside."""
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
        return [*cells, x.__defaults__, x.__kwdefaults__]
    if isinstance(x, property):
        return [x.fget, x.fset]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, types.ModuleType):
        return [x.__name__]
    return [x.__func__, getattr(x, "__self__", None)]


@functools.cache
def _needed(optional: bool = False) -> frozenset[str]:
    """Packages that the pinned ones need here, whatever extras were asked for; with `optional` those of extras too."""
    from packaging.requirements import Requirement  # which transformers needs

    lines = [Requirement(line) for package in PINNED for line in _requires(package)]
    here = [line for line in lines if optional or line.marker is None or line.marker.evaluate({"extra": ""})]
    return frozenset(line.name.replace("-", "_") for line in here)


@functools.cache
def _places() -> tuple[str, ...]:
    library = sysconfig.get_path("stdlib")
    names = [name for name in os.listdir(library) if name not in ("site-packages", "dist-packages")]
    return _with_targets([*_homes(PINNED | _needed()), *(os.path.join(library, name) for name in names)])


def _homes(packages: Collection[str]) -> list[str]:
    """The folders of packages, or files, as far as they are there."""
    specs = [spec for package in packages if (spec := _spec(package))]
    return [str(place) for spec in specs for place in spec.submodule_search_locations or (spec.origin or "<>",)]


def _with_targets(places: Collection[str]) -> tuple[str, ...]:
    return tuple(path for place in places for path in (place, os.path.realpath(place)))


@functools.cache
def _pinned_folders() -> tuple[str, ...]:
    return tuple(place + os.sep for place in _places() if os.path.isdir(place))


@functools.cache
def _pinned_files() -> frozenset[str]:
    return frozenset(place for place in _places() if not os.path.isdir(place))


@functools.cache
def _optional() -> tuple[str, ...]:
    places = _with_targets(_homes(_needed(optional=True)))
    return tuple(place + os.sep if os.path.isdir(place) else place for place in places)


@functools.cache
def _versions() -> list[tuple[str, str]]:
    return [(package, _version(package)) for package in sorted(PINNED | _needed(optional=True))]


def exchanged(modules: Collection[str]) -> list[tuple[str, Any]]:
    """What others have put into pinned modules, by name: functions, methods of classes, entries of registries."""
    names = sorted(name for name in sys.modules if name in modules or OPEN.match(name))
    members = (member for name in names for member in _members(name, getattr(sys.modules[name], "__dict__", {})))
    return [(path, x) for path, x in members if _is_foreign(x)]


def bindings(modules: Collection[str]) -> list[str]:
    """Which functions have which names in these pinned modules and in those that models share, in their classes and
    registries too, and the numbers among their names."""
    lines = []
    for name in sorted(SHARED.intersection(sys.modules).union(modules)):
        scope = getattr(sys.modules.get(name), "__dict__", {})
        lines += [f"{path} {_origin(x)}" for path, x in _members(name, scope) if " at 0x" not in path]
        lines += [f"{name}.{key} {x!r}" for key, x in scope.items() if isinstance(x, (bool, int, float))]
    return lines


def _origin(x: Any) -> str:
    if isinstance(x, types.FunctionType):
        return f"{x.__module__}.{x.__qualname__}"
    return " ".join(_origin(each) for each in inside(x) if isinstance(each, FUNCTIONS))


def _members(path: str, scope: Mapping[Any, Any], depth: int = 2) -> Iterator[tuple[str, Any]]:
    entries = dict.items(scope) if isinstance(scope, dict) else scope.items()  # some registries import what they give
    for name, x in list(entries):
        where = f"{path}.{name}"
        if isinstance(x, FUNCTIONS):
            yield where, x
        elif isinstance(x, type):
            if depth and x.__module__ == path:
                yield from _members(where, vars(x), depth - 1)
        elif depth and isinstance(x, dict):
            yield from _members(where, x, depth - 1)
        elif depth and type(x).__module__ == path and hasattr(x, "__dict__"):
            yield from _members(where, vars(x), depth - 1)


def _is_foreign(x: Any, depth: int = 4) -> bool:
    """Whether a function, or one wrapped in it, is in no file of a pinned package, nor of one that these import from
    where it is there, as transformers does from torchvision."""
    if isinstance(x, types.FunctionType) and not is_pinned(x) and not _is_optional(x):
        return True
    return bool(depth) and any(isinstance(each, FUNCTIONS) and _is_foreign(each, depth - 1) for each in inside(x))


def _is_optional(x: types.FunctionType) -> bool:
    return x.__code__.co_filename.startswith(_optional())


def environment() -> list[Any]:
    """Where this runs: versions, the processor and the GPUs, and the state of torch that a trace or a choice reads."""
    sdp = torch.backends.cuda
    state: list[Any] = [
        sys.version,
        platform.machine(),
        sorted(processor_features()),
        _versions(),
        installed(("qcompile", "torch", "transformers", "accelerate", "peft", "triton")),
        os.environ.get("TRITON_INTERPRET"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,  # pyright: ignore[reportAttributeAccessIssue]
        [sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled()],
        [(each.name, each.function, each.refuses) for op in OPS.values() for each in op.implementations],
    ]
    if torch.cuda.is_available():
        state += [torch.version.cuda, torch.cuda.current_device()]
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            state += [gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count, gpu.total_memory]
    return state


def _requires(package: str) -> list[str]:
    try:
        return list(requires(package) or ())
    except PackageNotFoundError:
        return []


def _spec(package: str) -> ModuleSpec | None:
    try:
        return find_spec(package)
    except (ImportError, ValueError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
