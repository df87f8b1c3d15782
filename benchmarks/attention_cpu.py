"""Attention of one new token on the CPU, over caches of bfloat16 and of codes, and over the codes as Inductor does it.

    python -m benchmarks.attention_cpu [--keys 1024 4096] [--record]

All take turns, each with a cache of another layer at every call, so that what they read has to come from memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.record import device_slug, record
from qcompile.kernels import attention_cpu
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import CODES, quantize_rows

# Query heads, key/value heads, columns.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64), "Llama-3-8B": (32, 8, 128)}
MEMORY = 128 << 20  # of the bfloat16 caches of all layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    rows: list[list[str]] = []
    times: dict[str, float] = {}
    for name, keys in ((name, keys) for name in SHAPES for keys in options.keys):
        times = measure(contenders(SHAPES[name], keys), options.rounds)
        base = times["bfloat16"]
        rows.append([name, str(keys), *(f"{t * 1e6:.0f} µs ({t / base:.2f}x)" for t in times.values())])
        print(*rows[-1], flush=True)
    body = tabulate(rows, ["model", "keys", *times], tablefmt="github", disable_numparse=True)
    if options.record:
        threads = torch.get_num_threads()
        note = f"The least of {options.rounds} rounds, on a machine that others may share; threads: {threads}; "
        note += "queries in bfloat16, a mask of ones."
        record(f"attention-cpu-{device_slug('cpu')}", "Attention of one token on the CPU", f"{note}\n\n{body}", "cpu")
    print(body)


def contenders(shape: tuple[int, int, int], keys: int) -> dict[str, Callable[[int], Tensor]]:
    """Attention over the cache of each layer; layers are counted on and on."""
    heads, kv_heads, width = shape
    q, mask = torch.randn(1, heads, 1, width).bfloat16(), torch.ones(1, 1, 1, keys, dtype=torch.bool)
    count = -(-MEMORY // (kv_heads * keys * width * 4))
    layers = [torch.randn(2, 1, kv_heads, keys, width).bfloat16() for _ in range(count)]
    given: Any = (mask, False, width**-0.5, None)

    def over_codes(run: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[int], Tensor]:
        coded = [[quantize_rows(rows, dtype) for rows in layer] for layer in layers]

        def call(layer: int) -> Tensor:
            (k, of_keys), (v, of_values) = coded[layer % count]
            return run(q, k, v, *given, of_keys, of_values)

        return call

    def over_numbers(layer: int) -> Tensor:
        k, v = layers[layer % count]
        return attention_cpu.attention_cpu(q, k, v, *given)

    found: dict[str, Callable[[int], Tensor]] = {"bfloat16": over_numbers}
    for element, dtype in CODES.items():
        found[element] = over_codes(attention_cpu.attention_cpu, dtype)
        found[f"{element}, Inductor"] = over_codes(torch.compile(attention.meaning), dtype)
    return found


def measure(found: dict[str, Callable[[int], Tensor]], rounds: int, calls: int = 2) -> dict[str, float]:
    """Least seconds of a call of each."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):  # the first one compiles
        for name, run in found.items():
            start = time.perf_counter()
            for call in range(calls):
                run(turn * calls + call)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: min(each[1:]) for name, each in times.items()}


if __name__ == "__main__":
    main()
