"""Checks and times every GPU kernel: `python benchmarks/kernels_gpu.py --out DIR`, about eight minutes on one H100.

1. check   each kernel against its op's meaning in float64, on odd shapes; in parallel processes, which also compile
           what the later parts time
2. linear  against bf16 F.linear at the shapes of Llama-3-8B, with the tiles of kernels/_tuning.py
3. sweep   other tiles and ways, to fill kernels/_tuning.py with
4. light   norms, gated activations and rope against what Inductor makes of their meaning

Times are medians of CUDA graph replays; weights rotate through at least 320 MB, so they come from memory. A part that
fails is reported and the others go on. `--smoke` runs a few small checks, in Triton's interpreter
where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--smoke" in sys.argv and not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.kernels import _tuning, dequantize_gpu, gated_act, linear_cuda, linear_gemv, norm, rope
from qcompile.kernels._tuning import GemmTile, GemvTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_gemm import gemm
from qcompile.kernels.linear_gemv import gemv
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.activation import gated_act as gated_act_op
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qcompile.ops.rope import rope as rope_op
from qcompile.quant.packing import row_bytes
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROTATE_BYTES = 320e6
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
SPECS = ("i8/g64/sym", "u4/g64/asym", "i4/g128/sym", "u3/g64/asym", "u2/g64/asym", "u1/g64/asym")
ROWS = (1, 4, 16, 64, 256, 2048)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2.5e-3}
START = time.time()


def log(*words: Any) -> None:
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


# Weights


def random_weight(spec: str, n: int, k: int, side: torch.dtype) -> QTensor:
    parsed = QSpec.parse(spec)
    groups, levels = parsed.scale_shape(n, k), parsed.element.levels
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(groups, device=DEVICE) * 0.02 + 0.005).to(side)
    zero = None
    if parsed.zero is Zero.FLOAT:
        zero = (torch.rand(groups, device=DEVICE) * levels).to(side)
    elif parsed.zero is Zero.INT:
        zero = torch.randint(0, levels, groups, dtype=torch.uint8, device=DEVICE)
    return QTensor.from_codes(parsed, codes, scale, zero)


def raw_weights(spec: str, n: int, k: int, copies: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(data, scale, zero) of random bytes, bf16 scales: quick to make in hundreds of copies."""
    parsed = QSpec.parse(spec)
    groups = parsed.scale_shape(n, k)
    weights = []
    for _ in range(copies):
        data = torch.randint(0, 256, (n, row_bytes(k, parsed.element.bits)), dtype=torch.uint8, device=DEVICE)
        scale = (torch.rand(groups, device=DEVICE) * 0.02).to(torch.bfloat16)
        zero = (torch.rand(groups, device=DEVICE) * parsed.element.levels).to(torch.bfloat16)
        weights.append((data, scale, None if parsed.zero is Zero.NONE else zero))
    return weights


# Part 1: checks

ODD_SHAPES = (
    *((1, 16), (5, 16), (17, 96), (33, 112), (64, 64), (100, 200), (127, 192), (255, 320), (3, 1000), (513, 1024)),
    *((1000, 136), (1024, 1040), (768, 2304), (4096, 512), (31, 4096), (2048, 11008), (640, 14336), (7, 28672)),
    *((300, 272), (49, 7168), (511, 48), (64, 40), (9, 10), (130, 4098)),
)
ELEMENTS = ("8", "6", "5", "4", "3", "2", "1", "ternary", "7")


def linear_cases(smoke: bool) -> Iterator[dict[str, Any]]:
    """Every element × dtype × way on every shape; granularity, zero point, rows, bias and activation are drawn."""
    draw = random.Random(0)
    shapes = [s for s in ODD_SHAPES if s[0] * s[1] < 3000] if smoke else ODD_SHAPES
    dtypes = ["float32", "float16"] + ([] if DEVICE == "cpu" else ["bfloat16"])
    for way, dtype, element in itertools.product(("gemv", "gemm", "dequantize"), dtypes, ELEMENTS):
        # Shapes take turns, so that each is met by every way and dtype, and no element costs an hour.
        offset = draw.randrange(3)
        for n, k in shapes[offset :: 12 if smoke else 3]:
            groups = [g for g in (16, 32, 48, 64, 128, 256) if k % g == 0]
            grouped = [f"g{draw.choice(groups)}"] * 3 if groups else []
            granularity = draw.choice([*grouped, "row", "tensor"])
            zero = draw.choice(["sym", "asym", "asym_int"])
            prefix = "u" if zero != "sym" else "i"
            if element == "ternary" or (element == "1" and zero == "sym"):
                prefix, tag = "", "ternary"
            else:
                tag = element
            yield {
                "kind": "linear",
                "spec": f"{prefix}{tag}/{granularity}/{zero}",
                "shape": [n, k],
                "rows": draw.choice((1, 2, 3, 5, 8) if way == "gemv" else (1, 2, 3, 5, 8, 16, 17, 64, 257)),
                "dtype": dtype,
                "side": draw.choice(["float32", "float16"] + ([] if DEVICE == "cpu" else ["bfloat16"])),
                "bias": draw.random() < 0.3,
                "activation": draw.choice([None, None, *ACTIVATIONS]),
                "way": way,
            }


