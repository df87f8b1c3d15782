"""Measures which way and tile is the fastest for the linears of a model on this GPU, and keeps what beats the formulas.

Rows are measured in ranges. What is the fastest for a range's last number of rows meets what would be chosen without
it, at both ends of the range; it is kept if it takes 3 % less time there, and is slower at neither.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from tabulate import tabulate
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

log = logging.getLogger(__name__)

# Formulas change their tiles between these.
LASTS = (1, 2, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 2048)
RANGES = tuple((last + 1, next) for last, next in zip((0, *LASTS), LASTS))
# What a choice has to gain, and may lose at one end.
WORTH = 1.03
NEAR_ENOUGH = 1.03

# A weight: (spec, outputs, inputs).
Linear = tuple[str, int, int]
# The first and last number of rows.
Range = tuple[int, int]


@dataclass(frozen=True)
class Measured:
    """Rows `first` to those of the product `last`: µs for both, before and after; and the choice, `changed` if new."""

    last: Product
    first: int
    choice: Choice
    before: tuple[float, float]
    after: tuple[float, float]
    changed: bool

    @property
    def span(self) -> _tables.Span:
        return self.last.spec, self.last.outputs, self.last.inputs, self.first, self.last.rows

    @property
    def entry(self) -> Entry | None:
        if not self.changed:
            return None
        return Entry.of(self.last, self.first, self.choice, us=self.after[1], before=self.before[1])

    def to_dict(self) -> dict[str, Any]:
        spec, outputs, inputs, first, last = self.span
        way, tile = self.choice
        return {
            **{"spec": spec, "outputs": outputs, "inputs": inputs, "rows": [first, last], "way": way},
            **{"tile": vars(tile), "before_us": self.before, "after_us": self.after, "changed": self.changed},
        }


@dataclass(frozen=True)
class Tuning:
    """What was measured on a GPU, which linears were skipped and why, and where the choices lie."""

    gpu: str
    rows: tuple[Measured, ...]
    skipped: tuple[tuple[str, str], ...]
    path: str

    @property
    def changed(self) -> list[Measured]:
        return [row for row in self.rows if row.changed]

    @property
    def steps(self) -> list[tuple[float, Measured, Measured]]:
        """By how much one row more takes longer where one range meets the next, the largest first."""
        pairs = [(a, b) for a, b in zip(self.rows, self.rows[1:]) if (*a.span[:3], a.last.rows + 1) == b.span[:4]]
        return sorted(((b.after[0] / a.after[1], a, b) for a, b in pairs), key=lambda step: -step[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {"gpu": self.gpu, "path": self.path, "skipped": dict(self.skipped), "rows": rows}

    def __str__(self) -> str:
        headers = ["spec", "shape", "rows", "before µs", "after µs", "gain", "way"]
        table = tabulate(list(map(_line, self.rows)), headers=headers, disable_numparse=True)
        lines = [table, "", *(f"{linear}: skipped: {reason}" for linear, reason in self.skipped)]
        changed = sum(row.changed for row in self.rows)
        lines.append(f"{changed} of {len(self.rows)} choices changed on {self.gpu}; kept in {self.path}")
        if self.steps:
            step, a, b = self.steps[0]
            where = f"{a.last.rows} to {b.first} rows of {_name(_linear(a.last))}"
            lines.append(f"the largest step between neighbours: {step:.2f} times, from {where}")
        return "\n".join(lines)


def _line(row: Measured) -> list[str]:
    spec, outputs, inputs, first, last = row.span
    before, after = ([f"{us:.1f}" for us in times[first == last :]] for times in (row.before, row.after))
    gain = f"{sum(row.before) / sum(row.after):.2f}" if row.changed else ""
    way, tile = row.choice
    sizes = ", ".join(f"{name} {count}" for name, count in vars(tile).items()) if row.changed else ""
    rows = f"{first}-{last}" if first < last else str(last)
    return [spec, f"{outputs}x{inputs}", rows, ", ".join(before), ", ".join(after), gain, f"{way} {sizes}".strip()]


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
    return _Tuner(Bench(gpu), gpu, ranges, progress).tune(list(wanted))


def linears_of(plan: Plan) -> list[Linear]:
    """The weights that a plan's linears multiply by, siblings as one, each once."""
    found = {}
    for group in plan.groups:
        first = group[0]
        if isinstance(first.spec, QSpec) and first.role != "embedding":
            found[str(first.spec), sum(entry.matrix[0] for entry in group), first.matrix[1]] = None
    return list(found)


