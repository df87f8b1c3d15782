"""Linears on the CPU over the number of rows: against torch's bfloat16, and the largest step from one to the next.

    python -m benchmarks.linear_rows_cpu [--specs u4/g64/asym] [--shapes 2048x2048 …] [--activations i8/token/dynamic]

Every number of rows is measured, each way once a round, so that neighbours are compared within the same seconds. A step
is the time of one row more over the time without it. Copies of a weight take turns, one at each call with any number of
rows: else a cache that holds one round's copies would answer for the memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.linear_cpu import random_weight
from benchmarks.record import device_slug, record
from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels.linear_cpu import linear_packed
from qcompile.kernels.linear_w8a8_cpu import linear_codes, way_of
from qcompile.quant.activation import ActivationSpec, activation_codes
from qcompile.quant.spec import QSpec

SHAPES = ("2048x2048", "8192x2048", "2048x8192")
SPECS = ("u4/g64/asym", "u8/g64/asym")
SHOWN = (2, 4, 8, 12, 16, 17, 24, 32, 33, 48, 64)
COPIES_BYTES = 512_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--activations", help="measure as well with activations rounded so: i8/token/dynamic")
    parser.add_argument("--first", type=int, default=2, help="rows")
    parser.add_argument("--last", type=int, default=64, help="rows")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--note", default="", help="what a reader should know of the machine")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    for spec in options.specs:
        if reason := packed.missing(QSpec.parse(spec).element):
            raise SystemExit(reason)
    rows = range(options.first, options.last + 1)
    lines = []
    for shape in options.shapes:
        outputs, columns = map(int, shape.split("x"))
        lines += measure(outputs, columns, options.specs, options.activations, rows, options.rounds)
    shown = [count for count in SHOWN if count in rows]
    heads = ["outputs × inputs", "weight", *map(str, shown), f"least, {rows[0]} … {rows[-1]}", "largest step"]
    text = (
        f"How many times faster than torch's linear in bfloat16, {torch.get_num_threads()} threads, medians of "
        f"{options.rounds} rounds. Columns: rows of x. The largest step is how many times as long one row more takes, "
        f"and to how many rows. {options.note}\n\n"
        f"{tabulate(lines, heads, tablefmt='github', disable_numparse=True)}"
    )
    print(text)
    if options.record:
        name = f"linear-rows-cpu-{device_slug('cpu')}"
        print(record(name, "Linears on the CPU over the number of rows", text, "cpu"))


def measure(
    outputs: int, columns: int, specs: Sequence[str], activations: str | None, rows: Sequence[int], rounds: int
) -> list[list[str]]:
    copies = max(1, min(64, COPIES_BYTES // (2 * outputs * columns)))
    dense = itertools.cycle([torch.randn(outputs, columns).to(torch.bfloat16) for _ in range(copies)])
    weights = {spec: itertools.cycle([random_weight(spec, outputs, columns) for _ in range(copies)]) for spec in specs}
    ways: dict[tuple[str, int], Callable[[], object]] = {}
    for count in rows:
        x = torch.randn(count, columns).to(torch.bfloat16)
        ways["torch", count] = lambda x=x: F.linear(x, next(dense))
        for spec, copy in weights.items():
            ways[spec, count] = lambda x=x, copy=copy, spec=spec: linear_packed(x, *next(copy), None, spec)
            if activations and way_of(spec, columns, x.dtype):
                name = f"{spec} × {activations.partition('/')[0]}"
                codes = activation_codes(x, None, ActivationSpec.parse(activations))
                ways[name, count] = lambda codes=codes, copy=copy, spec=spec: of_codes(codes, next(copy), spec)
    times = medians(ways, rounds)
    names = dict.fromkeys(name for name, _ in times if name != "torch")
    return [[f"{outputs} × {columns}", name, *figures(times, name, rows)] for name in names]


def of_codes(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor, Tensor | None], spec: str) -> Tensor:
    return linear_codes(*x, *weight, None, spec, torch.bfloat16)


def figures(times: dict[tuple[str, int], float], name: str, rows: Sequence[int]) -> list[str]:
    ratios = {count: times["torch", count] / times[name, count] for count in rows}
    steps = {then: times[name, then] / times[name, now] for now, then in itertools.pairwise(rows)}
    least, steepest = min(ratios, key=ratios.__getitem__), max(steps, key=steps.__getitem__)
    shown = [f"{ratios[count]:.2f}" for count in SHOWN if count in ratios]
    return [*shown, f"{ratios[least]:.2f} ({least})", f"{steps[steepest]:.2f} ({steepest})"]


def medians(ways: dict[tuple[str, int], Callable[[], object]], rounds: int) -> dict[tuple[str, int], float]:
    """Seconds of a call, for each way."""
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for turn in range(rounds + 1):
        for key, call in ways.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one warms up
                taken[key].append(time.perf_counter() - start)
    return {key: statistics.median(times) for key, times in taken.items()}


if __name__ == "__main__":
    main()
