"""Configs of transformers mean here what they mean there."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from qcompile.config import Config
from qcompile.errors import ConfigError
from qcompile.quant.spec import QSpec


def test_awq() -> None:
    fuse = {"attention": ["q_proj", "k_proj", "v_proj"], "use_alibi": False}
    theirs = {"quant_method": "awq", "bits": 4, "do_fuse": True, "fuse_max_seq_len": 512, "modules_to_fuse": fuse}
    want = Config(do_fuse=True, fuse_max_seq_len=512, modules_to_fuse=fuse)
    assert Config.of(theirs) == Config.of(SimpleNamespace(**theirs)) == want
    assert Config.of({"quant_method": "awq", "do_fuse": None, "fuse_max_seq_len": None}) == Config()
    assert not Config.of({"quant_method": "awq", "do_fuse": False}).do_fuse


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(64, 64), "gate": nn.Linear(64, 2)})
        self.norm = nn.LayerNorm(64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Embedding(8, 64), "layers": nn.ModuleList([Block(), Block()])})
        self.lm_head = nn.Linear(64, 8)
        self.config = SimpleNamespace()


ROLE = {"lm_head": "lm_head", "gate": "router", "embed": "embedding", "norm": "norm"}


def quantized_in_transformers(theirs: Any) -> dict[str, Any]:
    """Module → the quantization parameters that Transformers gives it, for every linear that it would quantize."""
    integration = pytest.importorskip("transformers.integrations.hqq")
    model = integration.prepare_for_hqq_linear(Model(), quantization_config=theirs)
    return {name: module.quant_config for name, module in model.named_modules() if hasattr(module, "quant_config")}


HQQ_CONFIGS = [
    ({}, {}),
    ({"nbits": 3, "group_size": 32, "axis": 0}, {}),
    ({"nbits": 2, "group_size": None, "skip_modules": []}, {}),
    ({"nbits": 8, "skip_modules": ["self_attn.q_proj", "mlp.gate", "lm_head"]}, {}),
    ({"skip_modules": None}, {}),
    ({"dynamic_config": {"self_attn.q_proj": {"nbits": 8, "group_size": 64}, "lm_head": {"nbits": 4}}}, {}),
    ({"dynamic_config": {"mlp.gate": {"nbits": 3, "axis": 0}}, "skip_modules": ["self_attn.q_proj"]}, {}),
    ({"dynamic_config": {"mlp.gate": {"quant_zero": True}, "self_attn.q_proj": {"quant_scale": True}}}, {}),
    ({"nbits": 1}, {"optimize": False}),
]


@pytest.mark.parametrize(("options", "changes"), HQQ_CONFIGS)
def test_hqq_config_means_what_it_means_in_transformers(options: dict[str, Any], changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    skip = options.get("skip_modules", ["lm_head"])
    theirs = transformers.HqqConfig(**{**options, "skip_modules": skip if skip is not None else []})
    if changes:
        theirs.quant_config["weight_quant_params"] |= changes
    ours, want = Config.of(theirs), quantized_in_transformers(theirs)
    assert ours == Config.of({"quant_method": "hqq", "quant_config": theirs.quant_config, "skip_modules": skip})
    model = Model()
    modules = dict(model.named_modules())
    assert ours.unmatched(modules) == []
    assert ours.algorithm == ("rtn" if changes else "hqq")
    for name, module in modules.items():
        if not hasattr(module, "weight"):
            continue
        got = ours.spec_for(name, ROLE.get(name.rpartition(".")[2], "linear"))
        assert isinstance(got, str) == (name not in want), name
        if isinstance(got, QSpec):
            params = want[name]["weight_quant_params"]
            size = params["group_size"]
            assert got.element.tag == f"u{params['nbits']}"
            assert str(got.granularity) == ("row" if size is None else f"{'og'[params['axis']]}{size}")
            assert (got.scale_spec is None) == (want[name]["scale_quant_params"] is None)
            assert (got.zero_spec is None) == (want[name]["zero_quant_params"] is None)


def hqq_dict(**weight: Any) -> dict[str, Any]:
    return {"quant_method": "hqq", "skip_modules": [], "quant_config": {"weight_quant_params": weight}}


@pytest.mark.parametrize(
    ("weight", "sides", "spec"),
    [
        ({"nbits": 3, "group_size": 128, "axis": 1}, {}, "u3/g128/asym"),
        ({"nbits": 1.58, "group_size": 64, "axis": 0}, {}, "ternary/o64/asym"),
        ({"nbits": 2, "channel_wise": False, "group_size": None}, {}, "u2/tensor/asym"),
        ({"nbits": 4, "round_zero": True, "view_as_float": True}, {}, "u4/o64/asym"),
        (
            {"nbits": 4, "group_size": 64, "axis": 1, "round_zero": True},
            {
                "scale_quant_params": {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False},
                "zero_quant_params": {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False},
                "offload_meta": False,
            },
            "u4/g64/asym/scale(u8/o128/asym)/zero(u8/tensor/asym)",
        ),
    ],
)
def test_hqq_parameters(weight: dict[str, Any], sides: dict[str, Any], spec: str) -> None:
    theirs = hqq_dict(**weight)
    theirs["quant_config"].update(sides)
    assert str(Config.of(theirs).weights) == spec


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"nbits": 7}, "HqqConfig: quant_config: nbits=7; known: 1, 1.58, 2, 3, 4, 5, 6, 8"),
        ({"nbits": 3, "axis": 2}, "HqqConfig: quant_config: axis=2 is neither 0 nor 1"),
        ({"nbits": 3, "axis": 0, "group_size": None}, "group_size=None with axis=0 has one scale per input"),
        ({"nbits": 3, "group_size": 0}, "HqqConfig: quant_config: group_size=0 is not a positive int"),
        ({"nbits": 3, "round_zero": True}, "round_zero=True with nbits=3 is not known"),
    ],
)
def test_bad_hqq_parameters(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.of(hqq_dict(**weight))


def test_bad_hqq_dicts() -> None:
    side = {"nbits": 8, "group_size": 128}
    theirs = hqq_dict(nbits=3)
    theirs["quant_config"]["scale_quant_params"] = side
    with pytest.raises(ConfigError, match="scale_quant_params has optimize or round_zero"):
        Config.of(theirs)
    with pytest.raises(ConfigError, match=r"HqqConfig: q_proj has no weight_quant_params"):
        Config.of({"quant_method": "hqq", "quant_config": {"q_proj": {"nbits": 4}}})
    fast = {"weight_quant_params": {"nbits": 3, "optimize": False}}
    mixed = {"a": fast, "b": {"weight_quant_params": {"nbits": 3}}}
    with pytest.raises(ConfigError, match="optimize is True for some tags and False for others"):
        Config.of({"quant_method": "hqq", "quant_config": mixed})
