"""From load() to the first token, beside the time that reading the files once takes.

    python -m benchmarks.load_start [--gguf FILE] [--gib 0.7] [--dtype bfloat16]

A .gguf file, by default the one in the demo's package, and a checkpoint of random numbers as qcompile.save writes it
(see load_memory). Each is loaded in two processes with the same caches, which are empty for the first one. Imports are
told apart; the first token ends a prompt of 32. What is to be reached is 1.2 times the reading and 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "QCOMPILE_CACHE": "qcompile"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf")
    parser.add_argument("--gib", type=float, default=0.7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(measure(args.load, args.dtype)))
        return
    # Not before: a child times its imports.
    from benchmarks.load_memory import build
    from benchmarks.record import record
    from qcompile import models

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), "qcompile", args.gib)
        source = models.find(args.gguf) if args.gguf else models.find_demo()
        if not source.gguf:
            parser.error(f"{source} is no .gguf file; {models.DEMO_INSTALL} brings one")
        for name in (str(Path(source.place) / source.gguf), folder):
            rows += timed(name, args.dtype)
    body = f"To {args.dtype}, in seconds. {' '.join((__doc__ or '').rpartition('bfloat16]')[2].split())}\n\n"
    table = tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f")
    print(record("load-start", "From load() to the first token", body + table, "cpu"))


def timed(name: str, dtype: str) -> list[dict[str, object]]:
    files = [Path(name)] if name.endswith(".gguf") else sorted(Path(name).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as caches:
        env = {**os.environ, **{variable: f"{caches}/{part}" for variable, part in CACHES.items()}}
        for process in ("first", "second"):
            read = min(_read(files) for _ in range(2))
            command = [sys.executable, "-m", "benchmarks.load_start", "--load", name, "--dtype", dtype]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            spent: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            sums = {"load to token": sum(spent.values()) - spent["imports"], "to reach": 1.2 * read + 5}
            what = f"{Path(name).name if len(files) == 1 else 'qcompile'}, {size / 1e6:.0f} MB"
            rows.append({"files": what, "process": process, "read once": read, **spent, **sums})
            print(rows[-1], flush=True)
    return rows


def _read(files: list[Path]) -> float:
    began, buffer = time.perf_counter(), bytearray(1 << 24)
    for file in files:
        with open(file, "rb", buffering=0) as data:
            while data.readinto(buffer):
                pass
    return time.perf_counter() - began


def measure(name: str, dtype: str) -> dict[str, float]:
    began, spent = time.perf_counter(), {}

    def passed(phase: str) -> None:
        nonlocal began
        spent[phase], began = time.perf_counter() - began, time.perf_counter()

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import qcompile
    from qcompile import models
    from qcompile.caches import static_cache
    from qcompile.runtime import runner_of

    passed("imports")
    model = qcompile.load(name, dtype=models.DTYPES[dtype], progress=False)
    passed("load")
    qcompile.optimize(model, disk_cache=True, progress=False)
    passed("optimize")
    runner = runner_of(model)
    assert runner is not None and runner.heads is not None
    cache = static_cache(runner.heads, 256, 1, models.DTYPES[dtype], torch.device("cpu"))
    with torch.no_grad():
        model(input_ids=torch.ones((1, 32), dtype=torch.long), past_key_values=cache).logits[:, -1].argmax(-1)
    passed("first token")
    return spent


if __name__ == "__main__":
    main()
