"""Patterns match whole components of module names."""

from __future__ import annotations

import pytest

from qcompile import patterns

Q0, K1 = "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.k_proj"


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head2", False),
        ("q_proj", Q0, True),
        ("self_attn.q_proj", Q0, True),
        ("attn.q_proj", Q0, False),
        ("layers.0", Q0, True),
        ("layers.1", K1, False),
        ("layers.1*", K1, True),
        ("layers.[0-9]", K1, False),
        ("layers.??", K1, True),
        ("model", Q0, True),
        (Q0, Q0, True),
        ("layers.*.self_attn", Q0, True),
        ("*.q_proj", Q0, True),
        ("*_proj", Q0, True),
        ("*", Q0, True),
        ("vision.*", "model.vision.blocks.1.fc", True),
        ("vision.*", "vision", False),
        ("Q_PROJ", Q0, False),
        ("tag:self_attn.q_proj", Q0, True),
        ("tag:q_proj", Q0, False),
        ("tag:lm_head", "model.lm_head", True),
        ("tag:self_attn", Q0, False),
    ],
)
def test_matches(pattern: str, module: str, matches: bool) -> None:
    assert patterns.matches(pattern, module) == matches


def test_first() -> None:
    assert patterns.first(["k_proj", "layers.0", "q_proj"], Q0) == "layers.0"
    assert patterns.first(["k_proj"], Q0) is None


@pytest.mark.parametrize(
    ("pattern", "in_full"),
    [(Q0, True), ("self_attn.q_proj", True), ("tag:self_attn.q_proj", True), ("self_attn", False), ("*", False)],
)
def test_names_in_full(pattern: str, in_full: bool) -> None:
    assert patterns.names_in_full(pattern, Q0) == in_full
