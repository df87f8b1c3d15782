"""Every checkpoint under tests/checkpoints, loaded, compiled and run: right, and by which kernels.

    python -m benchmarks.checkpoints [--device cuda] [--dtype float16] [--workers 8] [NAME …]

They are tiny models that the methods' own libraries wrote, with the weights and logits that these give. Columns:

- weights: equal to the library's bit for bit, once rounded to the dtype that it computes in, or how many are
- logits: of the uncompiled float32 model that does not round activations, off from the library's (relative, 2-norm)
- compiled: logits of the compiled model on the device, off from those of the uncompiled float32 model on the CPU
- eager: the same of the uncompiled model on the device, in the same dtype
- decode: greedy tokens by generate(), from packed weights
- kernels: what reads packed weights, and which implementation was chosen; MEANING is plain torch
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor, nn

import qcompile
from benchmarks.record import device_slug, record
from qcompile import formats
from qcompile.files.checkpoint import open_checkpoint

CHECKPOINTS = Path(__file__).resolve().parent.parent / "tests" / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 100, 200]])
PACKED_OPS = ("linear", "dequantize")
HEADERS = ["checkpoint", "method", "weights", "logits", "compiled", "eager", "decode", "kernels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all of them, if none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    names = options.names or sorted(f.name for f in CHECKPOINTS.iterdir() if (f / "expected.safetensors").exists())
    job = partial(guarded, device=options.device, dtype=getattr(torch, options.dtype))
    rows: dict[str, list[str]] = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        waiting = {pool.submit(job, name): name for name in names}
        for done in as_completed(waiting):
            rows[waiting[done]] = done.result()
            print(len(rows), *rows[waiting[done]], sep=" | ", flush=True)
    table = tabulate([rows[name] for name in names], HEADERS, tablefmt="github", disable_numparse=True)
    columns = (__doc__ or "").partition("Columns:")[2].strip()
    body = f"In {options.dtype}.\n\n{columns}\n\n{table}"
    print(body)
    if options.record:
        name = f"checkpoints-{options.dtype}-{device_slug(options.device)}"
        print(record(name, "Checkpoints of every method", body, options.device))


def guarded(name: str, device: str, dtype: torch.dtype) -> list[str]:
    try:
        return measure(name, device, dtype)
    except Exception as error:
        return [name, f"FAILED {type(error).__name__}: {error}"[:3000]]


def measure(name: str, device: str, dtype: torch.dtype) -> list[str]:
    torch.set_num_threads(1)
    folder = CHECKPOINTS / name
    path = str(folder / "model.gguf") if (folder / "model.gguf").exists() else str(folder)
    method = formats.find(open_checkpoint(Path(path)))
    assert method is not None
    if name == "gguf-blocks":
        return [name, method.name, "tensors without a model"]
    reference = qcompile.load(path, dtype=torch.float32, progress=False)
    plain = qcompile.load(path, dtype=torch.float32, quantize_inputs=False, progress=False)
    expected = load_file(folder / "expected.safetensors")
    logits = expected.pop("logits", None)
    row = [name, method.name, agreement(qcompile.dequantize(plain), expected)]
    row.append("" if logits is None else f"{difference(plain(INPUT_IDS).logits, logits):.1e}")
    want = reference(INPUT_IDS).logits

    model = qcompile.load(path, device=device, dtype=dtype, progress=False)
    eager = difference(copy.deepcopy(model)(INPUT_IDS.to(device)).logits, want)
    model = qcompile.optimize(model, progress=False)
    compiled = difference(model(INPUT_IDS.to(device)).logits, want)
    row += [f"{compiled:.1e}", f"{eager:.1e}", decoded(model, device)]
    kernels = Counter()
    for program in qcompile.explain(model).to_dict()["programs"]:
        for op in program["ops"]:
            if op["op"].startswith(PACKED_OPS):
                kernels[f"{op['op']}: {op['implementation']}"] += 1
    return [*row, ", ".join(f"{kernel} ({count})" for kernel, count in kernels.items())]


def agreement(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    common = [path for path in expected if path in weights]
    best = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        equal = sum(torch.equal(weights[path].to(dtype).float(), expected[path].float()) for path in common)
        if equal == len(common):
            return f"{equal} equal in {str(dtype).removeprefix('torch.')}"
        best = max(best, equal)
    worst = max(difference(weights[path], expected[path]) for path in common)
    return f"{best} of {len(common)} equal, off by {worst:.1e}"


def decoded(model: nn.Module, device: str) -> str:
    ids = INPUT_IDS.to(device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    uncompiled = qcompile.explain(model).to_dict()["eager"]
    return f"{out.shape[1] - ids.shape[1]} tokens" + (f", uncompiled: {uncompiled}" if uncompiled else "")


def difference(got: Tensor, want: Tensor) -> float:
    got = got.detach().cpu().double()
    return ((got - want).norm() / want.double().norm()).item()


if __name__ == "__main__":
    main()
