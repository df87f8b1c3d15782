"""What fusing is worth, in the table that AWQ's documentation has: one text, by its length, and the memory.

    python -m benchmarks.fusing --out FOLDER [--layers 32] [--spec u4/g64/asym] [--lengths 32 64 … 2048] [--record]

A model of Llama-3-8B's shape with random weights: bf16 in eager mode, quantized and compiled with all fusions, and
without any (do_fuse=False). Prefill is one call over as many tokens; decode continues from there, through generate() as
a user calls it. Peak memory is that of the row, with weights and cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu import Report, log
from benchmarks._models import DEVICE, EAGER, Contender, contenders, generated
from benchmarks.prefill import measure

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for fusing.md and fusing.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--spec", default="u4/g64/asym")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--only", nargs="*", default=(EAGER, "qcompile"), help="parts of names, as eager, unfused")
    parser.add_argument("--tiny", action="store_true", help="try the script out, on a CPU too")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    report = Report(options.out, "fusing", "Before and after qcompile, unfused and fused")
    report.notes.append(f"{options.layers} of Llama-3-8B's 32 layers, random weights, batch 1.")
    specs = [options.spec, f"{options.spec}+unfused"]
    for one in contenders(report, options.layers, specs, only=options.only, tiny=options.tiny):
        for length in options.lengths:
            row = table_row(one, length)
            log(one.name, row)
            report.add(one.name, **row)
            report.write()  # a run that is cut off leaves what it had
    report.write()
    print(report.body())
    if options.record:
        report.record("fusing")


def table_row(one: Contender, length: int) -> dict[str, Any]:
    on_gpu = DEVICE.type == "cuda"
    _, prefill, _ = measure(one, length)
    prompt = torch.randint(0, 500, (1, length), device=DEVICE)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    decode = generated(one.model, prompt, *(32, 3) if one.name == EAGER else (128, 5), do_sample=False)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return {"length": length, "prefill, tokens/s": prefill, "decode, tokens/s": decode, "peak memory, GB": peak}


if __name__ == "__main__":
    main()
