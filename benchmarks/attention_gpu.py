"""Times what a decoding step does between its projections: `python -m benchmarks.attention_gpu --out FOLDER`.

1. attention  32 query heads over 8 of 128 columns in bf16, and over codes of 8 bits, beside torch's attention with the
              same mask, with the keys cut to those that count and no mask, and the op's meaning; and each one's error
              against float64, over codes that of the codes' numbers
2. capped     soft-capped attention of Gemma 2 (16 query heads over 8 of 256 columns), of a step and of a prompt, beside
              what Inductor makes of its meaning
3. rope       rope of queries and keys and the writes to the cache, beside what Inductor makes of their meaning
4. sweep      other tiles, to fill kernels/_attention_tiles.py with; the best three of each case, all in the JSON
5. pdl        the chosen tiles with and without dependent launch

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
from qcompile.kernels import _attention_tiles, _tuning, attention_codes, attention_decode
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.kernels.attention_decode import attend
from qcompile.kernels.rope_into_cache import rope_into_cache_cuda
from qcompile.ops.attention import attention
from qcompile.ops.rope import rope_into_cache
from qcompile.ops.row_codes import CODES, SCALE, dequantize_rows, quantize_rows
from qcompile.timing import median_us

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
    codes: str = ""  # the element of a quantized cache

    @property
    def nbytes(self) -> int:
        row = self.width + SCALE.itemsize if self.codes else self.width * 2
        return 2 * self.batch * self.kv_heads * self.valid * row

    @property
    def limit_us(self) -> float:
        return self.nbytes / READ_GBPS / 1e3

    def named(self) -> dict[str, Any]:
        codes = {"codes": self.codes} if self.codes else {}
        return {"batch": self.batch, "capacity": self.capacity, "valid": self.valid, **codes}

    def tile(self) -> AttentionTile:
        pairs, rows = self.batch * self.kv_heads, self.heads // self.kv_heads
        device = _tuning.Device.of(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
        choose = _attention_tiles.codes_tile if self.codes else _attention_tiles.attention_tile
        return choose(pairs, rows, self.capacity, self.width, 2, device)


CASES = (
    *(Case(1, 1024, 513), Case(1, 8192, 8192), Case(1, 32768, 32768), Case(1, 8192, 513)),
    *(Case(16, 1024, 513), Case(16, 2048, 2048), Case(16, 8192, 8192)),
)
TINY = (Case(1, 96, 50, 4, 2, 16), Case(2, 64, 64, 4, 2, 16))

Call = Callable[..., Tensor]
Inputs = tuple[Any, ...]


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
    """(query, key, value, mask, scale) and the scales of codes, with as many caches as it takes to come from memory."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    shape = (case.batch, case.kv_heads, case.capacity, case.width)
    q = torch.randn(case.batch, case.heads, 1, case.width, device=DEVICE, dtype=dtype)
    mask = (torch.arange(case.capacity, device=DEVICE) < case.valid).expand(case.batch, 1, 1, -1).contiguous()
    copies = 2 if DEVICE == "cpu" else max(2, math.ceil(ROTATE_BYTES / case.nbytes))
    caches = [[torch.randn(shape, device=DEVICE, dtype=dtype) for _ in "kv"] for _ in range(copies)]
    if not case.codes:
        return [(q, k, v, mask, case.width**-0.5) for k, v in caches]
    coded = [[quantize_rows(x, CODES[case.codes]) for x in cache] for cache in caches]
    return [(q, k, v, mask, case.width**-0.5, k_scale, v_scale) for (k, k_scale), (v, v_scale) in coded]


def ours(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, tile: AttentionTile | None = None,
) -> Tensor:  # fmt: skip
    if k_scale is None or v_scale is None:
        return attend(q, k, v, mask, scale, tile)
    return attention_codes.attend(q, k, v, mask, scale, None, k_scale, v_scale, tile)


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def by_meaning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return attention.meaning(q, k, v, mask, False, scale)


def cut(inputs: Inputs, valid: int) -> Inputs:
    """Without a mask, and without the keys that it hides."""
    q, k, v, _, scale, *scales = inputs
    return (q, k[:, :, :valid], v[:, :, :valid], None, scale, *(x[:, :, :valid] for x in scales))


