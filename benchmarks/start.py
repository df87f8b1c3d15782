"""From optimize() to the first tokens, in a process with empty caches and in a second one.

    python -m benchmarks.start [--shape 1b] [--layers N] [--device cuda] [--dtype bfloat16] [--out FOLDER]

A model of Llama's shape with random weights, 4 bits by round to nearest. Each process gets the same three folders for
the caches of qcompile, Inductor and Triton. A row is a phase, its columns the seconds that it took in each process;
phases below others are parts of them. With --out the result goes there, else to benchmarks/results.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1000},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
PROMPT, CACHE = 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(start(args.shape, args.layers, args.device, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "QCOMPILE_CACHE": "qcompile"}
        caches = {name: f"{folder}/{part}" for name, part in names.items()}
        runs = {}
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.start", "--child", *sys.argv[1:]]
            done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True)
            runs[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, runs[name], flush=True)
    report(args, runs)


def start(shape: str, layers: int | None, device: str, dtype: str) -> dict[str, float]:
    """Seconds of each phase in this process."""
    begin = time.perf_counter()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import qcompile
    from qcompile import _torch, program, roles
    from qcompile.caches import static_cache
    from qcompile.launches import Launch
    from qcompile.pipeline import Pipeline
    from qcompile.regions import Parts
    from qcompile.runtime import runner_of
    from qcompile.shelf import Shelf

    spent: dict[str, float] = {"imports": time.perf_counter() - begin}

    def watch(owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[f"{now[0]}: {phase}"] = spent.get(f"{now[0]}: {phase}", 0.0) + time.perf_counter() - began

        setattr(owner, name, timed)

    logging.basicConfig(format="%(message)s")
    logging.getLogger("qcompile.shelf").setLevel(logging.INFO)  # which says why something is not kept
    now = [""]
    watch(program, "capture_unrolled", "capture")
    watch(roles, "capture_call", "capture")
    watch(Pipeline, "transform", "passes")
    watch(Parts, "compile", "Inductor")
    watch(Launch, "run", "kernels meanwhile, of all threads")
    watch(Shelf, "__init__", "fingerprint")
    watch(_torch, "loads", "read from disk")
    watch(program.Program, "__call__", "run")

    def phase(name: str, function: Callable[[], Any]) -> Any:
        now[0], began = name, time.perf_counter()
        spent[name] = 0.0  # before its parts
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        spent[name] = time.perf_counter() - began
        return result

    sizes = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    heads = sizes["hidden_size"] // (64 if shape != "8b" else 128)
    shape_config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads // 4, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(shape_config, dtype=getattr(torch, dtype)).eval()
        prompt, token = torch.ones((1, PROMPT), dtype=torch.long), torch.ones((1, 1), dtype=torch.long)
    # The plan is made apart, as optimize() quantizes too; there it is then on disk.
    config = qcompile.Config("u4/g64/asym", algorithm="rtn", disk_cache=True)
    phase("plan", lambda: qcompile.plan(model, config))
    phase("optimize, planned before", lambda: qcompile.optimize(model, config, progress=False))
    runner = runner_of(model)
    assert runner is not None and runner.heads is not None
    cache = static_cache(runner.heads, CACHE, 1, getattr(torch, dtype), torch.device(device))
    with torch.no_grad():
        phase("first prompt", lambda: model(input_ids=prompt, past_key_values=cache))
        phase("first step", lambda: model(input_ids=token, past_key_values=cache))
        phase("second step", lambda: model(input_ids=token, past_key_values=cache))
    spent["imports, plan and first prompt"] = spent["imports"] + spent["plan"] + spent["first prompt"]
    spent["plan to first step"] = spent["plan"] + spent["first prompt"] + spent["first step"]
    counters = torch._dynamo.utils.counters["inductor"]  # type: ignore[attr-defined]
    spent["graphs that Inductor compiled"] = counters["fxgraph_cache_miss"] + counters["fxgraph_cache_bypass"]
    return spent


def report(args: argparse.Namespace, runs: dict[str, dict[str, float]]) -> None:
    from tabulate import tabulate

    from benchmarks.record import device_slug, record

    rows = [[name, *(run.get(name, 0.0) for run in runs.values())] for name in {**runs["cold"], **runs["warm"]}]
    layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    about = f"Llama of the {args.shape} shape, {layers} layers, {args.dtype}, u4/g64/asym; seconds. "
    about += f"A prompt of {PROMPT} tokens, a static cache of {CACHE}. Lines behind a colon are parts of those above."
    body = about + "\n\n" + tabulate(rows, headers=["phase", *runs], tablefmt="github", floatfmt=".2f")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "start.md").write_text(body + "\n")
    else:
        record(
            f"start-{args.shape}-{device_slug(args.device)}", "From optimize() to the first tokens", body, args.device
        )


if __name__ == "__main__":
    main()
