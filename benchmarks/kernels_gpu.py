"""Times GPU kernels: `python -m benchmarks.kernels_gpu --out FOLDER [--record]`, some minutes on one H100.

1. w8a8   products of 8-bit codes, with the making of the codes of x, against bf16 F.linear at the shapes of Llama-3-8B
2. light  norms, gated activations and rope against what Inductor makes of their meaning

Times are medians of CUDA graph replays, in µs; weights rotate through at least 320 MB, so they come from memory. A part
that fails is reported and the others go on. Linears of floats are linear.py's, whether the kernels are right is
check_gpu.py's to say, whether other tiles would be faster sweep_gpu.py's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._gpu import DEVICE, START, Report, Row, in_parallel, log, random_weight
from qcompile.kernels import gated_act, norm, rope
from qcompile.kernels.linear_w8a8_cuda import linear_w8a8_cuda
from qcompile.ops.activation import gated_act as gated_act_op
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qcompile.ops.rope import rope as rope_op
from qcompile.quant.packing import row_bytes
from qcompile.quant.spec import QSpec, Zero
from qcompile.timing import ROTATE_BYTES, median_us

# Weights of Llama-3-8B (outputs, inputs).
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
W8A8_ROWS = (256, 2048)

Part = Callable[[Report, float], None]


def main() -> None:
    run(PARTS, __doc__, "kernels_gpu", "GPU kernels: how fast are they?", "kernels-times")


def run(parts: dict[str, Part], doc: str | None, name: str, title: str, recorded: str) -> None:
    """The command line of timed parts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {name}.md and {name}.json")
    parser.add_argument("--seconds", type=float, default=540, help="what the whole may take")
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    if DEVICE != "cuda":
        raise SystemExit("needs a GPU")
    report = Report(options.out, name, title)
    for part in options.parts.split(","):
        log("part", part)
        try:
            parts[part](report, START + options.seconds - 20)
        except Exception:
            report.fail(part, traceback.format_exc()[-1500:])
        torch.cuda.empty_cache()
        report.write()
    print(report.body())
    if options.record:
        report.record(recorded)


# What is timed


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


def copies_for(nbytes: int) -> int:
    return max(2, min(160, math.ceil(ROTATE_BYTES / nbytes)))


def weight_bytes(spec: str, n: int, k: int) -> int:
    return QSpec.parse(spec).nbytes(n, k, 2)


def random_x(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


# The parts


def compile_ahead(work: Callable[[Row], Row], cases: list[Row], report: Report, deadline: float) -> None:
    results, troubles = in_parallel(work, cases, report.folder, 0.35 * (deadline - time.time()))
    report.notes.append(f"Compiled ahead: {len(results)} of {len(cases)}.")
    failures = [f"{case}" for case in results if case["why"]]
    for trouble in [*troubles, *failures]:
        report.fail("compile", trouble)


@functools.cache
def dense_us(name: str) -> dict[int, float]:
    """Times of bf16 F.linear, by rows of x."""
    n, k = SHAPES[name]
    weights, times = [random_x(n, k) for _ in range(copies_for(n * k * 2))], {}
    for rows in W8A8_ROWS:
        x = random_x(rows, k)
        times[rows] = median_us([partial(F.linear, x, weight) for weight in weights])
    return times


def part_w8a8(report: Report, deadline: float) -> None:
    for tag, (name, (n, k)) in itertools.product(("i8", "fp8_e4m3"), SHAPES.items()):
        spec, rounding = f"{tag}/row/sym", f"{tag}/token/dynamic"
        weights = [random_weight(spec, n, k, torch.float32) for _ in range(copies_for(n * k))]
        for rows in W8A8_ROWS:
            if time.time() > deadline:
                report.fail("w8a8", f"out of time before {spec} {name} {rows}")
                return
            x, dense = random_x(rows, k), dense_us(name)[rows]
            torch.compiler.reset()  # compilations of one function are limited
            compiled = torch.compile(linear_w8a8_cuda, dynamic=False, fullgraph=True)
            try:
                us = median_us(
                    [partial(compiled, x, None, rounding, w.data, w.scale, None, spec, None) for w in weights]
                )
            except Exception as failure:
                report.fail("w8a8", f"{spec} {name} {rows}: {failure}"[:400])
                continue
            report.add("w8a8", x=rounding, weight=spec, shape=name, rows=rows, us=us, bf16_us=dense, vs_bf16=dense / us)


def part_light(report: Report, deadline: float) -> None:
    for tokens in (1, 16, 2048):
        for name, kernel, op, args in light_calls(tokens):
            if time.time() > deadline:
                report.fail("light", f"out of time before {name} {tokens}")
                return
            try:
                ours = median_us([partial(kernel, *args)])
                theirs = median_us([partial(torch.compile(op.meaning, dynamic=False, fullgraph=True), *args)])
                report.add("light", kernel=name, tokens=tokens, us=ours, inductor_us=theirs, ratio=theirs / ours)
            except Exception as failure:
                report.fail("light", f"{name} {tokens}: {failure}"[:400])


def light_calls(tokens: int) -> list[tuple[str, Callable[..., Any], Any, tuple[Any, ...]]]:
    """(name, kernel, op, arguments) at the sizes of Llama-3-8B."""
    x, r, w, b = random_x(1, tokens, 4096), random_x(1, tokens, 4096), random_x(4096), random_x(4096)
    wide = random_x(1, tokens, 28672)
    q = random_x(1, tokens, 32, 128).transpose(1, 2)
    cos, sin = random_x(1, 1, tokens, 128), random_x(1, 1, tokens, 128)
    return [
        ("rms_norm", norm.rms_norm_cuda, rms_norm, (x, w, 1e-5, 0.0)),
        ("add_rms_norm", norm.add_rms_norm_cuda, add_rms_norm, (x, r, w, 1e-5, 0.0)),
        ("layer_norm", norm.layer_norm_cuda, layer_norm, (x, w, b, 1e-5)),
        ("add_layer_norm", norm.add_layer_norm_cuda, add_layer_norm, (x, r, w, b, 1e-5)),
        ("gated_act", gated_act.gated_act_cuda, gated_act_op, (wide[..., :14336], wide[..., 14336:], "silu")),
        ("rope", rope.rope_cuda, rope_op, (q, cos, sin)),
    ]


PARTS: dict[str, Part] = {
    "w8a8": part_w8a8,
    "light": part_light,
}


if __name__ == "__main__":
    main()
