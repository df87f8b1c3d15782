"""What the checks and the times of GPU kernels share: random weights, cases in parallel processes, and a report."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.record import device_slug, record
from qcompile import doctor
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
START = time.time()
GRACE = 45  # seconds past the deadline that a case may take to finish

Row = dict[str, Any]


def log(*words: Any) -> None:
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


def random_weight(spec: str, n: int, k: int, side: torch.dtype) -> QTensor:
    """A weight (n, k) of random codes, without those that are inf or NaN; scales, and zero points that are floats, are
    of dtype `side`. A row times k standard normal numbers is about 1."""
    parsed = QSpec.parse(spec)
    groups, levels = parsed.scale_shape(n, k), parsed.element.levels
    numbers = parsed.element.decode(torch.arange(levels, dtype=torch.uint8, device=DEVICE), torch.float32)
    finite = numbers.isfinite()
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8, device=DEVICE)
    if not finite.all():
        codes = codes.masked_fill(~finite[codes.int()], 1)
    size = 1 / (numbers[finite].square().mean().sqrt() * k**0.5)
    scale = ((torch.rand(groups, device=DEVICE) + 0.25) * size).to(side)
    zero = None
    if parsed.zero is Zero.FLOAT:
        zero = (torch.rand(groups, device=DEVICE) * levels).to(side)
    elif parsed.zero is Zero.INT:
        zero = torch.randint(0, levels, groups, dtype=torch.uint8, device=DEVICE)
    elif parsed.zero is Zero.SHIFT:
        zero = (torch.randn(groups, device=DEVICE) / k**0.5).to(side)
    return QTensor.from_codes(parsed, codes, scale, zero)


def in_parallel(
    work: Callable[[Row], Row], cases: Sequence[Row], folder: Path, seconds: float
) -> tuple[list[Row], list[str]]:
    """`work(case)` for as many cases as are begun in the time; and what became of processes that did not end well.

    `work` is a function of a module. Results lie in `folder` as soon as they are there, one file a process.
    """
    count = max(1, min(14, (os.cpu_count() or 2) - 2))
    files = [folder / f"{work.__name__}-{index}.jsonl" for index in range(count)]
    deadline = time.time() + seconds
    context = multiprocessing.get_context("spawn")  # a forked process has no CUDA
    processes = []
    for index, file in enumerate(files):
        file.write_text("")
        processes.append(context.Process(target=_work, args=(work, cases[index::count], file, deadline)))
        processes[-1].start()
    troubles = []
    for file, process in zip(files, processes):
        process.join(max(1.0, deadline + GRACE - time.time()))
        if process.is_alive():
            process.kill()
            process.join()
            troubles.append(f"the process of {file.name} hung")
        elif process.exitcode:
            troubles.append(f"the process of {file.name} ended with {process.exitcode}")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()], troubles


def _work(work: Callable[[Row], Row], cases: Sequence[Row], file: Path, deadline: float) -> None:
    for case in cases:
        if time.time() > deadline:
            return
        result = work(case)
        with file.open("a") as out:
            out.write(json.dumps(result) + "\n")


class Report:
    """Notes, a table for each part, and failures, as <name>.json and <name>.md in a folder.

    Written every few seconds, so that a run that is cut off leaves what it had. `details` are rows that only the JSON
    has.
    """

    def __init__(self, folder: Path, name: str, title: str) -> None:
        self.folder, self.name, self.title = folder, name, title
        self.notes: list[str] = []
        self.rows: dict[str, list[Row]] = {}
        self.details: dict[str, list[Row]] = {}
        self.failures: list[str] = []
        self.written = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **row: Any) -> None:
        self.rows.setdefault(part, []).append(row)
        if time.time() - self.written > 5:
            self.write()

    def detail(self, part: str, **row: Any) -> None:
        self.details.setdefault(part, []).append(row)

    def fail(self, part: str, why: str) -> None:
        self.failures.append(f"{part}: {why}")
        log("FAILED", part, why)

    def write(self) -> None:
        self.written = time.time()
        versions = doctor.versions()
        where = f"{doctor.describe_device(DEVICE)}; torch {versions['torch']}, triton {versions['triton']}"
        everything = {
            "where": where,
            "notes": self.notes,
            "failures": self.failures,
            "rows": self.rows,
            "details": self.details,
        }
        (self.folder / f"{self.name}.json").write_text(json.dumps(everything, indent=1))
        (self.folder / f"{self.name}.md").write_text(f"# {self.title}\n\n{where}\n\n{self.body()}\n")

    def record(self, prefix: str) -> None:
        """Write benchmarks/results/<prefix>-<device>.md."""
        log(record(f"{prefix}-{device_slug(DEVICE)}", self.title, self.body(), DEVICE))

    def body(self) -> str:
        sections = list(self.notes)
        for part, rows in self.rows.items():
            shown = [{key: _show(value) for key, value in row.items()} for row in rows]
            sections += [f"## {part}", tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)]
        if self.failures:
            sections += ["## failures", "\n".join(f"- {failure}" for failure in self.failures)]
        return "\n\n".join(sections)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.05 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)
