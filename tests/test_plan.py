"""The plan: roles and siblings without name lists, reasons, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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


class TestStatedByHand:
    """modules_to_fuse."""

    names = {"attention": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down"]}

    class Layer(nn.Module):
        def __init__(self, q: int = 64) -> None:
            super().__init__()
            self.attn, self.mlp = nn.ModuleDict(), nn.ModuleDict()
            for name in ("q", "k", "v", "o"):
                self.attn[name] = nn.Linear(q if name == "q" else 64, 64)
            for name in ("gate", "up", "down"):
                self.mlp[name] = nn.Linear(64, 64)

    def groups(self, *layers: nn.Module, **options: Any) -> list[list[str]]:
        plan = qcompile.plan(nn.Sequential(*layers), "u4/g32/asym", modules_to_fuse=self.names, **options)
        return [[entry.module for entry in group] for group in plan.groups if len(group) > 1]

    def test_siblings_without_a_graph(self) -> None:
        layers = [self.Layer(), self.Layer()]
        want = [[f"{i}.attn.q", f"{i}.attn.k", f"{i}.attn.v"] for i in (0, 1)]
        want += [[f"{i}.mlp.gate", f"{i}.mlp.up"] for i in (0, 1)]
        assert sorted(self.groups(*layers)) == sorted(want)
        plan = qcompile.plan(layers[0], "u4/g32/asym", modules_to_fuse=self.names)
        assert plan.source == "module types and modules_to_fuse: pass example inputs to find sibling layers"

    def test_siblings_have_to_agree(self) -> None:
        assert self.groups(self.Layer(q=128)) == [["0.attn.k", "0.attn.v"], ["0.mlp.gate", "0.mlp.up"]]
        layer = self.Layer()
        layer.attn["v"] = nn.Linear(64, 64, bias=False)
        assert self.groups(layer)[0] == ["0.attn.q", "0.attn.k"]
        layer.attn["k"].half()
        layer.mlp["up"].to("meta")
        assert self.groups(layer) == []
        mixed = self.groups(self.Layer(), specs={"attn.q": "u8/g32/asym", "gate": None})
        assert mixed == [["0.attn.k", "0.attn.v"]]

    def test_a_graph_knows_better(self) -> None:
        class Crossed(self.Layer):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                attn = self.attn
                return attn["o"](attn["q"](x) + attn["k"](y) + attn["v"](y))

        options = {"modules_to_fuse": {"attention": self.names["attention"]}}
        example = {"x": torch.randn(2, 64), "y": torch.randn(2, 64)}
        plan = qcompile.plan(Crossed(), "u4/g32/asym", example=example, **options)
        assert [[e.module for e in group] for group in plan.groups if len(group) > 1] == [["attn.k", "attn.v"]]

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"hidden_size": 128}, r"hidden_size is 128, but model\.layers\.0\.self_attn\.q_proj reads 64 features"),
            ({"num_attention_heads": 8, "num_key_value_heads": 2}, "q_proj heads of 8 .* and .*k_proj heads of 16"),
            ({"num_attention_heads": 8}, r"num_attention_heads is 8, but LlamaConfig, the config of .*q_proj, has 4"),
            ({"num_key_value_heads": 4}, "num_key_value_heads is 4, but LlamaConfig, the config of .*, has 2"),
            ({"rope_theta": 5e5}, r"rope_theta is 500000\.0, but LlamaConfig, the config of .*, has 10000\.0"),
        ],
    )
    def test_sizes_are_those_of_the_model(self, tiny_llama: Callable[..., nn.Module], sizes: Any, message: str) -> None:
        model, attention = tiny_llama(num_hidden_layers=1), ["q_proj", "k_proj", "v_proj"]
        right = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "rope_theta": 10000.0}
        qcompile.plan(model, "u4/g32/asym", modules_to_fuse={"attention": attention, **right})
        with pytest.raises(ConfigError, match=message):
            qcompile.plan(model, "u4/g32/asym", modules_to_fuse={"attention": attention, **sizes})

    def test_sizes_are_those_of_the_nearest_config(self) -> None:
        model = nn.ModuleDict({"text": self.Layer(), "vision": self.Layer()})
        text = SimpleNamespace(num_attention_heads=4)
        model.config = SimpleNamespace(num_attention_heads=1, get_text_config=lambda: text)
        model["vision"].config = SimpleNamespace(num_attention_heads=2)

        def plan(where: str, heads: int) -> None:
            names = [f"{where}{name}" for name in ("q", "k", "v")]
            qcompile.plan(model, "u4/g32/asym", modules_to_fuse={"attention": names, "num_attention_heads": heads})

        plan("text.attn.", 4)
        plan("vision.attn.", 2)
        with pytest.raises(ConfigError, match=r"is 4, but SimpleNamespace, the config of vision\.attn\.q, has 2"):
            plan("", 4)
        with pytest.raises(ConfigError, match=r"is 2, but SimpleNamespace, the config of text\.attn\.q, has 4"):
            plan("text.*.", 2)
        # Without attention it is the model's own, where it has one text model.
        for find in (lambda: text, None):
            model.config.get_text_config = find
            has = 4 if find else 1
            with pytest.raises(ConfigError, match=f"is 8, but SimpleNamespace, the config of ModuleDict, has {has}"):
                qcompile.plan(model, "u4/g32/asym", modules_to_fuse={"num_attention_heads": 8})

    def test_one_group_one_linear_and_equal_numbers(self, interpreted: None) -> None:
        class Attention(self.Layer):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                q, k, v = (self.attn[name](x).unflatten(-1, (4, 16)).transpose(1, 2) for name in ("q", "k", "v"))
                y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                return self.attn["o"](y.transpose(1, 2).flatten(2))

        model, x = Attention(), torch.randn(2, 5, 64)
        del model.mlp
        fast = qcompile.optimize(
            copy.deepcopy(model), "u4/g32/asym", modules_to_fuse={"attention": self.names["attention"]}, progress=False
        )
        assert fast.attn["q"].packed_weight is fast.attn["k"].packed_weight is fast.attn["v"].packed_weight
        assert fast.attn["q"].packed_weight is not fast.attn["o"].packed_weight
        model.load_state_dict(qcompile.dequantize(fast))
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert not fast.forward.eager
        assert qcompile.dump(fast).count("= qcompile.linear(") == 2
        report = qcompile.explain(fast)
        assert "q+k+v" in str(report)
        assert sum(low.op == "linear" for low in report.outcomes[0].lowered) == 2