def light_cases(smoke: bool) -> Iterator[dict[str, Any]]:
    dtypes = ["float32", "float16"] + ([] if DEVICE == "cpu" else ["bfloat16"])
    sizes = [(1, 1), (3, 7), (5, 100), (17, 128), (2, 4096), (9, 3000), (33, 2050), (4, 14336), (2, 40000), (300, 64)]
    sizes += [(7, 5), (1, 8191), (129, 256), (64, 1), (2, 65536), (11, 768), (6, 5120), (1000, 33), (13, 1027), (8, 80)]
    for dtype, (m, n) in itertools.product(dtypes, sizes[:4] if smoke else sizes):
        for kernel in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "gated_act", "rope"):
            yield {"kind": kernel, "shape": [m, n], "dtype": dtype}


def relative_error(got: Tensor, want: Tensor) -> float:
    if not torch.isfinite(got).all():
        return math.inf
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check_linear(case: dict[str, Any]) -> float:
    dtype, side = getattr(torch, case["dtype"]), getattr(torch, case["side"])
    (n, k), m, spec = case["shape"], case["rows"], case["spec"]
    q = random_weight(spec, n, k, side)
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    bias = torch.randn(n, device=DEVICE).to(dtype) if case["bias"] else None
    assert isinstance(q.scale, Tensor) and not isinstance(q.zero, QTensor)
    args = (q.data, q.scale, q.zero, bias, spec, case["activation"])
    if reason := linear_cuda.refuses(x, *args):
        raise RuntimeError(f"refused: {reason}")
    _tuning.way = lambda *_: case["way"]
    got = linear_cuda.linear_cuda(x, *args)
    # The op rounds the weight to the dtype of x; a kernel that does not is as right.
    exact = q.dequantize(torch.float64)
    errors = []
    for weight in (exact, exact.to(dtype).double()):
        y = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
        errors.append(relative_error(got, ACTIVATIONS[case["activation"]](y) if case["activation"] else y))
    error = min(errors)
    if case["way"] == "dequantize":
        weight = dequantize_gpu.dequantize_cuda(q.data, q.scale, q.zero, spec, [n, k], dtype)
        error = max(error, relative_error(weight, exact))
    return error


def check_light(case: dict[str, Any]) -> float:
    dtype, (m, n) = getattr(torch, case["dtype"]), case["shape"]

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE) + 0.5).to(dtype)

    x = tensor(m, 2 * n).narrow(1, n, n)
    pairs: list[tuple[Any, Any, tuple[Any, ...]]]
    if case["kind"] == "rms_norm":
        pairs = [(norm.rms_norm_cuda, rms_norm, (x, w, 1e-6, o)) for w, o in ((tensor(n), 0.0), (None, 0.0))]
        pairs.append((norm.rms_norm_cuda, rms_norm, (tensor(m, n), tensor(n).float(), 1e-5, 1.0)))
    elif case["kind"] == "add_rms_norm":
        pairs = [(norm.add_rms_norm_cuda, add_rms_norm, (x, tensor(m, n), tensor(n), 1e-6, 0.0))]
    elif case["kind"] == "layer_norm":
        pairs = [(norm.layer_norm_cuda, layer_norm, (x, w, b, 1e-5)) for w, b in ((tensor(n), tensor(n)), (None, None))]
    elif case["kind"] == "add_layer_norm":
        pairs = [(norm.add_layer_norm_cuda, add_layer_norm, (x, tensor(m, n), tensor(n), None, 1e-5))]
    elif case["kind"] == "gated_act":
        wide = tensor(2, m, 2 * n)
        pairs = [(gated_act.gated_act_cuda, gated_act_op, (wide[..., :n], wide[..., n:], name)) for name in ACTIVATIONS]
    else:
        d = min(2 * n, 256)
        wide = tensor(2, m, 5, d).transpose(1, 2)
        pairs = [
            (rope.rope_cuda, rope_op, (wide[:, :3], tensor(b, 1, m, d), tensor(b, 1, m, d).float())) for b in (1, 2)
        ]
    worst = 0.0
    for kernel, op, args in pairs:
        got = kernel(*args)
        want = op.meaning(*(a.double() if isinstance(a, Tensor) else a for a in args))
        if isinstance(got, tuple):  # the norm is of the rounded sum
            want = (op.meaning(got[1].double(), torch.zeros_like(got[1]).double(), *args[2:])[0], want[1])
        for one, other in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want]):
            if n > 1 or "layer_norm" not in case["kind"]:  # the layer norm of a single element is all noise
                worst = max(worst, relative_error(one, other))
    return worst


