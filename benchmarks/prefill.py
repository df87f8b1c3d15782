"""Read prompts on a GPU, a model of Llama-3-8B's shape with random weights, beside others.

    python -m benchmarks.prefill --out FOLDER [--layers 32] [--lengths 128 512 2048] [--specs u4/g64/asym …] [--record]

Tokens a second of one call that fills a static cache and gives the last token's logits, medians. A spec that ends in
`+i8` or `+fp8_e4m3` rounds activations by token. The first calls compile and do not count; their time is a column.
Below, where the time of our longest prompt goes, kernel by kernel: what its sum leaves of a call is Python's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu import Report, log
from benchmarks._models import DEVICE, EAGER, Contender, contenders, seconds, synchronize
from benchmarks.decode import kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for prefill.md and prefill.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--specs", nargs="*", default=["u4/g64/asym", "i8/row/sym+i8", "fp8_e4m3/row/sym+fp8_e4m3"])
    parser.add_argument("--only", nargs="*", default=(), help="parts of names, as eager, compile, torchao, qcompile")
    parser.add_argument("--tiny", action="store_true", help="try the script out, on a CPU too")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    report = Report(options.out, "prefill", "Prompts on a GPU")
    report.notes.append(
        f"{options.layers} of Llama-3-8B's 32 layers, random weights, batch 1. Tokens a second by length."
    )
    base: dict[int, float] = {}
    for one in contenders(report, options.layers, options.specs, options.only, options.tiny):
        row: dict[str, Any] = {"model": one.name, "first calls, s": 0.0}
        for length in options.lengths:
            try:
                first, rate, call = measure(one, length)
            except Exception as failure:  # others' failures are a line of the report, and the rest goes on
                report.fail(one.name, f"{length} tokens: {type(failure).__name__}: {failure}"[:400])
                continue
            row["first calls, s"] += first
            if one.name == EAGER:
                base[length] = rate
            times = f" ({rate / base[length]:.2f}×)" if length in base else ""
            row[str(length)] = f"{rate:.0f}{times}"
            if one.name.startswith("qcompile") and DEVICE.type == "cuda" and length == max(options.lengths):
                for kernel in kernels(call):
                    report.add(f"{length} tokens of {one.name}, {1e3 * length / rate:.1f} ms", **kernel)
        log(row)
        report.add("tokens a second (times as fast as eager bf16)", **row)
    report.write()
    print(report.body())
    if options.record:
        report.record("prefill")


@torch.no_grad()
def measure(one: Contender, length: int) -> tuple[float, float, Callable[[], object]]:
    """(seconds of the first call, tokens a second, a call)."""
    prompt = torch.randint(0, 500, (1, length), device=DEVICE)
    cache = one.cache(1, length)

    def call() -> object:
        for layer in cache.layers:
            layer.cumulative_length.zero_()
        return one.call(prompt, cache)

    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start, length / seconds(call, 9), call


if __name__ == "__main__":
    main()
