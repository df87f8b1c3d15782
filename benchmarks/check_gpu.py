"""Checks every GPU kernel against its op's meaning in float64, on odd shapes.

    python -m benchmarks.check_gpu --out FOLDER [--seconds 540] [--record]

Cases are drawn, the same ones every time, and run in parallel processes, as each compiles kernels of its own. What is
not begun within the time is left out, and the report says how many that are. The error of a case is the norm of the
difference by the norm of the result. The exit status is 1 if a case is wrong.

`--smoke` runs small cases only, in this process, and in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if "--smoke" in sys.argv and not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._gpu import DEVICE, Report, Row, in_parallel, random_weight
from qcompile.kernels import _tuning, dequantize_gpu, gated_act, linear_cuda, linear_w8a8_cuda, norm, rope
from qcompile.kernels._ways import OF_INTEGERS
from qcompile.kernels._weight import Layout
from qcompile.kernels.linear_few import can_sum
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.activation import gated_act as gated_act_op
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qcompile.ops.rope import rope as rope_op
from qcompile.quant.activation import ActivationSpec, activation_codes

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
DTYPES = ["float32", "float16"] + ([] if DEVICE == "cpu" else ["bfloat16"])  # the interpreter gets bfloat16 wrong
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2.5e-3}
SMALL = 3000  # elements of a weight that the interpreter manages in a second

# Shapes of weights (outputs, inputs).
SHAPES = (
    *((1, 16), (5, 16), (17, 96), (33, 112), (64, 64), (100, 200), (127, 192), (255, 320), (3, 1000), (513, 1024)),
    *((1000, 136), (1024, 1040), (768, 2304), (4096, 512), (31, 4096), (2048, 11008), (640, 14336), (7, 28672)),
    *((300, 272), (49, 7168), (511, 48), (64, 40), (9, 10), (130, 4098)),
)
# Rows of x by way.
ROWS = {
    "dot": (1, 2),
    "few": (1, 3, 8, 16),
    "mma": (1, 9, 16, 33, 64),
    "wgmma": (97, 257),
    "gemv": (1, 2, 3, 5, 8),
    "gemm": (1, 2, 3, 5, 8, 16, 17, 64, 257),
    "dequantize": (1, 2, 3, 5, 8, 16, 17, 64, 257),
}
# Elements and zero points that one of is drawn from.
INTEGERS = (
    *([(f"i{bits}", "sym"), (f"u{bits}", "asym"), (f"u{bits}", "asym_int")] for bits in range(2, 9)),
    [("ternary", "sym"), ("u1", "asym"), ("u1", "asym_int")],
    [("ternary", "sym"), ("ternary", "asym"), ("ternary", "asym_int")],
)
FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "fp4_bnb", "nf4", "iq4")
OTHERS = (*([(tag, "sym")] for tag in FLOATS), *([(f"u{bits}", "shift")] for bits in range(2, 9)))
TILED, TILES = ("i8", "fp8_e4m3", "fp8_e5m2"), ("b128x128", "b2x32", "b3x48")

W8A8_SHAPES = (
    *((16, 64), (5, 33), (48, 32), (37, 64), (256, 512), (130, 200), (1024, 1040), (1000, 136), (768, 2304)),
    *((7, 4096), (4096, 4096), (513, 1024), (2048, 11008), (640, 14336)),
)
W8A8_ROUNDINGS = {
    "i8": ("i8/token/dynamic", "i8/token/dynamic/half", "i8/tensor/static"),
    "fp8_e4m3": ("fp8_e4m3/token/dynamic", "fp8_e4m3/tensor/static", "fp8_e4m3/tensor/dynamic"),
}

# Shapes of activations (tokens, features).
LIGHT_SHAPES = (
    *((1, 1), (3, 7), (5, 100), (17, 128), (2, 4096), (9, 3000), (33, 2050), (4, 14336), (2, 40000), (300, 64)),
    *((7, 5), (1, 8191), (129, 256), (64, 1), (2, 65536), (11, 768), (6, 5120), (1000, 33), (13, 1027), (8, 80)),
)
LIGHT = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "gated_act", "rope")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for check_gpu.md and check_gpu.json")
    parser.add_argument("--seconds", type=float, default=540, help="begin no case after them")
    parser.add_argument("--smoke", action="store_true", help="a few small cases, in this process")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    report = Report(options.out, "check_gpu", "GPU kernels: are they right?")
    cases = [*linear_cases(options.smoke), *w8a8_cases(options.smoke), *light_cases(options.smoke)]
    random.Random(1).shuffle(cases)
    troubles: list[str] = []
    if options.smoke:
        results = [check(case) for case in cases]
    else:
        results, troubles = in_parallel(check, cases, options.out, options.seconds)
    for trouble in troubles:
        report.fail("check", trouble)
    summarize(results, len(cases), report)
    report.write()
    print(report.body())
    if options.record:
        report.record("kernels-check")
    raise SystemExit(1 if report.failures else 0)


# Cases


def linear_cases(smoke: bool) -> Iterator[Row]:
    """Every element × way × dtype on a third of the shapes, or a sixth; the rest is drawn."""
    draw = random.Random(0)
    shapes = small(SHAPES) if smoke else SHAPES
    elements = [(choices, 3) for choices in INTEGERS] + [(choices, 6) for choices in OTHERS]
    for way, dtype, (choices, part) in itertools.product(ROWS, DTYPES, elements):
        gluon = way in OF_INTEGERS
        if way == "wgmma" and not HOPPER:
            continue
        if gluon and (DEVICE == "cpu" or dtype == "float32" or choices[0][0] in FLOATS):
            continue
        if way == "few" and not can_sum(getattr(torch, dtype), Layout.of("/row/".join(choices[0]))):
            continue
        # Shapes take turns, so that each is met by every way and dtype, and no element costs an hour.
        offset = draw.randrange(part) % len(shapes)
        for n, k in shapes[offset :: 12 if smoke else part]:
            if gluon and k % 16:
                continue
            yield {
                "kind": "linear",
                "spec": draw_spec(draw, choices, k, tiled=not gluon),
                "shape": [n, k],
                "rows": draw.choice(ROWS[way]),
                "dtype": dtype,
                "side": draw.choice(DTYPES),
                "bias": draw.random() < 0.3,
                "activation": draw.choice([None, None, *ACTIVATIONS]),
                "way": way,
            }


def draw_spec(draw: random.Random, choices: Sequence[tuple[str, str]], k: int, tiled: bool) -> str:
    """One of these (element, zero point) in some granularity, for a weight with k inputs."""
    tag, zero = draw.choice(choices)
    groups = [f"g{size}" for size in (16, 32, 48, 64, 128, 256) if k % size == 0]
    grouped = [draw.choice(groups)] * 3 if groups else []
    tiles = TILES if tag in TILED and tiled else ()
    return f"{tag}/{draw.choice([*grouped, *tiles, 'row', 'tensor'])}/{zero}"


def w8a8_cases(smoke: bool) -> Iterator[Row]:
    """Every rounding of x × dtype on half of the shapes; the rest is drawn."""
    draw = random.Random(0)
    shapes = small(W8A8_SHAPES) if smoke else W8A8_SHAPES
    for dtype, (tag, roundings) in itertools.product(DTYPES, W8A8_ROUNDINGS.items()):
        if tag == "fp8_e4m3" and (dtype == "float32" or not multiplies_fp8()):
            continue
        for rounding in roundings:
            for n, k in draw.sample(shapes, len(shapes) // 2):
                rows = draw.choice((1, 5, 16, 17, 40, 128, 257, 300))
                yield {
                    "kind": "w8a8",
                    "spec": f"{tag}/{draw.choice(['row', 'tensor'])}/sym",
                    "rounding": rounding,
                    "shape": [n, k],
                    "rows": rows,
                    "dtype": dtype,
                    "bias": draw.random() < 0.3,
                    "activation": draw.choice([None, None, *ACTIVATIONS]),
                    "way": f"{tag} {'codes' if multiplies_codes(rows, n, k) else 'rounded'}",
                }


def multiplies_codes(rows: int, n: int, k: int) -> bool:
    """Are codes of x multiplied, or is x' rounded and multiplied as other inputs are?"""
    return rows >= linear_w8a8_cuda.MIN_ROWS and n % 16 == 0 and k % 16 == 0