def account(device: torch.device, linears: Collection[Linear] | None = None) -> str | None:
    """How many measured choices there are for these linears, or for any, and where; None where nothing can be tuned."""
    if device.type != "cuda":
        return None
    parts = []
    for table in _tables.tables(device):
        count = sum(linears is None or (one.spec, one.outputs, one.inputs) in linears for one in table.entries)
        parts += [f"{count} {'shipped' if table.path.parent == _tables.SHIPPED else f'in {table.path}'}"] * (count > 0)
    return f"measured choices: {', '.join(parts)}" if parts else "by formula; `qcompile tune` measures"


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
        rivals = self._rivals(linears)
        self._compile([trial for each in rivals for end in self._ends(each)[:1] for trial in _trials(*end)])
        path, rows = _tables.user_path(self.gpu), []
        with self.bar(total=len(rivals), desc="compare") as bar:
            for linear in linears:
                measured = []
                with self._skipping(linear):
                    for each in rivals:
                        if _linear(each.last) == linear:
                            measured.append(self._meet(each))
                            bar.update()
                # One weight after the other: what was measured before an interruption is there.
                entries = [entry for row in measured if (entry := row.entry) is not None]
                path = _tables.keep(entries, [row.span for row in measured], self.gpu)
                rows += measured
        return Tuning(_tables.gpu(self.gpu), tuple(rows), tuple(self.skipped), str(path))

    def _rivals(self, linears: Sequence[Linear]) -> list[_Rivals]:
        trials: dict[tuple[Linear, Range], list[Trial]] = {}
        for linear in linears:
            if reason := _refuses(linear):
                self.skipped.append((_name(linear), reason))
                continue
            for span in self.ranges:
                product = product_of(linear[0], span[1], *linear[1:], self.dtype)
                choices = [_tables.untuned(product, self.gpu), *candidates(product, self.device)]
                trials[linear, span] = [(product, choice) for choice in dict.fromkeys(choices)]
        self._compile([trial for each in trials.values() for trial in each])
        found: list[_Rivals] = []
        with self.bar(total=sum(map(len, trials.values())), desc="measure") as bar:
            for linear in linears:
                of_linear = []
                with self._skipping(linear):
                    for (of, (first, _)), each in trials.items():
                        if of == linear:
                            of_linear += self._fastest(first, each)
                            bar.update(len(each))
                    found += of_linear
        return found

    def _fastest(self, first: int, trials: Sequence[Trial]) -> list[_Rivals]:
        (product, before), *_ = trials
        times = {choice: self._us(product, choice) for _, choice in trials}
        best = min(times, key=times.__getitem__)
        if times[best] == math.inf:
            self.skipped.append((f"{_name(_linear(product))}, {product.rows} rows", "nothing runs"))
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
            where = f"{_name(_linear(product))}, {product.rows} rows, {choice}"
            raise UnsupportedError(
                f"{where} broke the GPU's context ({error}); what was measured of other weights before is kept"
            ) from error
        return math.inf

    def _compile(self, trials: Sequence[Trial]) -> None:
        new = [trial for trial in dict.fromkeys(trials) if trial not in self.able]
        with self.bar(total=len(new), desc="compile") as bar:
            self.able |= self.bench.compile(new, bar.update)

    @contextmanager
    def _skipping(self, linear: Linear) -> Iterator[None]:
        """Go on with the next weight where there is no memory for this one."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.skipped.append((_name(linear), f"out of GPU memory ({str(error).partition('.')[0]})"))
            self.bench.release()


def _refuses(linear: Linear) -> str | None:
    """Why no kernel of ours multiplies by such a weight."""
    spec, outputs, inputs = linear
    side = torch.empty(1, dtype=torch.float16, device="meta")
    try:
        QSpec.parse(spec).scale_shape(outputs, inputs)
        return refuses_weight(side, side, spec, inputs)
    except SpecError as error:
        return str(error)


def _trials(product: Product, *choices: Choice) -> list[Trial]:
    return [(product, choice) for choice in choices]


def _linear(product: Product) -> Linear:
    return product.spec, product.outputs, product.inputs


def _name(linear: Linear) -> str:
    spec, outputs, inputs = linear
    return f"{spec} {outputs}x{inputs}"
