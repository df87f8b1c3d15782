"""Times linears on a GPU against others': `python -m benchmarks.linear --out FOLDER`, five minutes on an H100.

The four linears of a layer of Llama-3-8B and its output layer, with 1 to 2048 rows of x: ours at several specs, bf16
F.linear, torchao's (ATen's int4 product; int8 as it is in a compiled graph), and gemlite where it is installed.

Times are medians of CUDA graph replays, in µs; weights rotate through at least 320 MB, so they come from memory. The
limit of a linear is the longer of two times: its bytes at the rate of a read-only stream, and its operations at
the rate of a large bf16 product, both measured in the same run. `layer` is the sum of the four. What is timed compiles
ahead, in parallel processes. `--plot FOLDER/linear.json` draws a run that is done (with matplotlib) and needs no GPU.
`--steps` times a layer's linears by ours and by bf16 alone, and adds what one row more takes: two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks._gpu import DEVICE, START, Report, Row, in_parallel, log
from benchmarks._peers import DENSE, Kind, Linear, peers
from benchmarks.kernels_gpu import SHAPES, copies_for, random_x, raw_weights, weight_bytes
from qcompile.kernels.linear_cuda import linear_cuda
from qcompile.timing import median_us

LAYER = {name: shape for name, shape in SHAPES.items() if name != "lm_head"}
SPECS = ("u4/g64/asym", "i4/g128/sym", "i8/g64/sym", "u3/g64/asym", "u2/g64/asym", "u1/g64/asym")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
# Where another tile is taken, or another turn of all multiprocessors.
ENDS = (8, 16, 32, 40, 48, 64, 72, 80, 96, 128, 136, 160, 192, 224, 256, 264, 288, 384, 512, 528, 768, 1024, 1056, 1280)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for linear.md and linear.json")
    parser.add_argument("--seconds", type=float, default=300, help="what the whole may take")
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--steps", action="store_true", help="from some numbers of rows to the next, by bf16 and ours")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw an earlier run, into JSON's folder")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    if options.plot:
        print(plot(options.plot, options.plot.with_suffix(".svg")))
        return
    if DEVICE != "cuda" or not options.out:
        parser.error("needs a GPU and --out")
    report = Report(options.out, "linear", "Linears on a GPU")
    rows = options.rows or ([m for end in ENDS for m in (end, end + 1)] if options.steps else ROWS)
    measure(report, options.specs, rows, START + options.seconds, options.steps)
    (tabulate_steps if options.steps else tabulate_rows)(report)
    report.write()
    print(report.body())
    if options.record:
        report.record("linear")


def kinds(specs: Sequence[str], steps: bool) -> dict[str, Kind]:
    """By name, the others' first; where steps are asked for, of others bf16 alone."""
    others = [kind for kind in peers() if kind.name == DENSE or not steps]
    own = [Kind(f"qcompile {spec}", partial(ours, spec), 8 * weight_bytes(spec, 1, 4096) / 4096) for spec in specs]
    return {kind.name: kind for kind in [*others, *own]}


def ours(spec: str, n: int, k: int) -> Linear:
    weight = raw_weights(spec, n, k, 1)[0]
    return lambda x: linear_cuda(x, *weight, None, spec, None)


def compile_case(case: Row) -> Row:
    """The case, run once, which leaves its kernels in the cache, with why it failed, or None."""
    try:
        n, k = SHAPES[case["shape"]]
        kinds(case["specs"], False)[case["kind"]].make(n, k)(random_x(case["rows"], k))
        torch.cuda.synchronize()
        return {**case, "why": None}
    except Exception as failure:
        return {**case, "why": f"{type(failure).__name__}: {failure}"[-600:]}


def measure(report: Report, specs: Sequence[str], rows: Sequence[int], deadline: float, steps: bool) -> None:
    """Compile, then time. Details of the report: µs, limit and bf16's µs, by kind, shape and rows."""
    cases = [
        {"kind": kind.name, "specs": list(specs), "rows": m, "shape": shape}
        for kind, m, shape in itertools.product(kinds(specs, steps).values(), rows, LAYER)
        if kind.name != DENSE and kind.takes(LAYER[shape][0], m)
    ]
    results, troubles = in_parallel(compile_case, cases, report.folder, 0.45 * (deadline - time.time()))
    for trouble in [*troubles, *(str(result) for result in results if result["why"])]:
        report.fail("compile", trouble)
    stream, flops = stream_rate(), product_rate()
    report.notes.append(f"Compiled ahead: {len(results)} of {len(cases)}.")
    report.notes.append(f"Read-only stream {stream / 1e9:.0f} GB/s, bf16 product of 8192³ {flops / 1e12:.0f} TFLOP/s.")
    for shape, (n, k) in (LAYER if steps else SHAPES).items():
        dense: dict[int, float] = {}
        for kind in kinds(specs, steps).values():
            if time.time() > deadline:
                report.fail("linear", f"out of time before {kind.name} at {shape}")
                return
            taken = [m for m in rows if kind.takes(n, m)]
            calls = [kind.make(n, k) for _ in range(copies_for(kind.nbytes(n, k)))] if taken else []
            for m in taken:
                x = random_x(m, k)
                try:
                    us = median_us([partial(call, x) for call in calls])
                except Exception as failure:
                    report.fail("linear", f"{kind.name} {shape} {m}: {failure}"[:400])
                    continue
                if kind.name == DENSE:
                    dense[m] = us
                limit = 1e6 * max(kind.nbytes(n, k) / stream, 2 * m * n * k / flops)
                report.detail(
                    "linear", kind=kind.name, shape=shape, rows=m, us=us, limit_us=limit, bf16_us=dense.get(m)
                )
        log(shape)
        report.write()  # a run that is cut off leaves what it had


