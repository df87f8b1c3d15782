"""The plan: roles and siblings without name lists, reasons, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import ConfigError
from qcompile.plan import Plan


def by_path(plan: Plan) -> dict[str, tuple[str, str]]:
    return {entry.path: (entry.role, str(entry.spec) if entry.spec else entry.reason) for entry in plan.entries}


def test_roles_and_siblings(tiny_llama: Callable[..., nn.Module]) -> None:
    plan = qcompile.plan(tiny_llama(), "u4/g32/asym")
    rows = by_path(plan)
    assert plan.source == "graph"
    assert rows["model.embed_tokens.weight"] == ("embedding", "kept: embedding")
    assert rows["lm_head.weight"] == ("lm_head", "kept: lm_head")
    assert rows["model.norm.weight"] == ("norm", "kept: norm")
    assert rows["model.layers.0.mlp.down_proj.weight"] == ("linear", "u4/g32/asym")
    first = [[entry.module.rpartition(".")[2] for entry in group] for group in plan.groups][:4]
    assert first == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_bytes_are_those_that_are_stored(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    plan = qcompile.plan(model, "u3/g32/asym")
    assert plan.before == sum(p.nbytes for p in model.parameters())
    qcompile.optimize(model, "u3/g32/asym", progress=False)
    persistent = model.state_dict().values()
    assert plan.after == sum(tensor.nbytes for tensor in persistent)


def test_on_the_meta_device_nothing_is_computed(tiny_llama: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert by_path(qcompile.plan(model, "u4/g32/asym")) == by_path(qcompile.plan(tiny_llama(), "u4/g32/asym"))


def test_tied_embedding_is_one_entry(tiny_llama: Callable[..., nn.Module]) -> None:
    plan = qcompile.plan(tiny_llama(tie_word_embeddings=True), "u4/g32/asym")
    (entry,) = [entry for entry in plan.entries if entry.aliases]
    assert (entry.path, entry.aliases, entry.role) == ("model.embed_tokens.weight", ("lm_head.weight",), "embedding")


def test_experts_stay_dense_against_anyones_wish() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=4))
    plan = qcompile.plan(model, "u4/g32/asym")
    experts = [entry for entry in plan.entries if entry.role == "experts"]
    assert len(experts) == 2
    assert all(entry.reason == "a parameter of role experts has no quantized form" for entry in experts)
    assert set(experts) <= set(plan.unexpected)


def test_group_size_that_does_not_divide_is_a_reason() -> None:
    model = nn.Sequential(nn.Linear(85, 33), nn.Linear(33, 64))
    (first, *_) = qcompile.plan(model, "u4/g64/asym").entries
    assert first.spec is None and not first.decided
    assert "group size 64 does not divide a weight of (33, 85)" in first.reason


def test_with_example_inputs_any_module_has_siblings() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x)], -1)

    plan = qcompile.plan(Two(), "u4/g64/asym", example={"x": torch.randn(2, 64)})
    assert [len(group) for group in plan.groups] == [2]


def test_pattern_that_matches_nothing(tiny_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="no module matches 'q_porj'"):
        qcompile.plan(tiny_llama(), "u4/g32/asym", exclude=["q_porj"])


def test_per_pattern_specs_split_siblings(tiny_llama: Callable[..., nn.Module]) -> None:
    plan = qcompile.plan(tiny_llama(), "u4/g32/asym", specs={"v_proj": "u8/g32/asym"})
    assert [entry.module.rpartition(".")[2] for entry in plan.groups[0]] == ["q_proj", "k_proj"]


def test_planning_changes_nothing(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    state = copy.deepcopy(model.state_dict())
    qcompile.plan(model, "u4/g32/asym")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
