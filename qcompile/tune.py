"""Measures which way and tile is the fastest for the linears of a model on this GPU, and keeps what beats the formulas.

Rows are measured in ranges. What is the fastest for a range's last number of rows meets what would be chosen without
it, at both ends of the range; it is kept if it takes 3 % less time there, and is slower at neither.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from qcompile.config import Config
from qcompile.errors import ConfigError, SpecError, UnsupportedError
from qcompile.kernels import _tables
from qcompile.kernels._tables import Entry
from qcompile.kernels._tuning import Device
from qcompile.kernels._ways import Choice, Product, candidates, product_of
from qcompile.kernels._weight import refuses_weight
from qcompile.plan import Plan, make_plan
from qcompile.quant.spec import QSpec
from qcompile.runtime import runner_of
from qcompile.timing import Bench, Trial
from qcompile.tuned import Linear, Measured, Tuning, linear_of, name

log = logging.getLogger(__name__)

# Formulas change their tiles between these.
LASTS = (1, 2, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 2048)
RANGES = tuple((last + 1, next) for last, next in zip((0, *LASTS), LASTS))
# What a choice has to gain, and may lose at one end.
WORTH = 1.03
NEAR_ENOUGH = 1.03

# The first and last number of rows.
Range = tuple[int, int]


class Measures(Protocol):
    """What tells times, see timing.Bench."""

    def compile(self, trials: Sequence[Trial], tick: Callable[[], object]) -> set[Trial]: ...
    def us(self, product: Product, choice: Choice) -> float: ...
    def agree(self, product: Product, one: Choice, other: Choice) -> bool: ...
    def check(self) -> None: ...
    def release(self) -> None: ...


def tune(
    model: nn.Module | None = None,
    config: Any = None,
    *,
    linears: Iterable[Linear] = (),
    rows: tuple[int, int] = (1, LASTS[-1]),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tuning:
    """Measure the linears of a model on a GPU, and keep what is faster than what formulas choose.

    model       an optimized model; or another one, also on the meta device, and the `config` for optimize()
    linears     (spec, outputs, inputs) of weights, on top of the model's
    rows        the first and last number of rows, as tokens in a batch, that matter
    device      a CUDA device; None for the current one

    It takes some minutes. Choices are kept in the user's cache folder (QCOMPILE_CACHE, else ~/.cache/qcompile), for
    this GPU and these versions, weight by weight; all programs of this user take them from there, this process from now
    on. A weight that there is no memory for is skipped. Results may then differ in the order of sums.

    Raises UnsupportedError where there is no GPU or no folder, ConfigError if there is nothing to measure.
    """
    gpu = find_gpu(device)
    wanted = dict.fromkeys(linears)
    if model is not None:
        runner = runner_of(model)
        plan = make_plan(model, Config.of(config)) if runner is None else runner.plan
        wanted |= dict.fromkeys(linears_of(plan))
    if not wanted:
        raise ConfigError(
            "nothing to tune: no weight is quantized; name a config, or linears=[(spec, outputs, inputs)]"
        )
    ranges = [(first, last) for first, last in RANGES if first <= rows[1] and rows[0] <= last]
    if not ranges:
        raise ConfigError(f"rows={rows}: numbers of rows from 1 to {LASTS[-1]} are measured")
    if _tables.user_path(gpu) is None:
        raise UnsupportedError("QCOMPILE_CACHE is 0: there is no folder to keep what is measured in")
    with closing(Bench(gpu)) as bench:
        return _Tuner(bench, gpu, ranges, progress).tune(list(wanted))


def linears_of(plan: Plan) -> list[Linear]:
    """The weights that a plan's linears multiply by, siblings as one, each once: not embeddings, not experts."""
    found = {}
    for group in plan.groups:
        first = group[0]
        if isinstance(first.spec, QSpec) and first.role != "embedding" and len(first.shape) == 2:
            found[str(first.spec), sum(entry.matrix[0] for entry in group), first.matrix[1]] = None
    return list(found)


def find_gpu(device: torch.device | str | None) -> torch.device:
    """The CUDA device, with its number. Raises UnsupportedError if it is none."""
    wanted = torch.device("cuda" if device is None else device)
    if wanted.type != "cuda" or not torch.cuda.is_available():
        where = f"on {wanted.type}" if wanted.type != "cuda" else "here"
        raise UnsupportedError(
            f"there is nothing to tune {where}: tiles of NVIDIA GPUs are tuned, and no CUDA device was given or found"
        )
    return wanted if wanted.index is not None else torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class _Rivals:
    """What would be chosen for rows `first` to those of the product `last`, and what took the least time for these."""

    first: int
    last: Product
    before: Choice
    best: Choice


