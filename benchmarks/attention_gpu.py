"""Times what a decoding step does between its projections: `python -m benchmarks.attention_gpu --out FOLDER`.

1. attention  32 query heads over 8 of 128 columns in bf16, beside torch's attention with the same mask, with the keys
              cut to those that count and no mask, and the op's meaning; and each one's error against float64
2. rope       rope of queries and keys and the writes to the cache, beside what Inductor makes of their meaning
3. sweep      other tiles, to fill kernels/_tuning.py with; the best three of each case, and the rest in the JSON
4. pdl        the chosen tiles with and without dependent launch

Times are medians of CUDA graph replays, in µs; caches rotate through at least 160 MB, so they come from memory. About
90 seconds on one H100; what is not begun within `--seconds` is left out. `--smoke` runs all of it on tiny sizes, in
Triton's interpreter and without times that mean anything where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if "--smoke" in sys.argv and not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._gpu import DEVICE, START, Report, log
from benchmarks.kernels_gpu import median_us
from qcompile.kernels import _tuning, attention_decode
from qcompile.kernels._tuning import AttentionTile
from qcompile.kernels.attention_decode import attend
from qcompile.kernels.rope_into_cache import rope_into_cache_cuda
from qcompile.ops.attention import attention
from qcompile.ops.rope import rope_into_cache

READ_GBPS = 3124  # what an H100 reads
ROTATE_BYTES = 160e6


@dataclass(frozen=True)
class Case:
    """Caches of `capacity` positions, the first `valid` of which are attended to."""

    batch: int
    capacity: int
    valid: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128

    @property
    def nbytes(self) -> int:
        return 2 * 2 * self.batch * self.kv_heads * self.valid * self.width

    @property
    def limit_us(self) -> float:
        return self.nbytes / READ_GBPS / 1e3

    def named(self) -> dict[str, Any]:
        return {"batch": self.batch, "capacity": self.capacity, "valid": self.valid}

    def tile(self) -> AttentionTile:
        pairs, rows = self.batch * self.kv_heads, self.heads // self.kv_heads
        device = _tuning.Device.of(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
        return _tuning.attention_tile(pairs, rows, self.capacity, self.width, 2, device)


CASES = (
    *(Case(1, 1024, 513), Case(1, 8192, 8192), Case(1, 32768, 32768), Case(1, 8192, 513)),
    *(Case(16, 1024, 513), Case(16, 8192, 8192)),
)
TINY = (Case(1, 96, 50, 4, 2, 16), Case(2, 64, 64, 4, 2, 16))

Call = Callable[..., Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for attention_gpu.md and attention_gpu.json")
    parser.add_argument("--seconds", type=float, default=90, help="begin nothing after them")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    if DEVICE != "cuda" and not options.smoke:
        raise SystemExit("needs a GPU")
    report = Report(options.out, "attention_gpu", "Attention of a decoding step: how fast is it?")
    for name in options.parts.split(","):
        log("part", name)
        try:
            PARTS[name](report, TINY if options.smoke else CASES, START + options.seconds)
        except Exception:
            report.fail(name, traceback.format_exc()[-1500:])
        report.write()
    print(report.body())
    if options.record:
        report.record("attention-times")


def timed(call: Call, inputs: Sequence[tuple[Any, ...]]) -> float:
    """Median µs of `call` on these inputs in turn; on a CPU whether it runs at all, and 0."""
    calls = [partial(call, *given) for given in inputs]
    if DEVICE == "cuda":
        return median_us(calls)
    calls[0]()
    return 0.0


def inputs_of(case: Case) -> list[Inputs]:
    """(query, key, value, mask, scale), with as many caches as it takes to come from memory."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    shape = (case.batch, case.kv_heads, case.capacity, case.width)
    q = torch.randn(case.batch, case.heads, 1, case.width, device=DEVICE, dtype=dtype)
    mask = (torch.arange(case.capacity, device=DEVICE) < case.valid).expand(case.batch, 1, 1, -1).contiguous()
    copies = 2 if DEVICE == "cpu" else max(2, math.ceil(ROTATE_BYTES / case.nbytes))
    caches = [[torch.randn(shape, device=DEVICE, dtype=dtype) for _ in "kv"] for _ in range(copies)]
    return [(q, k, v, mask, case.width**-0.5) for k, v in caches]


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def by_meaning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return attention.meaning(q, k, v, mask, False, scale)


