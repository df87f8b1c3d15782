"""Half-quadratic quantization (HQQ): moves the zero points so that outliers weigh less. Needs no calibration data.

The grid and the stopping rule are those of `hqq.core.quantize.Quantizer`, and the step is hqq's own function, so a
float32 weight becomes what hqq makes of it with `torch.set_num_threads(1)`, bit for bit. Weights of 16-bit dtypes are
rounded once more, against their scales and zero points as stored.

The step runs on slices of groups that stay in a core's cache: on one core of an EPYC 0.2 s instead of 0.65 s for a
(1536, 576) and a (576, 1536) weight. Every torch call sees one thread, because the solver stops on a mean whose last
bits depend on the number of threads; the cores work on different slices, so the result is the same on any number of
them. (4096, 4096) takes 5.7 s on one of 16 cores, 1.2 s on 8 of them and 0.03 s on an H100.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from qcompile.algorithms.weight import encode, matrix, read, storable
from qcompile.errors import SpecError, UnsupportedError
from qcompile.quant.granularity import PerTensor
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Quantizer's constants, and the defaults of its solver.
SMALLEST_RANGE, LARGEST_STEPS = 1e-4, 2e4
BETA, NORM, ITERATIONS = 1e1, 0.7, 20

# Elements of a slice. Several threads want longer calls, because between the calls they wait for Python's lock.
SLICE_ALONE, SLICE_SHARED, SLICE_GPU = 2**16, 2**18, 2**24


def refuses(spec: QSpec) -> str | None:
    """Why HQQ cannot make this spec, or None."""
    if spec.zero is not Zero.FLOAT:
        return f"HQQ has float zero points (asym), not {spec.zero.value}"
    if spec.element.bits == 7:
        return "HQQ knows 1 to 6 and 8 bits, not 7"
    return next((reason for side in (spec.scale_spec, spec.zero_spec) if side and (reason := refuses(side))), None)


@torch.inference_mode(mode=False)
def quantize(weight: Tensor, spec: QSpec) -> QTensor:
    """`weight` (…, columns) in codes of `spec`; SpecError if HQQ has no such spec."""
    if reason := refuses(spec):
        raise SpecError(f"{spec}: {reason}; the algorithm rtn takes it")
    values, dtype = matrix(weight)
    return _quantize(values, spec, dtype, tuple(weight.shape), optimize=True)


def _quantize(values: Tensor, spec: QSpec, dtype: torch.dtype, shape: tuple[int, ...], optimize: bool) -> QTensor:
    groups = spec.scale_shape(*values.shape)
    view, axis = spec.granularity.fold(values)
    top = spec.element.levels - 1
    low, high = view.amin(axis, keepdim=True), view.amax(axis, keepdim=True)
    steps = top / (high - low)  # per unit: the inverse of the scale
    steps = steps.where((high - low).abs() > SMALLEST_RANGE, 1.0).clamp(max=LARGEST_STEPS)
    zero = -low * steps
    if optimize and spec.element.bits == 4:
        zero = zero.round()
    if optimize and not isinstance(spec.granularity, PerTensor):
        zero = _solve(view, steps, zero, top, axis)
    codes = (view * steps + zero).round_().clamp_(0, top).to(torch.uint8).reshape(values.shape)
    scale, zero = storable((1.0 / steps).reshape(groups), zero.reshape(groups), dtype)
    scale, zero = _side(scale, spec.scale_spec, dtype), _side(zero, spec.zero_spec, dtype)
    if dtype != torch.float32:
        codes = encode(values, spec, read(scale), read(zero))
    return QTensor.from_codes(spec, codes.reshape(shape), scale, zero)


def _side(values: Tensor, spec: QSpec | None, dtype: torch.dtype) -> Tensor | QTensor:
    return _quantize(values, spec, dtype, tuple(values.shape), optimize=False) if spec else values.to(dtype)


def _solve(weight: Tensor, steps: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """The zero points after hqq's iterations, which end when the mean error no longer falls."""
    step = _step()
    zero, error, best = zero.clone(), torch.empty_like(weight), torch.inf

    with _one_torch_thread() as cores:
        workers = min(cores // 2, 8) if weight.device.type == "cpu" else 1
        elements = SLICE_GPU if weight.device.type != "cpu" else SLICE_SHARED if workers > 1 else SLICE_ALONE
        size, groups = max(64, elements // weight.shape[axis] // 64 * 64), weight.shape[1 - axis]
        if weight.numel() % 64:
            size = groups  # vector loops would end elsewhere than in hqq, and round differently there

        def advance(start: int) -> None:
            w, s, z, e = (t.narrow(1 - axis, start, min(size, groups - start)) for t in (weight, steps, zero, error))
            approximation, _, moved, _ = step(w, s, z, [0, top], BETA, NORM, axis)
            torch.sub(w, approximation, out=e).abs_()
            z.copy_(moved)

        starts = range(0, groups, size)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            run = pool.map if workers > 1 and len(starts) > 1 else map
            for _ in range(ITERATIONS):
                for _ in run(advance, starts):
                    pass
                mean = error.mean().item()
                if not mean < best:
                    break
                best = mean
    return zero


def _step() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    try:
        from hqq.core.optimize import optimize_weights_proximal_legacy_step
    except ImportError as error:
        hint = "install hqq 0.2.8 or later, or choose the algorithm rtn"
        raise UnsupportedError(f"the algorithm hqq takes its solver from the package hqq ({error}); {hint}") from error
    return optimize_weights_proximal_legacy_step


_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def _one_torch_thread() -> Iterator[int]:
    """Torch calls run on one thread each; yields how many there were. Threads started inside inherit it."""
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)
