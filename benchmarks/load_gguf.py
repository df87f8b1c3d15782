"""Loading a GGUF file: time and memory of qcompile.load, which keeps the weights packed, beside transformers, which
dequantizes them.

    python -m benchmarks.load_gguf [--model FILE] [--dtype float32] [--record]

Each loads in a process of its own, in turns; figures are medians. Time is without the import of torch, transformers and
qcompile; memory is the process's resident memory afterwards, and at most, both less what it was after those imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from benchmarks.record import record
from qcompile import models

LOADERS = ("qcompile", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a .gguf file; default: the one in the package {models.DEMO_PACKAGE}")
    parser.add_argument("--dtype", default="float32", choices=models.DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--loader", choices=LOADERS, help="load in this process and print the figures as JSON")
    options = parser.parse_args()
    source = models.find(options.model) if options.model else models.find_demo()
    if not source.gguf:
        parser.error(f"{source} is no .gguf file; {models.DEMO_INSTALL} brings one")
    if options.loader:
        print(json.dumps(measure(source, options.dtype, options.loader)))
        return
    size = (Path(source.place) / source.gguf).stat().st_size
    found: dict[str, list[list[float]]] = {loader: [] for loader in LOADERS}
    for loader in LOADERS * options.rounds:
        command = [sys.executable, "-m", "benchmarks.load_gguf", "--model", str(source), "--dtype", options.dtype]
        run = subprocess.run([*command, "--loader", loader], capture_output=True, text=True, check=True)
        found[loader].append(json.loads(run.stdout.splitlines()[-1]))
        print(loader, *found[loader][-1], flush=True)
    rows = []
    for loader in LOADERS:
        seconds, *sizes = (statistics.median(figures) for figures in zip(*found[loader], strict=True))
        rows.append([loader, f"{seconds:.1f}", *(f"{size / 1e6:.0f}" for size in sizes)])
    table = tabulate(rows, ["loader", "s", "weights MB", "resident MB", "at most MB"], "github", disable_numparse=True)
    note = f"{source.gguf}, {size / 1e6:.0f} MB, to {options.dtype}. {options.rounds} rounds. "
    body = f"{note}{' '.join((__doc__ or '').rpartition('[--record]')[2].split())}\n\n{table}"
    print(f"\n{body}")
    if options.record:
        print(record("load-gguf", "Loading a GGUF file", body, "cpu"))


def measure(source: models.Source, dtype: str, loader: str) -> tuple[float, int, int, int]:
    """Seconds, bytes of weights, resident bytes, resident bytes at most."""
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qcompile.load import load

    resident = _resident()
    start = time.perf_counter()
    if loader == "qcompile":
        model = load(str(source), dtype=models.DTYPES[dtype], progress=False)
    else:
        model = models.load(source, dtype)
    seconds = time.perf_counter() - start
    tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, sum(tensors.values()), _resident() - resident, most - resident


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