def part_attention(report: Report, cases: tuple[Case, ...], deadline: float) -> None:
    for case in cases:
        if time.time() > deadline:
            report.fail("attention", f"out of time before {case}")
            return
        inputs = inputs_of(case)
        cut: list[Inputs] = [
            (q, k[:, :, : case.valid], v[:, :, : case.valid], None, scale) for q, k, v, _, scale in inputs
        ]
        q, k, v, _, scale = cut[0]
        want = by_meaning(q.double(), k.double(), v.double(), None, scale)
        ways: dict[str, tuple[Call, list[Inputs]]] = {
            "ours": (attend, inputs),
            "ours, no mask": (attend, cut),
            "torch": (by_torch, inputs),
            "torch, no mask": (by_torch, cut),
            "meaning": (by_meaning, inputs),
        }
        for name, (call, given) in ways.items():
            try:
                us = timed(call, given)
                error = ((call(*given[0]).double() - want).norm() / want.norm()).item()
            except Exception as failure:
                report.fail("attention", f"{case} {name}: {failure}"[:400])
                continue
            share = 100 * case.limit_us / us if us else math.nan
            report.add("attention", **case.named(), way=name, us=us, percent_of_read_limit=share, error=error)
        report.notes.append(f"{case}: limit {case.limit_us:.2f} µs, {case.tile()}")


def part_rope(report: Report, cases: tuple[Case, ...], deadline: float) -> None:
    for batch, length in ((1, 1), (16, 1), (1, 2048)) if DEVICE == "cuda" else ((1, 1), (2, 3)):
        case = replace(cases[0], batch=batch, capacity=max(cases[0].capacity, length))
        q, keys, values, *_ = inputs_of(case)[0]
        width = case.width
        qkv = q.new_empty(batch, length, (case.heads + 2 * case.kv_heads) * width).normal_()
        heads = qkv.unflatten(-1, (-1, width)).transpose(1, 2).split([case.heads, case.kv_heads, case.kv_heads], 1)
        cos, sin = q.new_empty(2, 1, 1, length, width).normal_()
        args = (*heads, cos, sin, keys, values, torch.arange(length, device=DEVICE))
        compiled = torch.compile(rope_into_cache.meaning, dynamic=False, fullgraph=True)
        ours, theirs = timed(rope_into_cache_cuda, [args]), timed(compiled, [args])
        report.add("rope", batch=batch, length=length, us=ours, inductor_us=theirs)


def part_sweep(report: Report, cases: tuple[Case, ...], deadline: float) -> None:
    for case in cases:
        inputs, found = inputs_of(case), []
        for tile in dict.fromkeys([case.tile(), *tiles(case)]):
            if time.time() > deadline:
                report.fail("sweep", f"out of time in {case}")
                break
            try:
                us = timed(partial(attend, tile=tile), inputs)
            except Exception as failure:
                report.fail("sweep", f"{case} {tile}: {failure}"[:300])
                continue
            chosen = "yes" if tile == case.tile() else ""
            found.append({**case.named(), "us": us, "chosen": chosen, **vars(tile)})
        found.sort(key=lambda row: row["us"])
        for index, row in enumerate(found):
            report.detail("sweep", **row)
            if index < 3 or row["chosen"]:
                report.add("sweep", **row)


def tiles(case: Case) -> Iterator[AttentionTile]:
    """Tiles that give every multiprocessor something to do, and no more than eight programs to each."""
    pairs, rows = case.batch * case.kv_heads, case.tile().rows
    blocks = ((32, 4, 3), (64, 4, 3), (64, 4, 2), (64, 8, 3), (128, 4, 2), (128, 8, 3))
    for splits, (keys, warps, stages) in itertools.product((1, 2, 4, 8, 16, 32, 64), blocks):
        if splits <= max(1, case.capacity // keys) and (64 <= pairs * splits <= 1056 or case.width < 32):
            yield AttentionTile(splits, rows, keys, warps, stages)


def part_pdl(report: Report, cases: tuple[Case, ...], deadline: float) -> None:
    for case in cases:
        if time.time() > deadline:
            report.fail("pdl", f"out of time before {case}")
            return
        inputs = inputs_of(case)
        with mock.patch.object(attention_decode, "dependent_launch", lambda x: False):
            without = timed(attend, inputs)
        report.add("pdl", **case.named(), us=timed(attend, inputs), without_us=without)


PARTS: dict[str, Callable[[Report, tuple[Case, ...], float], None]] = {
    "attention": part_attention,
    "rope": part_rope,
    "pdl": part_pdl,
    "sweep": part_sweep,
}


if __name__ == "__main__":
    main()
