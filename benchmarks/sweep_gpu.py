"""Times other tiles and ways of GPU linears: `python -m benchmarks.sweep_gpu --out FOLDER`, some minutes on one H100.

1. sweep  the choices that `qcompile tune` tries, to fit the formulas of kernels/_tuning.py to; the best three of each,
          and the rest in the JSON
2. pdl    whether starting early (programmatic dependent launch) pays

How times are taken is said in qcompile/timing.py.
"""

from __future__ import annotations

import itertools
import time
from unittest import mock

import torch

from benchmarks._gpu import Report
from benchmarks.kernels_gpu import SHAPES, Part, run, weight_bytes
from qcompile.kernels import linear_dot
from qcompile.kernels._tuning import Device
from qcompile.kernels._ways import by_formula, candidates, product_of
from qcompile.timing import Bench, Trial

SPECS = ("u4/g64/asym", "i4/g128/sym", "i8/g64/sym", "u3/g64/asym", "u2/g64/asym", "u1/g64/asym")
ROWS = (1, 2, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048)
LAYER = ("qkv", "o", "gate_up", "down")


def main() -> None:
    run(PARTS, __doc__, "sweep_gpu", "GPU linears: which tiles are fastest?", "kernels-sweep")


def part_sweep(report: Report, deadline: float) -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    device, bench = Device.of(gpu), Bench(gpu)
    for spec, name in itertools.product(SPECS, LAYER):
        products = [product_of(spec, rows, *SHAPES[name]) for rows in ROWS]
        trials: list[Trial] = [(product, choice) for product in products for choice in candidates(product, device)]
        able = bench.compile(trials, lambda: None)
        for product in products:
            found = []
            for trial in trials:
                if trial[0] is not product or trial not in able:
                    continue
                if time.time() > deadline:
                    report.fail("sweep", f"out of time in {spec} {name} {product.rows}")
                    return
                try:
                    found.append((bench.us(*trial), trial[1]))
                except Exception as failure:
                    report.fail("sweep", f"{product} {trial[1]}: {failure}"[:300])
            found.sort(key=lambda one: one[0])
            for place, (us, (way, tile)) in enumerate(found):
                sizes = " ".join(f"{key}={value}" for key, value in vars(tile).items())
                gbps = weight_bytes(spec, *SHAPES[name]) / us / 1e3
                row = {"spec": spec, "shape": name, "rows": product.rows, "us": us, "gbps": gbps, "way": way}
                report.detail("sweep", **row, tile=sizes)
                if place < 3:
                    report.add("sweep", **row, tile=sizes)


def part_pdl(report: Report, deadline: float) -> None:
    bench = Bench(torch.device("cuda", torch.cuda.current_device()))
    for name in LAYER:
        product = product_of(SPECS[0], 1, *SHAPES[name])
        choice = by_formula(product, Device.of(bench.device))
        early = bench.us(product, choice)
        with mock.patch.object(linear_dot, "dependent_launch", lambda x: False):
            report.add("pdl", spec=SPECS[0], shape=name, rows=1, us=early, without_us=bench.us(product, choice))


PARTS: dict[str, Part] = {"sweep": part_sweep, "pdl": part_pdl}


if __name__ == "__main__":
    main()
