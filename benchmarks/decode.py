"""Decode one token at a time on a GPU, a model of Llama-3-8B's shape with random weights, beside others.

    python -m benchmarks.decode --out FOLDER [--layers 32] [--specs u4/g64/asym+lm_head …] [--batch 1 16] [--record]

`ms a call` is model(…) over a static cache as a user calls it, `ms a step` the same in a CUDA graph that this script
captures, for others too. The limit is the time of reading the weights and the keys and values once, at the rate of a
read-only stream that is measured in the same run. generate() is greedy and sampling (temperature 0.8, top-k 50, top-p
0.9), tokens a second of all texts. First calls compile and do not count; they have columns of their own. Below, where
the time of our steps goes, kernel by kernel: the profiler's times, in which neighbours overlap.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu import Report, log
from benchmarks._models import DEVICE, EAGER, Contender, captured, contenders, generated, seconds, synchronize, waited
from benchmarks.linear import stream_rate
from qcompile.runtime import runner_of

CACHE, POSITION = 1024, 512
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.md and decode.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--specs", nargs="*", default=["u4/g64/asym+lm_head"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--only", nargs="*", default=(), help="parts of names, as eager, compile, torchao, qcompile")
    parser.add_argument("--tiny", action="store_true", help="try the script out, on a CPU too")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    report = Report(options.out, "decode", "Decoding on a GPU")
    shape = f"{options.layers} of Llama-3-8B's 32 layers, random weights, {POSITION} tokens before, cache {CACHE}"
    report.notes.append(shape)
    stream = 1e10 if options.tiny else stream_rate()
    report.notes.append(f"Read-only stream: {stream / 1e9:.0f} GB/s.")
    for one in contenders(report, options.layers, options.specs, options.only, options.tiny):
        for batch in options.batch:
            try:
                row, replay = measure(one, batch, stream)
            except Exception as failure:  # others' failures are a line of the report, and the rest goes on
                report.fail(one.name, f"batch {batch}: {type(failure).__name__}: {failure}"[:400])
                continue
            log(row)
            report.add("decoding", model=one.name, batch=batch, **row)
            if one.name.startswith("qcompile") and DEVICE.type == "cuda":
                for kernel in kernels(replay):
                    report.add(f"a step of {one.name}, batch {batch}", **kernel)
    report.write()
    print(report.body())
    if options.record:
        report.record("decode")


@torch.no_grad()
def measure(one: Contender, batch: int, stream: float) -> tuple[dict[str, Any], Callable[[], object]]:
    """A row of the table, and a step as a CUDA graph."""
    cache = one.cache(batch, CACHE)
    prompt = torch.randint(0, 500, (batch, POSITION), device=DEVICE)
    token = prompt[:, :1].clone()

    def step() -> object:
        return one.call(token, cache)

    row: dict[str, Any] = {"first prefill, s": waited(lambda: one.call(prompt, cache)), "first step, s": waited(step)}
    row["ms a call"] = 1e3 * seconds(step, 30)
    again = one.cache(batch, CACHE)
    one.call(prompt, again)
    replay = captured(lambda: one.call(token, again))
    ms = 1e3 * seconds(replay, 60)
    read = one.read_bytes + sum(2 * layer.keys.nbytes for layer in again.layers) * POSITION / CACHE
    row |= {
        "ms a step": ms,
        "tokens/s": 1e3 * batch / ms,
        "reads, GB": read / 1e9,
        "of the limit": f"{1e3 * read / stream / ms:.0%}",
    }
    if one.name == EAGER or runner_of(one.model) is not None:  # the others are compiled steps, not models
        for name, sampling in {"greedy": {"do_sample": False}, "sampling": SAMPLING}.items():
            if one.name == EAGER and name == "sampling":  # minutes of no news
                continue
            tokens, repeats = (32, 3) if one.name == EAGER else (256, 7)
            rate = generated(one.model, prompt, tokens, repeats, **sampling)
            row[f"generate() {name}, tokens/s"] = rate
            row[f"{name}: of the step's speed"] = f"{rate / row['tokens/s']:.0%}"
    return row, replay


@torch.no_grad()
def kernels(replay: Callable[[], object], repeats: int = 4) -> list[dict[str, Any]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            replay()
        synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    launched = [event for event in events if event.device_time_total]
    return [
        {"kernel": event.key[:70], "launches": event.count // repeats, "µs": event.device_time_total / repeats}
        for event in launched
    ]


if __name__ == "__main__":
    main()
