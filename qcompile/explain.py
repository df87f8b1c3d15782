"""What became of a model, as data and as text. Made at planning and in the passes, so a warm start shows the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from qcompile.pipeline import Outcome
from qcompile.plan import Plan


@dataclass(frozen=True)
class Report:
    """Everything there is to know about an optimized model. `str()` is the text, `to_dict()` the data.

    `numerics` is {"sqnr_db": {parameter: dB}, "kl": mean KL divergence of the logits in nats} where a reference was
    given, else None. `eager` counts the calls that ran uncompiled, by reason; `recalled` programs were on disk, and
    `unkept` says why none are kept there, should the model be the reason.
    `kv_cache` says what generate() caches keys and values as, if not as they are.
    `tuning` says where the tiles of linears on a GPU come from, and who uses a CPU's matrix instructions.
    """

    model: str
    config: Mapping[str, Any]
    device: str
    plan: Plan
    outcomes: tuple[Outcome, ...]
    eager: Mapping[str, int]
    numerics: Mapping[str, Any] | None = None
    recalled: int = 0
    kv_cache: str | None = None
    tuning: str | None = None
    unkept: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "config": dict(self.config),
            "device": self.device,
            "plan": self.plan.to_dict(),
            "programs": [
                {
                    "call": outcome.inputs,
                    "passes": [
                        {
                            "name": result.name,
                            "nodes": [result.nodes_before, result.nodes_after],
                            "rewrites": [site.module for site in result.rewrites],
                            "misses": [
                                {"reason": reason, "node": site.node, "module": site.module}
                                for reason, site in result.misses
                            ],
                        }
                        for result in outcome.passes
                    ],
                    "ops": [
                        {
                            "op": low.op,
                            "implementation": low.implementation,
                            "detail": low.detail,
                            "module": low.site.module,
                            "refusals": dict(low.refusals),
                        }
                        for low in outcome.lowered
                    ],
                }
                for outcome in self.outcomes
            ],
            # A forward is captured whole or not at all: what would break a graph is a call that ran uncompiled.
            "eager": dict(self.eager),
            "programs_from_disk": self.recalled,
            "not_on_disk": self.unkept,
            "kv_cache": self.kv_cache,
            "tuning": self.tuning,
            "numerics": None if self.numerics is None else dict(self.numerics),
        }

    def __str__(self) -> str:
        parts = [self._head(), parameters_text(self.plan, self._sqnr())]
        for outcome in self.outcomes:
            parts += [f"program     {outcome.inputs}", _passes(outcome), _misses(outcome)]
            parts += [_kernels(outcome)]
        if self.tuning is not None:
            parts.append(f"tiles       {self.tuning}")
        if self.recalled:
            parts.append(f"cache       {self.recalled} of {len(self.outcomes)} programs were on disk")
        if self.unkept:
            parts.append(f"cache       programs are not kept on disk: {self.unkept}")
        if self.eager:
            parts.append(tabulate(self.eager.items(), headers=["calls that ran uncompiled", "times"]))
        if self.numerics is not None:
            kl = self.numerics.get("kl")
            parts.append(
                "numerics    " + (f"KL of the logits {kl:.3g} nats" if kl is not None else "no logits compared")
            )
        return "\n\n".join(part for part in parts if part)

    def _head(self) -> str:
        plan = self.plan
        quantized = [entry for entry in plan.entries if entry.spec]
        specs = ", ".join(dict.fromkeys(str(entry.spec) for entry in quantized)) or "no quantization"
        return (
            f"qcompile report   {self.model}   {specs}   on {self.device}\n"
            f"weights     {len(quantized)} of {len(plan.entries)} parameters quantized; "
            f"{size(plan.before)} -> {size(plan.after)}; roles from {plan.source}"
            + (f"\nkv cache    keys and values as {self.kv_cache}" if self.kv_cache else "")
        )

    def _sqnr(self) -> Mapping[str, float]:
        return {} if self.numerics is None else self.numerics["sqnr_db"]


def parameters_text(plan: Plan, sqnr: Mapping[str, float] | None = None) -> str:
    """The table of parameters. Repeated layers that share everything are one line with a count."""
    rows: Counter[tuple[str, ...]] = Counter()
    noise: dict[tuple[str, ...], list[float]] = {}
    for entry in plan.entries:
        spec = str(entry.spec) if entry.spec else f"{str(entry.dtype).removeprefix('torch.')}: {entry.reason}"
        side = "" if entry.group is None else _siblings(plan, entry.group)
        key = (without_numbers(entry.path), "x".join(map(str, entry.shape)), entry.role, spec, side, size(entry.after))
        rows[key] += 1
        if sqnr and entry.path in sqnr:
            noise.setdefault(key, []).append(sqnr[entry.path])
    headers = ["parameter", "shape", "role", "spec, or why it stays dense", "stored with", "bytes", "times"]
    table = [[*key, times] for key, times in rows.items()]
    if sqnr:
        headers.append("least SQNR dB")
        for line, key in zip(table, rows, strict=True):
            line.append(f"{min(noise[key]):.1f}" if key in noise else "")
    return tabulate(table, headers=headers, disable_numparse=True)


def size(count: float) -> str:
    """Bytes for people: 12.9 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _siblings(plan: Plan, group: int) -> str:
    return "+".join(entry.module.rpartition(".")[2] for entry in plan.entries if entry.group == group)


def _passes(outcome: Outcome) -> str:
    rows = [
        [result.name, len(result.rewrites), len(result.misses), f"{result.nodes_before} -> {result.nodes_after}"]
        for result in outcome.passes
    ]
    return tabulate(rows, headers=["pass", "rewrites", "misses", "nodes"])


def _misses(outcome: Outcome) -> str:
    rows = []
    for result in outcome.passes:
        first: dict[str, str] = {}
        for reason, site in result.misses:
            first.setdefault(reason, f"{site.module} ({site.node})")
        times = Counter(reason for reason, _ in result.misses)
        rows += [[result.name, reason, times[reason], first[reason]] for reason in first]
    return tabulate(rows, headers=["missed by", "reason", "times", "first at"]) if rows else ""


def _kernels(outcome: Outcome) -> str:
    times = Counter((low.op, low.detail, low.implementation, _refusals(low.refusals)) for low in outcome.lowered)
    rows = [[op, detail, name, count, why] for (op, detail, name, why), count in times.items()]
    return tabulate(rows, headers=["op", "spec", "implementation", "times", "refused"]) if rows else ""


def _refusals(refusals: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refusals)


def without_numbers(path: str) -> str:
    """The path with a * for each layer's number."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
