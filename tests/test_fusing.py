"""AWQ's explicit fusing: what modules_to_fuse may say, and what it lets be fused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from qcompile.config import Config
from qcompile.errors import ConfigError
from qcompile.fusing import Fusing

FUSE = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "layernorm": ["input_layernorm", "norm"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "use_alibi": False,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (["q_proj"], "modules_to_fuse=['q_proj'] is not a mapping"),
        ({"atention": []}, "modules_to_fuse: unknown key 'atention'; did you mean 'attention'?"),
        ({"mlp": "up"}, "modules_to_fuse['mlp']='up' is one name, not a list of names"),
        ({"mlp": ["up"]}, "modules_to_fuse['mlp'] holds 1 names: ['up']; it is [] or gate, up, down"),
        ({"attention": ["q", "k"]}, "['attention'] holds 2 names: ['q', 'k']; it is [] or q, k, v"),
        ({"attention": ["q", "k", "k"]}, "['attention'] holds a name twice"),
        ({"layernorm": [1]}, "modules_to_fuse['layernorm'] holds 1, which is not a name"),
        ({"use_alibi": 0}, "modules_to_fuse['use_alibi']=0 is neither True nor False"),
        ({"hidden_size": -1}, "modules_to_fuse['hidden_size']=-1 is not a positive int"),
        ({"num_attention_heads": True}, "['num_attention_heads']=True is not a positive int"),
        ({"rope_theta": float("inf")}, "['rope_theta']=inf is not a positive int or float"),
        ({**FUSE, "hidden_size": 577}, "9 num_attention_heads do not divide hidden_size 577"),
        ({**FUSE, "num_key_value_heads": 2}, "2 num_key_value_heads do not divide 9 num_attention"),
    ],
)
def test_bad_values_are_named(stated: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(modules_to_fuse=stated)


def test_keys_have_one_order() -> None:
    assert Fusing(True, dict(reversed(FUSE.items()))) == Fusing(True, FUSE)
    assert Config(modules_to_fuse=dict(reversed(FUSE.items()))).to_json() == Config(modules_to_fuse=FUSE).to_json()


ATTENTION = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
MLP = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]


def test_all_by_default_and_none_without_do_fuse() -> None:
    assert Fusing().may_store_together(ATTENTION)
    assert not Fusing(False).may_store_together(ATTENTION)
    for kind in ("any", "attention", "rope", "mlp", "layernorm"):
        assert Fusing().why_not(kind, "model.layers.0") is None
        assert Fusing(False, FUSE).why_not(kind, "model.layers.0") == "do_fuse is False"


UNNAMED = "the module is not named in modules_to_fuse"


def test_only_what_is_named() -> None:
    fusing = Fusing(True, FUSE)
    assert fusing.may_store_together(ATTENTION)
    assert fusing.may_store_together(MLP)
    assert not fusing.may_store_together([ATTENTION[0], MLP[0]])
    assert not fusing.may_store_together(["a.in_proj", "a.gate_proj"])
    assert fusing.why_not("layernorm", "model.layers.0.input_layernorm") is None
    assert fusing.why_not("layernorm", "model.layers.0.post_attention_layernorm") == UNNAMED
    assert fusing.why_not("attention", "model.layers.0.self_attn") is None


def test_an_empty_list_fuses_none_of_a_kind() -> None:
    fusing = Fusing(True, {**FUSE, "attention": [], "layernorm": []})
    assert not fusing.may_store_together(ATTENTION)
    assert fusing.may_store_together(MLP)
    assert fusing.why_not("attention", "model.layers.0.self_attn") == UNNAMED
    assert fusing.why_not("rope", "model.layers.0.self_attn") == UNNAMED
    assert fusing.why_not("layernorm", "model.layers.0.input_layernorm") == UNNAMED
    assert fusing.why_not("mlp", "model.layers.0.mlp") is None


def test_names_with_a_parent_confine() -> None:
    names = [f"language_model.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    fusing = Fusing(True, {"attention": names})
    assert fusing.why_not("attention", "language_model.layers.0.self_attn") is None
    assert fusing.why_not("rope", "language_model.layers.0.self_attn.rotary") is None
    assert fusing.why_not("attention", "vision.layers.0.self_attn") == UNNAMED


def test_alibi_has_no_rope() -> None:
    names = ["text.*.q", "text.*.k", "text.*.v"]
    fusing = Fusing(True, {"attention": names, "use_alibi": True})
    assert fusing.why_not("rope", "text.0.attn") == "modules_to_fuse has use_alibi: no rope belongs here"
    assert fusing.why_not("rope", "vision.0.attn") == UNNAMED
    assert fusing.why_not("attention", "text.0.attn") is None
    assert Fusing(True, {"attention": names, "use_alibi": False}).why_not("rope", "text.0.attn") is None


def test_names() -> None:
    assert Fusing(True, FUSE).names == [*FUSE["attention"], *FUSE["mlp"], *FUSE["layernorm"]]
    assert Fusing().names == Fusing(False, FUSE).names == []


class TestReads:
    def test_siblings_read_one_value(self) -> None:
        fusing = Fusing(True, FUSE)
        assert {fusing.reads(name) for name in ATTENTION} == {("attention", "model.layers.0.self_attn")}
        assert {fusing.reads(name) for name in MLP} == {("mlp", "model.layers.0.mlp")}
        assert fusing.reads("model.layers.1.mlp.up_proj") == ("mlp", "model.layers.1.mlp")

    @pytest.mark.parametrize(
        ("fusing", "module"),
        [
            (Fusing(), "a.q_proj"),
            (Fusing(False, FUSE), "a.q_proj"),
            (Fusing(True, FUSE), "a.o_proj"),
            (Fusing(True, FUSE), "a.down_proj"),
            (Fusing(True, {"attention": ["qkv"]}), "a.qkv"),
            (Fusing(True, {"mlp": ["up", "down"]}), "a.up"),
        ],
    )
    def test_others_state_nothing(self, fusing: Fusing, module: str) -> None:
        assert fusing.reads(module) is None


LINEARS = {"a.q_proj": (576, 576), "a.k_proj": (192, 576), "a.v_proj": (192, 576), "a.o_proj": (1, 1), "b": (3, 5)}


class TestSizes:
    def test_those_of_the_linears_pass(self) -> None:
        Fusing(True, FUSE).check_linears(LINEARS)
        # The width of a head is free: 9 heads of 128.
        Fusing(True, FUSE).check_linears({"a.q_proj": (1152, 576), "a.k_proj": (384, 576)})
        # Only what is stated, and what is there, is checked.
        Fusing(True, {"attention": FUSE["attention"]}).check_linears(LINEARS)
        Fusing(True, FUSE).check_linears({"b": (3, 5)})
        Fusing(False, {**FUSE, "hidden_size": 9}).check_linears(LINEARS)
        Fusing(True, {**FUSE, "attention": ["q_proj"], "hidden_size": 9}).check_linears(LINEARS)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": 1152}, "modules_to_fuse: hidden_size is 1152, but a.q_proj reads 576 features; correct"),
            (
                {"num_attention_heads": 128, "num_key_value_heads": None},
                "num_attention_heads is 128, but a.q_proj makes 576 features, which is no multiple of it",
            ),
            (
                {"num_attention_heads": None, "num_key_value_heads": 7},
                "num_key_value_heads is 7, but a.k_proj makes 192 features, which is no multiple of it",
            ),
            (
                {"num_attention_heads": 18},
                "num_attention_heads is 18 and num_key_value_heads is 3, but that gives a.q_proj heads of 32 features "
                "and a.k_proj heads of 64 features; correct the number, leave it out, or name only the attention",
            ),
        ],
    )
    def test_others_are_named(self, changes: dict[str, Any], message: str) -> None:
        sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, **changes}
        stated = {"attention": FUSE["attention"], **{key: size for key, size in sizes.items() if size}}
        with pytest.raises(ConfigError, match=re.escape(message)):
            Fusing(True, stated).check_linears(LINEARS)

    def test_each_attention_is_checked(self) -> None:
        second = {name.replace("a.", "c."): shape for name, shape in LINEARS.items()}
        with pytest.raises(ConfigError, match=r"hidden_size is 576, but c\.q_proj reads 64 features"):
            Fusing(True, FUSE).check_linears({**LINEARS, **second, "c.q_proj": (576, 64)})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (SimpleNamespace(num_attention_heads=8), "num_attention_heads is 9, but SimpleNamespace, the config of x"),
            (SimpleNamespace(num_key_value_heads=9), "num_key_value_heads is 3, but SimpleNamespace, the config of x"),
            (SimpleNamespace(hidden_size=64), "hidden_size is 576, but SimpleNamespace, the config of x, has 64;"),
            (SimpleNamespace(rope_theta=5e5), "rope_theta is 10000.0, but SimpleNamespace, the config of x, has 5"),
            (SimpleNamespace(rope_theta=1e4, rope_parameters={"rope_theta": 3e4}), "of x, has 30000.0;"),
            (
                SimpleNamespace(rope_parameters={"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 2e4}}),
                "of x, has 1000000.0 and 20000.0;",
            ),
        ],
    )
    def test_those_of_the_config(self, config: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            Fusing(True, FUSE).check_config(config, "x")
        Fusing(False, FUSE).check_config(config, "x")
        Fusing(True, {"attention": FUSE["attention"]}).check_config(config, "x")

    def test_what_the_config_does_not_have_is_not_checked(self) -> None:
        same = SimpleNamespace(num_attention_heads=9, num_key_value_heads=None, hidden_size=[1, 2], rope_theta=10_000)
        layers = SimpleNamespace(rope_parameters={"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 10_000}})
        for config in (None, {}, SimpleNamespace(), same, layers):
            Fusing(True, FUSE).check_config(config, "x")