def multiplies_fp8() -> bool:
    return DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def light_cases(smoke: bool) -> Iterator[Row]:
    for dtype, shape, kind in itertools.product(DTYPES, LIGHT_SHAPES[:4] if smoke else LIGHT_SHAPES, LIGHT):
        if shape[1] > 1 or "layer_norm" not in kind:  # the layer norm of a single element is all noise
            yield {"kind": kind, "shape": list(shape), "dtype": dtype}


def small(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(n, k) for n, k in shapes if n * k < SMALL]


# A case


def check(case: Row) -> Row:
    """The case with its error and a verdict: ok, WRONG, or FAILED with the reason."""
    torch.manual_seed(0)
    try:
        error = {"linear": check_linear, "w8a8": check_w8a8}.get(case["kind"], check_light)(case)
        return {**case, "error": error, "verdict": "ok" if error <= tolerance(case) else "WRONG"}
    except Exception as failure:
        return {**case, "verdict": "FAILED", "why": f"{type(failure).__name__}: {failure}"[-600:]}


def tolerance(case: Row) -> float:
    """The largest relative error that roundings to the dtype explain."""
    dtype, (n, k) = getattr(torch, case["dtype"]), case["shape"]
    few = n * min(k, case.get("rows", k)) < 256  # weights or results: each may be off by half a unit in the last place
    # cuBLAS adds parts of a long product in 16 bits: what it makes of the float weight is as far off.
    cublas = 1.25 * case.get("cublas_error", 0.0)
    return max(TOLERANCE[dtype] * roundings(case), cublas, torch.finfo(dtype).eps / 2 if few else 0)