class _Tuner:
    def __init__(self, bench: Measures, gpu: torch.device, ranges: Sequence[Range], progress: bool = False):
        self.bench, self.gpu, self.ranges = bench, gpu, ranges
        self.device = Device.of(gpu)
        self.dtype = torch.bfloat16 if self.device.tensor_cores else torch.float16
        self.bar = partial(tqdm, disable=not progress, leave=False)
        self.skipped: list[tuple[str, str]] = []
        self.able: set[Trial] = set()

    def tune(self, linears: Sequence[Linear]) -> Tuning:
        path, rows = _tables.user_path(self.gpu), []
        for linear in linears:
            try:
                measured = self._measure(linear)
            except torch.OutOfMemoryError as error:
                self._skip(name(linear), f"out of GPU memory ({str(error).partition('.')[0]})")
                self.bench.release()
                continue
            # One weight after the other: what was measured before an interruption is there.
            entries = [entry for row in measured if (entry := row.entry) is not None]
            path = _tables.keep(entries, [row.span for row in measured], self.gpu)
            rows += measured
        return Tuning(_tables.gpu(self.gpu), tuple(rows), tuple(self.skipped), str(path))

    def _measure(self, linear: Linear) -> list[Measured]:
        if reason := _refuses(linear):
            self._skip(name(linear), reason)
            return []
        spec, outputs, inputs = linear
        lasts = {first: product_of(spec, last, outputs, inputs, self.dtype) for first, last in self.ranges}
        trials = {first: self._trials(product) for first, product in lasts.items()}
        self._compile(linear, [trial for each in trials.values() for trial in each])
        rivals: list[_Rivals] = []
        with self.bar(total=sum(map(len, trials.values())), desc=f"{name(linear)}: measure") as bar:
            for first, each in trials.items():
                rivals += self._fastest(first, each)
                bar.update(len(each))
        firsts = [self._ends(each)[0] for each in rivals]
        self._compile(linear, [(product, choice) for product, *choices in firsts for choice in choices])
        return [self._meet(each) for each in self.bar(rivals, desc=f"{name(linear)}: compare")]

    def _trials(self, product: Product) -> list[Trial]:
        """What there is to try, what would be chosen first."""
        choices = [_tables.untuned(product, self.gpu), *candidates(product, self.device)]
        return [(product, choice) for choice in dict.fromkeys(choices)]

    def _fastest(self, first: int, trials: Sequence[Trial]) -> list[_Rivals]:
        (product, before), *_ = trials
        times = {choice: self._us(product, choice) for _, choice in trials}
        best = min(times, key=times.__getitem__)
        if times[best] == math.inf:
            self._skip(f"{name(linear_of(product))}, {product.rows} rows", "nothing runs")
            return []
        return [_Rivals(first, product, before, best if times[before] > WORTH * times[best] else before)]

    def _ends(self, rivals: _Rivals) -> list[tuple[Product, Choice, Choice]]:
        """The range's ends with what would be chosen for them, and what is to be instead."""
        last, before, best = rivals.last, rivals.before, rivals.best
        first = last._replace(rows=rivals.first)
        there = _tables.untuned(first, self.gpu)
        entry = Entry.of(last, rivals.first, best, 0, 0)
        return [(first, there, there if best == before else entry.choice(first, self.device)), (last, before, best)]

    def _meet(self, rivals: _Rivals) -> Measured:
        ends = self._ends(rivals)
        times = [self._pair(*end) for end in ends]
        (first_before, first_after), (last_before, last_after) = times
        before, after = (first_before, last_before), (first_after, last_after)
        changed = (
            rivals.best != rivals.before
            and sum(before) > WORTH * sum(after)
            and all(mine <= NEAR_ENOUGH * theirs for theirs, mine in times)
            and all(math.isinf(theirs) or self.bench.agree(*end) for (theirs, _), end in zip(times, ends))
        )
        best = rivals.best if changed else rivals.before
        return Measured(rivals.last, rivals.first, best, before, after if changed else before, changed)

    def _pair(self, product: Product, before: Choice, best: Choice) -> tuple[float, float]:
        if before == best:
            return (us := self._us(product, before)), us
        times = [(self._us(product, before), self._us(product, best)) for _ in range(2)]
        return min(theirs for theirs, _ in times), min(mine for _, mine in times)

    def _us(self, product: Product, choice: Choice) -> float:
        """Infinite for what does not run."""
        if (product, choice) not in self.able:
            return math.inf
        try:
            us = self.bench.us(product, choice)
            log.info("qcompile: %s by %s: %.2f µs", product, choice, us)
            return us
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that does not launch here is not chosen
            log.info("qcompile: %s by %s: %s", product, choice, error)
        try:
            self.bench.check()
        except Exception as error:
            where = f"{name(linear_of(product))}, {product.rows} rows, {choice}"
            raise UnsupportedError(
                f"{where} broke the GPU's context ({error}); what was measured of other weights before is kept"
            ) from error
        return math.inf

    def _compile(self, linear: Linear, trials: Sequence[Trial]) -> None:
        new = [trial for trial in dict.fromkeys(trials) if trial not in self.able]
        with self.bar(total=len(new), desc=f"{name(linear)}: compile") as bar:
            self.able |= self.bench.compile(new, bar.update)

    def _skip(self, what: str, why: str) -> None:
        self.skipped.append((what, why))


def _refuses(linear: Linear) -> str | None:
    """Why no kernel of ours multiplies by such a weight."""
    spec, outputs, inputs = linear
    side = torch.empty(1, dtype=torch.float16, device="meta")
    try:
        QSpec.parse(spec).scale_shape(outputs, inputs)
        return refuses_weight(side, side, spec, inputs)
    except SpecError as error:
        return str(error)
