"""AWQ's explicit fusing: what modules_to_fuse may say, and what it lets be fused."""

from __future__ import annotations

import re
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
    for kind in ("any", "attention", "mlp", "layernorm"):
        assert Fusing().may_fuse_in(kind)("model.layers.0")
        assert not Fusing(False, FUSE).may_fuse_in(kind)("model.layers.0")


def test_only_what_is_named() -> None:
    fusing = Fusing(True, FUSE)
    assert fusing.may_store_together(ATTENTION)
    assert fusing.may_store_together(MLP)
    assert not fusing.may_store_together([ATTENTION[0], MLP[0]])
    assert not fusing.may_store_together(["a.in_proj", "a.gate_proj"])
    assert fusing.may_fuse_in("layernorm")("model.layers.0.input_layernorm")
    assert not fusing.may_fuse_in("layernorm")("model.layers.0.post_attention_layernorm")
    assert fusing.may_fuse_in("attention")("model.layers.0.self_attn")


def test_an_empty_list_fuses_none_of_a_kind() -> None:
    fusing = Fusing(True, {**FUSE, "attention": [], "layernorm": []})
    assert not fusing.may_store_together(ATTENTION)
    assert fusing.may_store_together(MLP)
    assert not fusing.may_fuse_in("attention")("model.layers.0.self_attn")
    assert not fusing.may_fuse_in("layernorm")("model.layers.0.input_layernorm")
    assert fusing.may_fuse_in("mlp")("model.layers.0.mlp")


def test_names_with_a_parent_confine() -> None:
    names = [f"language_model.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    allows = Fusing(True, {"attention": names}).may_fuse_in("attention")
    assert allows("language_model.layers.0.self_attn")
    assert allows("language_model.layers.0.self_attn.rotary")
    assert not allows("vision.layers.0.self_attn")


def test_names() -> None:
    assert Fusing(True, FUSE).names == [*FUSE["attention"], *FUSE["mlp"], *FUSE["layernorm"]]
    assert Fusing().names == Fusing(False, FUSE).names == []
