"""One linear layer on the CPU: packed weights against torch's own linear, from one row of x to many.

    python -m benchmarks.linear_cpu [--dtype bfloat16] [--specs u4/g64/asym i8/row/sym] [--shapes 16384x2048 …]

A weight is read as in a model, where other layers have pushed it out of the cache: copies of it take turns, as many as
fill 512 MB in float, 64 at most. ATen's int4 kernel has its own packing of the same codes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from benchmarks.record import device_slug, record
from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels.linear_cpu import linear_packed
from qcompile.quant.spec import QSpec, Zero

SHAPES = ("16384x2048", "2048x8192", "4096x4096", "49152x576", "1536x576", "576x1536", "576x576")
SPECS = ("u4/g64/asym", "i4/row/sym", "u8/g64/asym", "i8/row/sym")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
ATEN_ROWS = 16

Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where others use the machine as well")
    parser.add_argument("--note", default="", help="what a reader should know of the machine")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    clock = time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
        clock = time.thread_time
    for spec in options.specs:
        if reason := packed.missing(QSpec.parse(spec).element):
            raise SystemExit(reason)
    lines = []
    for shape in options.shapes:
        outputs, columns = map(int, shape.split("x"))
        lines += measure(outputs, columns, options.specs, options.rows, dtype, options.seconds, clock)
    table = tabulate(lines, headers=["outputs × inputs", "weight", *map(str, options.rows)], tablefmt="github")
    note = (
        f"x in {options.dtype}. The lines `torch, ms` are milliseconds of torch's linear; all others say how many "
        f"times faster than it, in the same rounds, medians{' of the CPU time of one thread' * options.cpu_time}. "
        f"Columns: rows of x. {options.note}"
    )
    print(f"{note}\n\n{table}")
    if options.record:
        name = f"linear-cpu-{options.dtype}-{device_slug('cpu')}"
        print(record(name, "One linear layer on the CPU", f"{note}\n\n{table}", "cpu"))


def measure(
    outputs: int,
    columns: int,
    specs: Sequence[str],
    rows: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
    clock: Clock,
) -> list[list[str]]:
    copies = max(1, min(64, 512_000_000 // (outputs * columns * dtype.itemsize)))
    # Random bytes are a packed weight as good as any.
    weights = {spec: [random_weight(spec, outputs, columns) for _ in range(copies)] for spec in specs}
    dense = [torch.randn(outputs, columns).to(dtype) for _ in range(copies)]
    aten = [pack_for_aten(outputs, columns, dtype) for _ in range(copies)] if columns % 64 == 0 else []
    table = {name: [f"{outputs} × {columns}", name] for name in ("torch, ms", "ATen int4/g64", *specs)}
    for count in rows:
        x = torch.randn(count, columns).to(dtype)
        ways = {"torch, ms": taking_turns(lambda w, x=x: F.linear(x, w), dense)}
        if aten and count <= ATEN_ROWS:
            ways["ATen int4/g64"] = taking_turns(
                lambda w, x=x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 64, w[1]), aten
            )
        for spec, copy in weights.items():
            ways[spec] = taking_turns(lambda w, x=x, spec=spec: linear_packed(x, *w, None, spec), copy)
        times = medians(ways, seconds, clock)
        for name, line in table.items():
            if name == "torch, ms":
                line.append(f"{times[name] * 1e3:.3f}")
            else:
                line.append(f"{times['torch, ms'] / times[name]:.2f}" if name in times else "")
    return list(table.values())


def random_weight(text: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    spec = QSpec.parse(text)
    data = torch.randint(256, (rows, packed.row_bytes(columns, spec.element.bits)), dtype=torch.uint8)
    shape = spec.scale_shape(rows, columns)
    zero = None if spec.zero is Zero.NONE else torch.rand(shape).to(torch.bfloat16) * (spec.element.levels - 1)
    return data, torch.rand(shape).to(torch.bfloat16) / 100, zero


def pack_for_aten(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(16, (rows, columns), dtype=torch.int32)
    scales_and_zeros = torch.rand(columns // 64, rows, 2).to(dtype) / 100
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales_and_zeros


def taking_turns(function: Callable[[Any], object], weights: list) -> Callable[[], object]:
    turns = itertools.cycle(weights)
    return lambda: function(next(turns))


def medians(ways: dict[str, Callable[[], object]], seconds: float, clock: Clock) -> dict[str, float]:
    """Seconds of a call, for each way. They take turns, so that a slow moment of the machine hits all of them."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 7:
        for name, call in ways.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