def part_attention(report: Report, cases: tuple[Case, ...], deadline: float) -> None:
    for case in cases:
        if time.time() > deadline:
            report.fail("attention", f"out of time before {case}")
            return
        inputs = inputs_of(case)
        whole = [cut(given, case.valid) for given in inputs]
        ways: dict[str, tuple[Case, Call, list[Inputs]]] = {
            "ours": (case, ours, inputs),
            "ours, no mask": (case, ours, whole),
            "torch": (case, by_torch, inputs),
            "torch, no mask": (case, by_torch, whole),
            "meaning": (case, by_meaning, inputs),
        }
        for element in CODES:
            coded = replace(case, codes=element)
            given = inputs_of(coded)
            ways[f"ours, {element}"] = coded, ours, given
            ways[f"ours, {element}, no mask"] = coded, ours, [cut(some, case.valid) for some in given]
        for name, (of, call, given) in ways.items():
            try:
                us = timed(call, given)
                q, k, v, _, scale, *scales = cut(given[0], case.valid)
                k, v = (dequantize_rows(x, s, torch.double) for x, s in zip((k, v), scales)) if scales else (k, v)
                want = by_meaning(q.double(), k.double(), v.double(), None, scale)
                error = ((call(*given[0]).double() - want).norm() / want.norm()).item()
            except Exception as failure:
                report.fail("attention", f"{case} {name}: {failure}"[:400])
                continue
            share = 100 * of.limit_us / us if us else math.nan
            report.add("attention", **case.named(), way=name, us=us, percent_of_read_limit=share, error=error)
        report.notes.append(f"{case}: limit {case.limit_us:.2f} µs, {case.tile()}")


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return attention.meaning(q, k, v, mask, False, scale, 50.0)


def part_capped(report: Report, cases: tuple[Case, ...], deadline: float) -> None:
    sizes: tuple[int, int, int] = (16, 8, 256) if DEVICE == "cuda" else (4, 2, 16)
    for capacity, length in ((8192, 1), (2048, 2048)) if DEVICE == "cuda" else ((64, 1), (64, 64)):
        case = Case(1, capacity, capacity, *sizes)
        inputs = inputs_of(case)
        q, mask = inputs[0][0].repeat(1, 1, length, 1), inputs[0][3]
        if length > 1:
            mask = torch.ones(1, 1, length, capacity, dtype=torch.bool, device=DEVICE).tril()
        given = [(q, k, v, mask, scale) for _, k, v, _, scale in inputs]
        compiled = torch.compile(capped, dynamic=False, fullgraph=True)
        ways = {"ours": partial(attend, softcap=50.0), "inductor": compiled, "torch, not capped": by_torch}
        q, k, v, _, scale = given[0]
        want = capped(q.double(), k.double(), v.double(), mask, scale)
        for name, call in ways.items():
            try:
                us = timed(call, given)
                error = ((call(*given[0]).double() - want).norm() / want.norm()).item()
            except Exception as failure:
                report.fail("capped", f"{length} {name}: {failure}"[:400])
                continue
            report.add("capped", length=length, capacity=capacity, way=name, us=us, error=error)


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
    for case in (replace(case, codes=codes) for case in cases for codes in ("", *CODES)):
        inputs, found = inputs_of(case), []
        for tile in dict.fromkeys([case.tile(), *tiles(case)]):
            if time.time() > deadline:
                report.fail("sweep", f"out of time in {case}")
                break
            try:
                us = timed(partial(ours, tile=tile), inputs)
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
    blocks: tuple[tuple[int, ...], ...] = (
        (32, 4, 3),
        (64, 4, 3),
        (64, 8, 3),
        (128, 8, 3),
        (64, 4, 3, 4),
        (128, 8, 3, 8),
    )
    if case.codes:
        blocks = ((32, 2, 1), (64, 4, 1), (64, 8, 1), (128, 8, 1))
    for splits, (keys, *others) in itertools.product((1, 2, 4, 8, 16, 32, 64), blocks):
        if splits <= max(1, case.capacity // keys) and (64 <= pairs * splits <= 1056 or case.width < 32):
            yield AttentionTile(splits, rows, keys, *others)


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
    "capped": part_capped,
    "rope": part_rope,
    "pdl": part_pdl,
    "sweep": part_sweep,
}


if __name__ == "__main__":
    main()