def check(case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        error = check_linear(case) if case["kind"] == "linear" else check_light(case)
        # The tolerance is for many values; of a few, each may be off by half a unit in the last place.
        dtype, few = getattr(torch, case["dtype"]), math.prod(case["shape"]) < 256
        # Behind a product that cuBLAS has rounded, an activation rounds again.
        twice = case.get("way") == "dequantize" and case["activation"]
        good = error <= max(TOLERANCE[dtype] * (2 if twice else 1), torch.finfo(dtype).eps / 2 if few else 0)
        return {**case, "error": error, "verdict": "ok" if good else "WRONG"}
    except Exception as failure:
        return {**case, "verdict": "FAILED", "why": f"{type(failure).__name__}: {failure}"[-600:]}


# Tiles to try


def gemv_tiles(spec: str) -> list[GemvTile]:
    bits = QSpec.parse(spec).element.bits
    spans = ((32, 1), (64, 1), (64, 2), (128, 4)) if bits < 4 else ((64, 2), (128, 2), (128, 4), (256, 4), (256, 8))
    return [GemvTile(outputs, chunks, warps) for (chunks, warps) in spans for outputs in (1, 2, 4, 8)]


def gemm_tiles(rows: int) -> list[GemmTile]:
    if rows <= 16:
        shapes = ((16, 32, 4, 4, 3), (16, 64, 4, 4, 3), (16, 64, 4, 4, 5), (16, 64, 8, 4, 3), (16, 128, 4, 4, 3))
        return [GemmTile(m, n, c, s, w, g) for (m, n, c, w, g), s in itertools.product(shapes, (1, 2, 4, 8))]
    if rows <= 64:
        shapes = ((64, 64, 4, 4, 3), (64, 128, 4, 4, 3), (64, 128, 4, 8, 3), (64, 64, 4, 4, 4), (64, 256, 4, 8, 3))
        return [GemmTile(m, n, c, s, w, g) for (m, n, c, w, g), s in itertools.product(shapes, (1, 2, 4))]
    shapes = ((128, 128, 4, 8, 3), (128, 128, 4, 4, 3), (128, 256, 4, 8, 3), (256, 128, 4, 8, 3), (64, 256, 4, 8, 3))
    return [GemmTile(m, n, c, s, w, g) for (m, n, c, w, g), s in itertools.product(shapes, (1, 2))]


def warm_cases() -> Iterator[dict[str, Any]]:
    """Everything that parts 2 and 3 launch, on the smaller shapes: equal constants are one compilation."""
    for spec in SPECS:
        for rows, name in itertools.product((1, 4, 8), ("o", "down")):
            for tile in gemv_tiles(spec):
                yield {"kind": "warm", "way": "gemv", "spec": spec, "rows": rows, "shape": name, "tile": vars(tile)}
    for spec in ("u4/g64/asym", "i4/g128/sym"):
        for rows, name in itertools.product((16, 64, 256), ("o", "down")):
            seen = {tuple(vars(t).values())[:3] + tuple(vars(t).values())[4:]: t for t in gemm_tiles(rows)}
            for tile in seen.values():
                yield {"kind": "warm", "way": "gemm", "spec": spec, "rows": rows, "shape": name, "tile": vars(tile)}
    for spec, rows, name in itertools.product(SPECS, ROWS, ("o", "down")):
        yield {"kind": "warm", "way": "default", "spec": spec, "rows": rows, "shape": name}


def warm(case: dict[str, Any]) -> dict[str, Any]:
    try:
        n, k = SHAPES[case["shape"]]
        weight = raw_weights(case["spec"], n, k, 1)[0]
        x = torch.randn(case["rows"], k, device=DEVICE).to(torch.bfloat16)
        if case["way"] == "default":
            linear_cuda.linear_cuda(x, *weight, None, case["spec"], None)
        elif case["way"] == "gemv":
            gemv(x, Weight.of(*weight, case["spec"], k), None, None, GemvTile(**case["tile"]))
        else:
            gemm(x, Weight.of(*weight, case["spec"], k), None, None, GemmTile(**case["tile"]))
        torch.cuda.synchronize()
        return {**case, "verdict": "ok"}
    except Exception as failure:
        return {**case, "verdict": "FAILED", "why": f"{type(failure).__name__}: {failure}"[-600:]}


def worker(index: int, count: int, out: Path, deadline: float) -> None:
    cases = [*linear_cases(False), *light_cases(False)]
    random.Random(1).shuffle(cases)
    # What the sweep needs is compiled with the time that is left.
    for case in [*cases[index::count], *list(warm_cases())[index::count]]:
        if time.time() > deadline:
            break
        result = warm(case) if case["kind"] == "warm" else check(case)
        with (out / f"check-{index}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def part_check(out: Path, report: Report, seconds: float) -> None:
    count = max(1, min(14, (os.cpu_count() or 2) - 2))
    for old in out.glob("check-*.jsonl"):
        old.unlink()
    deadline = time.time() + seconds
    command = [sys.executable, __file__, "--out", str(out), "--deadline", str(deadline)]
    workers = [subprocess.Popen([*command, "--worker", f"{i}/{count}"]) for i in range(count)]
    for process in workers:
        try:
            process.wait(timeout=max(1.0, deadline + 45 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            report.fail("check", f"worker {process.args[-1]} hung")  # type: ignore[index]
    results = [json.loads(line) for file in out.glob("check-*.jsonl") for line in file.read_text().splitlines()]
    planned = len([*linear_cases(False), *light_cases(False)]), len(list(warm_cases()))
    report.checks(results, planned)


# Parts 2 to 4: times


def median_us(calls: list[Callable[[], Any]], at_least: int = 24) -> float:
    """Median time of one call, in a graph that makes all of them as often as it takes to have `at_least`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = max(1, math.ceil(at_least / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    graph.replay()
    torch.cuda.synchronize()
    began = time.time()
    while len(times) < 7 or (len(times) < 40 and time.time() - began < 0.015):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return sorted(times)[len(times) // 2] * 1e3 / (rounds * len(calls))


def copies_for(nbytes: int) -> int:
    return max(2, min(160, math.ceil(ROTATE_BYTES / nbytes)))


def weight_bytes(spec: str, n: int, k: int) -> int:
    return QSpec.parse(spec).nbytes(n, k, 2)


def part_linear(report: Report, deadline: float) -> None:
    dense: dict[tuple[str, int], float] = {}
    for name, (n, k) in SHAPES.items():
        weights = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies_for(n * k * 2))]
        for rows in ROWS:
            x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
            dense[name, rows] = median_us([lambda w=w, x=x: F.linear(x, w) for w in weights])
            report.add("dense", shape=name, rows=rows, us=dense[name, rows])
        del weights
    for spec, (name, (n, k)) in itertools.product(SPECS, SHAPES.items()):
        weights = raw_weights(spec, n, k, copies_for(weight_bytes(spec, n, k)))
        for rows in ROWS:
            if time.time() > deadline:
                report.fail("linear", f"out of time before {spec} {name} {rows}")
                return
            x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
            try:
                us = median_us([partial(linear_cuda.linear_cuda, x, *w, None, spec, None) for w in weights])
            except Exception as failure:
                report.fail("linear", f"{spec} {name} {rows}: {failure}"[:400])
                continue
            gbps = weight_bytes(spec, n, k) / us / 1e3
            way = _tuning.way(rows, n, k, QSpec.parse(spec).element.bits, _tuning.Device.of(x.device))
            report.add(
                "linear", spec=spec, shape=name, rows=rows, way=way, us=us, gbps=gbps, vs_bf16=dense[name, rows] / us
            )
        del weights


def part_sweep(report: Report, deadline: float) -> None:
    def try_all(kind: str, spec: str, name: str, rows: int, runs: list[tuple[str, Callable[..., Any]]]) -> None:
        n, k = SHAPES[name]
        weights = [Weight.of(*w, spec, k) for w in raw_weights(spec, n, k, copies_for(weight_bytes(spec, n, k)))]
        x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
        found = []
        for label, run in runs:
            if time.time() > deadline:
                report.fail("sweep", f"out of time in {kind} {spec} {name} {rows}")
                break
            try:
                found.append((median_us([lambda w=w, run=run: run(x, w) for w in weights]), label))
            except Exception as failure:
                report.fail("sweep", f"{kind} {spec} {name} {rows} {label}: {failure}"[:300])
        for us, label in sorted(found)[:60]:
            gbps = weight_bytes(spec, n, k) / us / 1e3
            report.add("sweep", kind=kind, spec=spec, shape=name, rows=rows, us=us, gbps=gbps, tile=label)

    def by_gemv(tile: GemvTile) -> Callable[..., Any]:
        return lambda x, w: gemv(x, w, None, None, tile)

    def by_gemm(tile: GemmTile) -> Callable[..., Any]:
        return lambda x, w: gemm(x, w, None, None, tile)

    def short(tile: Any) -> str:
        return " ".join(f"{key}={value}" for key, value in vars(tile).items())

    order = ("u4/g64/asym", "i4/g128/sym", "i8/g64/sym", "u2/g64/asym", "u3/g64/asym", "u1/g64/asym")
    for rows, spec, name in itertools.product((1, 4, 8), order, ("o", "down", "gate_up", "qkv")):
        if name == "qkv" and (rows != 1 or spec not in order[:2]):
            continue
        if rows == 8 and spec not in order[:1]:
            continue
        tiles = [t for t in gemv_tiles(spec) if t.outputs * rows <= 32]
        try_all("gemv", spec, name, rows, [(short(t), by_gemv(t)) for t in tiles])
    multiply: tuple[str, Callable[..., Any]] = (
        "dequantize",
        lambda x, w: linear_cuda.dequantize_and_multiply(x, w, None, None),
    )
    for rows, name in itertools.product((4, 16, 64, 256), ("o", "gate_up", "down")):
        tiles = gemm_tiles(rows)
        try_all("gemm", order[1], name, rows, [*((short(t), by_gemm(t)) for t in tiles), multiply])
    # Does starting early (programmatic dependent launch) pay?
    keep = linear_gemv.dependent_launch
    linear_gemv.dependent_launch = lambda x: False
    for name in ("o", "gate_up", "down"):
        tile = _tuning.gemv_tile(1, *SHAPES[name], 32)
        try_all("gemv without PDL", order[0], name, 1, [(short(tile), by_gemv(tile))])
    linear_gemv.dependent_launch = keep
    # The slab of the float copy: does it stay in the cache?
    for elements, (name, rows) in itertools.product((4 << 20, 8 << 20, 16 << 20, 1 << 40), [("gate_up", 256)]):
        _tuning.SLAB_ELEMENTS = elements
        try_all("slab", order[1], name, rows, [(f"{elements >> 20} Mi", multiply[1])])
        try_all("slab", order[1], name, 2048, [(f"{elements >> 20} Mi", multiply[1])])


def part_light(report: Report, deadline: float) -> None:
    bf16 = torch.bfloat16
    for tokens in (1, 16, 2048):
        x, r = (torch.randn(1, tokens, 4096, device=DEVICE, dtype=bf16) for _ in range(2))
        w, b = (torch.randn(4096, device=DEVICE, dtype=bf16) for _ in range(2))
        wide = torch.randn(1, tokens, 28672, device=DEVICE, dtype=bf16)
        q = torch.randn(1, tokens, 32, 128, device=DEVICE, dtype=bf16).transpose(1, 2)
        cos, sin = (torch.randn(1, 1, tokens, 128, device=DEVICE, dtype=bf16) for _ in range(2))
        jobs = [
            ("rms_norm", norm.rms_norm_cuda, rms_norm, (x, w, 1e-5, 0.0)),
            ("add_rms_norm", norm.add_rms_norm_cuda, add_rms_norm, (x, r, w, 1e-5, 0.0)),
            ("layer_norm", norm.layer_norm_cuda, layer_norm, (x, w, b, 1e-5)),
            ("add_layer_norm", norm.add_layer_norm_cuda, add_layer_norm, (x, r, w, b, 1e-5)),
            ("gated_act", gated_act.gated_act_cuda, gated_act_op, (wide[..., :14336], wide[..., 14336:], "silu")),
            ("rope", rope.rope_cuda, rope_op, (q, cos, sin)),
        ]
        for name, kernel, op, args in jobs:
            if time.time() > deadline:
                report.fail("light", f"out of time before {name} {tokens}")
                return
            try:
                ours = median_us([lambda kernel=kernel, args=args: kernel(*args)])
                compiled = torch.compile(op.meaning, dynamic=False, fullgraph=True)
                compiled(*args)
                theirs = median_us([lambda compiled=compiled, args=args: compiled(*args)])
                report.add("light", kernel=name, tokens=tokens, us=ours, inductor_us=theirs, ratio=theirs / ours)
            except Exception as failure:
                report.fail("light", f"{name} {tokens}: {failure}"[:400])


# The report


class Report:
    """Rows by part, written after every one, so that a run that is cut off leaves what it had."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.failures: list[str] = []
        self.notes: list[str] = [f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu'}, {versions()}"]
        self.written = 0.0

    def add(self, part: str, **row: Any) -> None:
        self.rows.setdefault(part, []).append(row)
        if time.time() - self.written > 5:
            self.write()

    def fail(self, part: str, why: str) -> None:
        self.failures.append(f"{part}: {why}")
        log("FAILED", part, why)

    def checks(self, results: list[dict[str, Any]], planned: tuple[int, int]) -> None:
        for failed in (r for r in results if r["verdict"] != "ok"):
            self.fail("warm" if failed["kind"] == "warm" else "check", json.dumps(failed))
        warmed = [r for r in results if r["kind"] == "warm"]
        checked = [r for r in results if r["kind"] != "warm"]
        good = sum(r["verdict"] == "ok" for r in checked)
        self.notes.append(f"checks: {good} right of {len(checked)} run of {planned[0]} planned; "
                          f"compiled ahead: {len(warmed)} of {planned[1]}")  # fmt: skip
        for kind in sorted({(r["kind"], r.get("way") or "", r["dtype"]) for r in checked}):
            mine = [r for r in checked if (r["kind"], r.get("way") or "", r["dtype"]) == kind]
            errors = [r["error"] for r in mine if "error" in r]
            good = sum(r["verdict"] == "ok" for r in mine)
            what = " ".join(kind)
            self.add(
                "check",
                what=what,
                cases=len(mine),
                right=good,
                median_error=sorted(errors)[len(errors) // 2] if errors else math.nan,
                worst_error=max(errors, default=math.nan),
            )

    def write(self) -> None:
        self.written = time.time()
        everything = {"notes": self.notes, "failures": self.failures, **self.rows}
        (self.out / "kernels_gpu.json").write_text(json.dumps(everything, indent=1))
        (self.out / "kernels_gpu.md").write_text(self.markdown())

    def markdown(self) -> str:
        text = ["# GPU kernels", *self.notes]
        for part, rows in self.rows.items():
            if part == "sweep":
                rows = self.best_of_sweep()
            keys = list(rows[0])
            text += ["", f"## {part}", "", "| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
            text += ["| " + " | ".join(show(row.get(key)) for key in keys) + " |" for row in rows]
        if self.failures:
            text += ["", "## failures", "", *(f"- {failure}" for failure in self.failures)]
        return "\n".join(text) + "\n"

    def best_of_sweep(self) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows["sweep"]:
            groups.setdefault((row["kind"], row["spec"], row["shape"], row["rows"]), []).append(row)
        return [row for rows in groups.values() for row in sorted(rows, key=lambda r: r["us"])[:3]]


def versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.05 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels_gpu"))
    parser.add_argument("--seconds", type=float, default=460, help="what the whole may take")
    parser.add_argument("--parts", default="check,linear,light,sweep")
    parser.add_argument("--smoke", action="store_true", help="a few small checks in this process, no times")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        index, count = map(int, options.worker.split("/"))
        worker(index, count, options.out, options.deadline)
        return
    report = Report(options.out)
    if options.smoke:
        cases = [*linear_cases(True), *light_cases(True)]
        report.checks([check(case) for case in cases], (len(cases), 0))
    else:
        end = START + options.seconds
        parts = {
            "check": lambda: part_check(options.out, report, 0.42 * options.seconds),
            "linear": lambda: part_linear(report, end - 20),
            "light": lambda: part_light(report, end - 20),
            "sweep": lambda: part_sweep(report, end - 10),
        }
        for name in options.parts.split(","):
            log("part", name)
            try:
                parts[name]()
            except Exception:
                report.fail(name, traceback.format_exc()[-1500:])
            torch.cuda.empty_cache()
            report.write()
    report.write()
    print(report.markdown())


if __name__ == "__main__":
    main()