def roundings(case: Row) -> int:
    """How many times the tolerance is allowed."""
    if case["kind"] == "w8a8":
        return 1 if case["way"].endswith("codes") else 2
    # Behind a product that cuBLAS has rounded, an activation rounds again.
    return 2 if case.get("way") == "dequantize" and case["activation"] else 1


def check_linear(case: Row) -> float:
    dtype, side = getattr(torch, case["dtype"]), getattr(torch, case["side"])
    (n, k), spec = case["shape"], case["spec"]
    q = random_weight(spec, n, k, side)
    x, bias = random_inputs(case)
    args = (q.data, q.scale, q.zero, bias, spec, case["activation"])
    must_not_refuse(linear_cuda.refuses(x, *args))  # type: ignore[arg-type]
    with mock.patch.object(_tuning, "way", lambda *_: case["way"]):
        got = linear_cuda.linear_cuda(x, *args)
    # The op rounds the weight to the dtype of x; a kernel that does not is as right. One that leaves the scale of a row
    # to the end rounds code - zero.
    exact = q.dequantize(torch.float64)
    rounded = exact.to(dtype).double()
    weights = [exact, rounded]
    if case["way"] == "gemm" and re.search(r"/(row|tensor)/asym$", spec):
        weights.append((q.codes().double() - q.zero.double()).to(dtype).double() * q.scale.double())  # type: ignore[union-attr]
    error = min(relative_error(got, linear64(x.double(), weight, bias, case["activation"])) for weight in weights)
    if case["way"] == "dequantize":
        product = linear_in(x, rounded.to(dtype), bias, case["activation"])
        case["cublas_error"] = relative_error(product, linear64(x.double(), rounded, bias, case["activation"]))
        weight = dequantize_gpu.dequantize_cuda(q.data, q.scale, q.zero, spec, [n, k], dtype)
        error = max(error, relative_error(weight, exact))
    return error


def check_w8a8(case: Row) -> float:
    (n, k), spec = case["shape"], case["spec"]
    q = random_weight(spec, n, k, torch.float32)
    x, bias = random_inputs(case)
    x_scale = torch.tensor(0.03, device=DEVICE) if "static" in case["rounding"] else None
    args = (x_scale, case["rounding"], q.data, q.scale, None, bias, spec, case["activation"])
    must_not_refuse(linear_w8a8_cuda.refuses(x, *args))  # type: ignore[arg-type]
    got = linear_w8a8_cuda.linear_w8a8_cuda(x, *args)  # type: ignore[arg-type]
    codes, step = activation_codes(x, x_scale, ActivationSpec.parse(case["rounding"]))
    rounded = codes.float().double() * step.double()
    return relative_error(got, linear64(rounded, q.dequantize(torch.float64), bias, case["activation"]))


