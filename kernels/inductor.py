"""Ops whose meaning Inductor compiles as well as a kernel of ours would: sums, lookups and steps element by element."""

from __future__ import annotations

import inspect
from typing import Any

from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.codebook import dequantize_codebook
from qcompile.ops.registry import Op


def _sign_up(op: Op) -> None:
    def refuses(*args: Any) -> str | None:
        return None

    # An implementation has the parameters of its op.
    refuses.__signature__ = inspect.signature(op.meaning)  # type: ignore[attr-defined]
    op.implementation("inductor", refuses)(op.meaning)


for each in (round_activation, dequantize_codebook):
    _sign_up(each)