def stream_rate() -> float:
    """Bytes a second of reading 2 GiB."""
    numbers = torch.ones(1 << 29, dtype=torch.int32, device=DEVICE)
    return numbers.nbytes / median_us([partial(torch.sum, numbers, dtype=torch.int32)], 4) * 1e6


def product_rate() -> float:
    """Operations a second of a large product."""
    a, b = random_x(8192, 8192), random_x(8192, 8192)
    return 2 * 8192**3 / median_us([partial(torch.mm, a, b)], 4) * 1e6


def of_layers(details: Sequence[Row], shapes: Collection[str] = LAYER) -> list[Row]:
    """Sums over these linears, where all of them were timed."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for detail in details:
        if detail["shape"] in shapes:
            found[detail["kind"], detail["rows"]].append(detail)
    keys = ("us", "limit_us", "bf16_us")
    return [
        {"kind": kind, "shape": "layer", "rows": m} | {key: sum(part[key] for part in parts) for key in keys}
        for (kind, m), parts in found.items()
        if len(parts) == len(shapes) and all(part["bf16_us"] for part in parts)
    ]


def tabulate_rows(report: Report) -> None:
    """A table for each number of rows, from the details."""
    details = report.details.get("linear", [])
    cells: dict[int, dict[str, Row]] = defaultdict(lambda: defaultdict(dict))
    for one in [*details, *of_layers(details)]:
        us, dense = one["us"], one["bf16_us"]
        times = f"{dense / us:.2f}×" if dense else "bf16 failed"
        cells[one["rows"]][one["kind"]][one["shape"]] = f"{us:.1f} / {one['limit_us'] / us:.0%} / {times}"
    for m, by_kind in cells.items():
        for kind, by_shape in by_kind.items():
            shown = {shape: by_shape.get(shape, "") for shape in [*SHAPES, "layer"]}
            report.add(f"{m} rows: µs / of the limit / times as fast as bf16", linear=kind, **shown)


def tabulate_steps(report: Report) -> None:
    """Of each number of rows µs by linear and as a sum, and the step from the number before where that was timed."""
    details = report.details.get("linear", [])
    us = {(one["kind"], one["shape"], one["rows"]): one["us"] for one in details}
    sums = {(one["kind"], one["rows"]): one for one in of_layers(details)}
    for (kind, m), one in sums.items():
        if kind != DENSE:
            before = sums.get((kind, m - 1))
            parts = {shape: us[kind, shape, m] for shape in LAYER}
            times = {"bf16": one["bf16_us"], "times_as_fast": one["bf16_us"] / one["us"]}
            step = one["us"] / before["us"] if before else ""
            report.add(f"{kind}: µs", rows=m, **parts, sum=one["us"], **times, step=step)


def plot(source: Path, path: Path) -> Path:
    """Of those of a layer's linears that were timed, over the rows: how many times as fast as bf16, and how much of the
    limit."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]

    run = json.loads(source.read_text())
    timed = {detail["shape"] for detail in run["details"]["linear"]}
    shapes = [shape for shape in LAYER if shape in timed]
    lines: dict[str, list[Row]] = defaultdict(list)
    for one in of_layers(run["details"]["linear"], shapes):
        lines[one["kind"]].append(one)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for name, points in lines.items():
        style = {"linewidth": 2} if name.startswith("qcompile") else {"linestyle": "--", "linewidth": 1}
        for axis, key in zip(axes, ("bf16_us", "limit_us")):
            axis.plot([p["rows"] for p in points], [p[key] / p["us"] for p in points], marker=".", label=name, **style)
    for axis, title in zip(axes, ("times as fast as bf16", "part of the limit")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("rows")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{', '.join(shapes)} of a layer of Llama-3-8B. {run['where']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    return path


if __name__ == "__main__":
    main()