def random_inputs(case: Row) -> tuple[Tensor, Tensor | None]:
    """x (rows, inputs) and, where the case has one, a bias (outputs,)."""
    dtype, (n, k) = getattr(torch, case["dtype"]), case["shape"]
    x = torch.randn(case["rows"], k, device=DEVICE).to(dtype)
    return x, torch.randn(n, device=DEVICE).to(dtype) if case["bias"] else None


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x @ weight.T + bias) in float64."""
    y = F.linear(x, weight, None if bias is None else bias.double())
    return ACTIVATIONS[activation](y) if activation else y


def linear_in(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x @ weight.T + bias) in the dtype of x."""
    y = F.linear(x, weight, bias)
    return ACTIVATIONS[activation](y.float()).to(y.dtype) if activation else y


def must_not_refuse(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"refused: {reason}")


def check_light(case: Row) -> float:
    return max(error_of_call(*call) for call in light_calls(case))


def error_of_call(kernel: Callable[..., Any], op: Any, args: tuple[Any, ...]) -> float:
    """The larger error, where a kernel gives two results."""
    got, want = kernel(*args), op.meaning(*map(in_float64, args))
    if not isinstance(got, tuple):
        return relative_error(got, want)
    added = got[1].double()  # the norm is of the rounded sum
    normed = op.meaning(added, torch.zeros_like(added), *map(in_float64, args[2:]))[0]
    return max(relative_error(got[0], normed), relative_error(got[1], want[1]))


def light_calls(case: Row) -> list[tuple[Callable[..., Any], Any, tuple[Any, ...]]]:
    """(kernel, op, arguments) of the calls that check this kernel at x (m, n)."""
    dtype, (m, n) = getattr(torch, case["dtype"]), case["shape"]

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE) + 0.5).to(dtype)

    x = tensor(m, 2 * n).narrow(1, n, n)
    if case["kind"] == "rms_norm":
        calls = [(x, tensor(n), 1e-6, 0.0), (x, None, 1e-6, 0.0), (tensor(m, n), tensor(n).float(), 1e-5, 1.0)]
        return [(norm.rms_norm_cuda, rms_norm, args) for args in calls]
    if case["kind"] == "add_rms_norm":
        return [(norm.add_rms_norm_cuda, add_rms_norm, (x, tensor(m, n), tensor(n), 1e-6, 0.0))]
    if case["kind"] == "layer_norm":
        sides = [(tensor(n), tensor(n)), (None, None)]
        return [(norm.layer_norm_cuda, layer_norm, (x, weight, bias, 1e-5)) for weight, bias in sides]
    if case["kind"] == "add_layer_norm":
        return [(norm.add_layer_norm_cuda, add_layer_norm, (x, tensor(m, n), tensor(n), None, 1e-5))]
    if case["kind"] == "gated_act":
        wide = tensor(2, m, 2 * n)
        return [(gated_act.gated_act_cuda, gated_act_op, (wide[..., :n], wide[..., n:], name)) for name in ACTIVATIONS]
    width = min(2 * n, 256)
    heads = tensor(2, m, 5, width).transpose(1, 2)[:, :3]
    angles = [(tensor(batch, 1, m, width), tensor(batch, 1, m, width).float()) for batch in (1, 2)]
    return [(rope.rope_cuda, rope_op, (heads, cos, sin)) for cos, sin in angles]


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def relative_error(got: Tensor, want: Tensor) -> float:
    if not torch.isfinite(got).all():
        return math.inf
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


# The report


def summarize(results: Sequence[Row], planned: int, report: Report) -> None:
    """A row for each kind, way and dtype, and every failure."""
    good = sum(result["verdict"] == "ok" for result in results)
    report.notes.append(f"{good} cases are right, of {len(results)} that ran and {planned} that were planned.")

    def group(result: Row) -> tuple[str, str, str]:
        return result["kind"], result.get("way", ""), result["dtype"]

    for key, some in itertools.groupby(sorted(results, key=group), group):
        members = list(some)
        errors = [result["error"] for result in members if "error" in result]
        report.add(
            "check",
            kind=key[0],
            way=key[1],
            dtype=key[2],
            cases=len(members),
            right=sum(result["verdict"] == "ok" for result in members),
            median_error=statistics.median(errors) if errors else math.nan,
            worst_error=max(errors, default=math.nan),
        )
    for result in results:
        report.detail("cases", **result)
        if result["verdict"] != "ok":
            report.fail("check", json.dumps(result))


if __name__ == "__main__":
    main()
