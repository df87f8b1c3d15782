"""Roles and siblings, off the graph and off module types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.plan import example_inputs
from qcompile.roles import Role, find_roles


def roles_of(model: nn.Module, example: Mapping[str, Any] | None = None) -> tuple[dict[str, Role], str]:
    return find_roles(model, [(tensor, (name,)) for name, tensor in model.named_parameters()], example)


def names(roles: Mapping[str, Role]) -> dict[str, str]:
    return {path.removesuffix(".weight"): role.name for path, role in roles.items()}


def siblings(roles: Mapping[str, Role]) -> list[list[str]]:
    found = defaultdict(list)
    for path, role in roles.items():
        if role.reads is not None:
            found[role.reads].append(path.split(".")[-2])
    return list(found.values())


class Zoo(nn.Module):
    """One parameter of every role that needs no Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.turned = nn.Parameter(torch.randn(64, 64))
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)
        self.tiny = nn.Linear(64, 4)
        self.experts = nn.Parameter(torch.randn(2, 64, 64))
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.norm(x @ self.turned)
        x = x + self.a(x) * self.b(x).mean() + self.tiny(x).sum()
        return self.head(torch.matmul(x, self.experts[0]))


def test_every_role_off_a_graph() -> None:
    roles, source = roles_of(Zoo(), {"tokens": torch.zeros(2, 5, dtype=torch.long)})
    assert source == "graph"
    assert names(roles) == {
        "embed": "embedding", "conv": "conv", "conv.bias": "bias", "norm": "norm", "norm.bias": "norm",
        "turned": "linear", "a": "linear", "a.bias": "bias", "b": "linear", "b.bias": "bias", "tiny": "tiny",
        "tiny.bias": "bias", "experts": "experts", "head": "lm_head",
    }  # fmt: skip
    assert [path for path, role in roles.items() if role.transposed] == ["turned"]


def test_siblings_read_one_value() -> None:
    roles, _ = roles_of(Zoo(), {"tokens": torch.zeros(2, 5, dtype=torch.long)})
    assert roles["a.weight"].reads == roles["b.weight"].reads
    assert roles["turned"].reads != roles["a.weight"].reads
    assert roles["head.weight"].reads is roles["tiny.weight"].reads is None


def test_a_transformers_model(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama(num_hidden_layers=1)
    roles, _ = roles_of(model, example_inputs(model))
    assert siblings(roles) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_router_and_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=4))
    roles, _ = roles_of(model, example_inputs(model))
    assert roles["model.layers.0.mlp.gate.weight"].name == "router"
    assert [role.name for role in roles.values()].count("experts") == 2


class TestByModuleType:
    def test_without_example_inputs(self) -> None:
        roles, source = roles_of(Zoo())
        assert source == "module types: pass example inputs to find sibling layers"
        found = names(roles)
        assert {name: found[name] for name in ("embed", "conv", "norm", "a", "a.bias", "tiny", "experts")} == {
            "embed": "embedding", "conv": "conv", "norm": "norm", "a": "linear", "a.bias": "norm", "tiny": "tiny",
            "experts": "experts",
        }  # fmt: skip
        assert not siblings(roles)

    def test_where_no_graph_can_be_captured(self) -> None:
        class Twisted(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() > 0 else x

        roles, source = roles_of(nn.Sequential(Twisted(64, 64)), {"input": torch.randn(2, 64)})
        assert roles["0.weight"].name == "linear"
        assert source.startswith("module types: Sequential.forward could not be captured: ")

    def test_the_output_embedding(self, tiny_llama: Callable[..., nn.Module]) -> None:
        roles, _ = roles_of(tiny_llama())
        assert roles["lm_head.weight"].name == "lm_head"
        assert roles["model.layers.0.self_attn.q_proj.weight"].name == "linear"
