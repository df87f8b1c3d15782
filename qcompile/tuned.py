"""What was measured of the linears of a model: the times before and after, as data and as a table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

from qcompile.kernels import _tables
from qcompile.kernels._packed_cpu import matrix_instructions
from qcompile.kernels._tables import Entry
from qcompile.kernels._ways import Choice, Product
from qcompile.quant.spec import QSpec

# A weight: (spec, outputs, inputs).
Linear = tuple[str, int, int]


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
            where = f"{a.last.rows} to {b.first} rows of {name(linear_of(a.last))}"
            lines.append(f"the largest step between neighbours: {step:.2f} times, from {where}")
        return "\n".join(lines)


def _line(row: Measured) -> list[str]:
    spec, outputs, inputs, first, last = row.span
    before, after = ([f"{us:.1f}" for us in times[first == last :]] for times in (row.before, row.after))
    gain = f"{sum(row.before) / sum(row.after):.2f}" if row.changed else ""
    way, tile = row.choice
    sizes = ", ".join(f"{key} {count}" for key, count in vars(tile).items()) if row.changed else ""
    rows = f"{first}-{last}" if first < last else str(last)
    return [spec, f"{outputs}x{inputs}", rows, ", ".join(before), ", ".join(after), gain, f"{way} {sizes}".strip()]


def account(device: torch.device, linears: Collection[Linear] | None = None) -> str | None:
    """How many measured choices there are for these linears, or for any, and where; on a CPU, who uses its matrix
    instructions. None where there is nothing to say."""
    if device.type == "cpu":
        spec = next(iter(linears or ()), ("u4/g64/asym",))[0]
        return matrix_instructions(QSpec.parse(spec).element)
    if device.type != "cuda":
        return None
    parts = []
    for table in _tables.tables(device):
        count = sum(linears is None or (one.spec, one.outputs, one.inputs) in linears for one in table.entries)
        parts += [f"{count} {'shipped' if table.path.parent == _tables.SHIPPED else f'in {table.path}'}"] * (count > 0)
    return f"measured choices: {', '.join(parts)}" if parts else "by formula; `qcompile tune` measures"


def linear_of(product: Product) -> Linear:
    return product.spec, product.outputs, product.inputs


def name(linear: Linear) -> str:
    spec, outputs, inputs = linear
    return f"{spec} {outputs}x{inputs}"
