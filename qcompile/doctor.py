"""What qcompile finds on this machine: versions, devices, a compiler, and which kernel would run each spec."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate

from qcompile import _torch
from qcompile.algorithms import quantize
from qcompile.models import fast_dtype
from qcompile.ops.registry import MEANING, OPS
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.tuned import account

PACKAGES = ("qcompile", "torch", "triton", "transformers", "hqq", "safetensors", "gguf")
SPECS = (
    *(f"u{bits}/g64/asym" for bits in (8, 6, 5, 4, 3, 2, 1)),
    "ternary/g64/asym",
    "i8/row/sym",
    "i4/g128/sym",
    "u4/g64/asym_int",
    "u4/o64/asym",
)
ROWS, COLUMNS = 64, 256


@dataclass(frozen=True)
class Kernel:
    """Which implementation of `linear` runs a spec on a device for one token and for many, and who refused and why; and
    which one of `linear_w8a8` multiplies many tokens whose activations are rounded to i8."""

    spec: str
    device: str
    one: str
    many: str
    rounded: str
    refusals: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Findings:
    """What was found. `asked` is whether the user named the specs; `tiles` says where those of linears come
    from, on a CPU who uses its matrix instructions."""

    versions: dict[str, str]
    devices: dict[str, str]
    compiler: str | None
    kernels: tuple[Kernel, ...]
    asked: bool = False
    tiles: dict[str, str] = field(default_factory=dict)

    @property
    def slow(self) -> list[Kernel]:
        """The rows without a kernel."""
        return [kernel for kernel in self.kernels if MEANING in (kernel.one, kernel.many)]

    @property
    def ok(self) -> bool:
        """Whether models compile here, and all specs that the user named have kernels, or any if none was named."""
        enough = not self.slow if self.asked else len(self.slow) < len(self.kernels)
        return self.compiler is None and enough

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        tiles = [(f"{name} tiles", text) for name, text in self.tiles.items()]
        rows = [*self.versions.items(), *self.devices.items(), *tiles, ("C++ compiler", self.compiler or "found")]
        kernels = tabulate(
            [
                [k.spec, k.device, k.one, k.many, k.rounded, "; ".join(f"{n}: {why}" for n, why in k.refusals)]
                for k in self.kernels
            ],
            headers=["spec of a linear", "device", "one token", "many tokens", "of i8 activations", "refused"],
        )
        return f"{tabulate(rows, tablefmt='plain')}\n\n{kernels}\n\n{self._verdict()}"

    def _verdict(self) -> str:
        if self.compiler is not None:
            return f"{self.compiler}: install g++ or clang, without which models run uncompiled"
        if self.slow:
            return f"{MEANING} is plain torch: correct everywhere, and slow"
        return "all of these specs have a kernel here"


def examine(specs: Sequence[str] = ()) -> Findings:
    """Look at this machine, and which kernel runs `specs` or else SPECS. Builds the C++ that it asks about, once."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    compiler = _torch.compiler_available()
    kernels = tuple(_kernel(spec, name) for name in names for spec in specs or SPECS)
    devices = {name: describe_device(name) for name in names}
    tiles = {name: text for name in names if (text := account(torch.device(name))) is not None}
    return Findings(versions(), devices, compiler, kernels, bool(specs), tiles)


def versions() -> dict[str, str]:
    """Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    # Its metadata leave out the build, such as +cu130, where it came from PyPI.
    return {**found, "torch": str(torch.__version__)}


def describe_device(name: str) -> str:
    """A device in a line."""
    device = torch.device(name)
    if device.type == "cuda":
        at = torch.cuda.get_device_properties(device)
        return f"{at.name}, sm_{at.major}{at.minor}, {at.total_memory / 2**30:.0f} GiB"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    dtype = str(fast_dtype()).removeprefix("torch.")
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {cores}, fast in {dtype}"


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _kernel(spec: str, device: str) -> Kernel:
    parsed = QSpec.parse(spec)
    dtype = torch.bfloat16 if device != "cpu" else fast_dtype()
    weight = quantize(torch.linspace(-1, 1, ROWS * COLUMNS, dtype=dtype).reshape(ROWS, COLUMNS), parsed, "rtn")
    parts = (weight.data, weight.scale, weight.zero)
    # Scales that are quantized themselves are unpacked before the kernel.
    sides = [part.dequantize() if isinstance(part, QTensor) else part for part in parts]
    sides = [side if side is None else side.to(device) for side in sides]
    chosen = [
        OPS["linear"].choose(torch.zeros(rows, COLUMNS, dtype=dtype, device=device), *sides, None, spec, None)
        for rows in (1, 512)
    ]
    refusals = dict(refusal for choice in chosen for refusal in choice.refusals)
    x = torch.zeros(ROWS, COLUMNS, dtype=dtype, device=device)
    rounded = OPS["linear_w8a8"].choose(x, None, "i8/token/dynamic", *sides, None, spec, None)
    return Kernel(spec, device, chosen[0].name, chosen[1].name, rounded.name, tuple(refusals.items()))
