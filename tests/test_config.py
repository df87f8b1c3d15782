import json
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from qcompile.config import KEEP, ROLES, Config
from qcompile.errors import ConfigError
from qcompile.quant.spec import QSpec

U4, U8, I8 = (QSpec.parse(text) for text in ("u4/g64/asym", "u8/g64/asym", "i8/row/sym"))
Q0, K1, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.k_proj", "model.layers.0.mlp.down_proj"


def test_defaults() -> None:
    config = Config()
    assert config.spec_for(Q0, "linear") == "no weights spec in the config"
    assert config.do_fuse
    assert config.keep == KEEP
    assert Config("u4/g64/asym").weights == U4


@pytest.mark.parametrize("role", sorted(ROLES))
def test_roles(role: str) -> None:
    want = f"kept: {role}" if role in KEEP else U4
    assert Config(U4).spec_for("a.b", role) == want


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
def test_patterns(pattern: str, module: str, matches: bool) -> None:
    reason = Config(U4, exclude=[pattern]).spec_for(module, "linear")
    assert reason == (f"excluded by {pattern!r}" if matches else U4)
    assert Config(U4, exclude=[pattern]).unmatched([module]) == (
        [] if matches or pattern == "tag:lm_head" else [pattern]
    )


@pytest.mark.parametrize(
    ("fields", "module", "role", "want"),
    [
        ({"include": ["lm_head"]}, "lm_head", "lm_head", U4),
        ({"include": ["lm_head"]}, "model.embed_tokens", "embedding", "kept: embedding"),
        ({"include": ["*"]}, "model.norm", "norm", "kept: norm"),
        ({"include": ["q_proj"]}, Q0, "bias", "kept: bias"),
        ({"include": ["lm_head"], "exclude": ["lm_head"]}, "lm_head", "lm_head", "excluded by 'lm_head'"),
        ({"exclude": ["layers.3", "q_proj"]}, Q0, "linear", "excluded by 'q_proj'"),
        ({"exclude": "q_proj", "specs": {"q_proj": U8}}, Q0, "linear", "excluded by 'q_proj'"),
        ({"specs": {"q_proj": "u8/g64/asym"}}, Q0, "linear", U8),
        ({"specs": {"q_proj": U8}}, DOWN, "linear", U4),
        ({"specs": {"q_proj": None}}, Q0, "linear", "kept dense by specs['q_proj']"),
        ({"specs": {"layers.0": None, "q_proj": U8}}, Q0, "linear", "kept dense by specs['layers.0']"),
        ({"specs": {"q_proj": U8, "layers.0": None}}, Q0, "linear", U8),
        # A spec for lm_head by name quantizes it; one for all of a block leaves what is kept there.
        ({"specs": {"lm_head": U8}}, "lm_head", "lm_head", U8),
        ({"specs": {"layers.0": U8}}, "model.layers.0.mlp.gate", "router", "kept: router"),
        ({"specs": {"*": U8}}, "lm_head", "lm_head", "kept: lm_head"),
        ({"specs": {"*": U8}, "include": ["lm_head"]}, "lm_head", "lm_head", U8),
        ({"specs": {"tag:lm_head": U8}}, "lm_head", "lm_head", U8),
        ({"weights": None, "specs": {"q_proj": U8}}, DOWN, "linear", "no weights spec in the config"),
        ({"keep": []}, "lm_head", "lm_head", U4),
        ({"keep": []}, "model.norm", "norm", "kept: norm"),
        ({"keep": {"linear"}}, Q0, "linear", "kept: linear"),
    ],
)
def test_which_rule_wins(fields: dict[str, Any], module: str, role: str, want: QSpec | str) -> None:
    assert Config(**{"weights": U4, **fields}).spec_for(module, role) == want


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
    ("fields", "message"),
    [
        ({"weights": "u4/g64"}, "weights: 'u4/g64' is not a spec; a spec is element/granularity/zero"),
        ({"weights": 4}, "weights=4 is not a spec; a spec is spelled like 'u4/g64/asym'"),
        ({"algorithm": "hqqq"}, "unknown algorithm 'hqqq'; did you mean 'hqq'?"),
        ({"algorithm": "gptq"}, "unknown algorithm 'gptq'; known: hqq, rtn"),
        ({"algorithm": ["hqq"]}, "unknown algorithm ['hqq']"),
        ({"weights": I8, "algorithm": "hqq"}, "weights='i8/row/sym' with algorithm='hqq': HQQ has float zero points"),
        ({"specs": {"a": I8}, "algorithm": "hqq"}, "specs['a']='i8/row/sym' with algorithm='hqq'"),
        ({"include": ["lm_head"]}, "include=['lm_head'] without weights: there is no spec to quantize them to"),
        ({"include": 3}, "include=3 is not a list of names"),
        ({"exclude": ["a", ""]}, "exclude holds '', which is not a name"),
        ({"exclude": [None]}, "exclude holds None, which is not a name"),
        ({"exclude": {"a": 1}}, "exclude={'a': 1} is not a list of names"),
        ({"specs": ["q_proj"]}, "specs=['q_proj'] is not a mapping from pattern to spec"),
        ({"specs": {"q_proj": "u4/g64/sym"}}, "specs['q_proj']: u4 has no symmetric form; write i4/g64/sym"),
        ({"keep": ["lmhead"]}, "keep: unknown role 'lmhead'; did you mean 'lm_head'?"),
        ({"strict": 1}, "strict=1 is neither True nor False"),
        ({"do_fuse": None}, "do_fuse=None is neither True nor False"),
        ({"dump": 3}, "dump=3 is not a path"),
        ({"fuse_max_seq_len": 0}, "fuse_max_seq_len=0 is not a positive int"),
        ({"fuse_max_seq_len": True}, "fuse_max_seq_len=True is not a positive int"),
        ({"fuse_max_seq_len": 512.0}, "fuse_max_seq_len=512.0 is not a positive int"),
        ({"modules_to_fuse": ["q_proj"]}, "modules_to_fuse=['q_proj'] is not a mapping"),
        ({"modules_to_fuse": {"atention": []}}, "modules_to_fuse: unknown key 'atention'; did you mean 'attention'?"),
        ({"modules_to_fuse": {"mlp": "up"}}, "modules_to_fuse['mlp']='up' is one name, not a list of names"),
        (
            {"modules_to_fuse": {"mlp": ["up"]}},
            "modules_to_fuse['mlp'] holds 1 names: ['up']; it is [] or gate, up, down",
        ),
        (
            {"modules_to_fuse": {"attention": ["q", "k"]}},
            "['attention'] holds 2 names: ['q', 'k']; it is [] or q, k, v",
        ),
        ({"modules_to_fuse": {"attention": ["q", "k", "k"]}}, "['attention'] holds a name twice"),
        ({"modules_to_fuse": {"layernorm": [1]}}, "modules_to_fuse['layernorm'] holds 1, which is not a name"),
        ({"modules_to_fuse": {"use_alibi": 0}}, "modules_to_fuse['use_alibi']=0 is neither True nor False"),
        ({"modules_to_fuse": {"hidden_size": -1}}, "modules_to_fuse['hidden_size']=-1 is not a positive int"),
        ({"modules_to_fuse": {"num_attention_heads": True}}, "['num_attention_heads']=True is not a positive int"),
        ({"modules_to_fuse": {"rope_theta": float("inf")}}, "['rope_theta']=inf is not a positive int or float"),
        ({"modules_to_fuse": {**FUSE, "hidden_size": 577}}, "9 num_attention_heads do not divide hidden_size 577"),
        (
            {"modules_to_fuse": {**FUSE, "num_key_value_heads": 2}},
            "2 num_key_value_heads do not divide 9 num_attention",
        ),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)


def test_unmatched() -> None:
    modules = ["", "model", "model.layers.0", Q0, "lm_head"]
    config = Config(U4, include=["lm_haed"], exclude=["layers.0", "vision.*"], specs={"k_proj": U8, "q_proj": None})
    assert config.unmatched(iter(modules)) == ["lm_haed", "vision.*", "k_proj"]
    fusing = Config(U4, modules_to_fuse={"attention": ["q_proj", "k_proj", "v_proj"], "layernorm": ["norm"]})
    assert fusing.unmatched(modules) == ["k_proj", "v_proj", "norm"]
    assert replace(fusing, do_fuse=False).unmatched(modules) == []


class TestOf:
    def test_simple_values(self) -> None:
        assert Config.of() == Config.of(None) == Config.of({}) == Config()
        assert Config.of("u4/g64/asym") == Config.of(U4) == Config.of({"weights": U4}) == Config(U4)
        assert Config.of(Config(U4, strict=True), exclude="lm_head") == Config(U4, strict=True, exclude=("lm_head",))
        assert Config.of({"weights": U4}, weights="u8/g64/asym").weights == U8

    @pytest.mark.parametrize(
        ("value", "options", "message"),
        [
            (None, {"weigths": "u4/g64/asym"}, "unknown config key 'weigths'; did you mean 'weights'?"),
            ({"weights": U4, "group_size": 64}, {}, "unknown config key 'group_size'; known: algorithm, "),
            (
                4,
                {},
                "a config is a spec such as 'u4/g64/asym', a Config, a dict of its fields or a transformers HqqConfig",
            ),
            ("config.json", {}, "'config.json' is not a spec"),
            (SimpleNamespace(quant_method="gptq"), {}, "quant_method 'gptq' describes a checkpoint"),
            ({"quant_method": "hqq"}, {}, "a config with quant_method 'hqq' needs the mapping quant_config"),
        ],
    )
    def test_bad_values(self, value: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            Config.of(value, **options)

    def test_awq(self) -> None:
        theirs = {"quant_method": "awq", "bits": 4, "do_fuse": True, "fuse_max_seq_len": 512, "modules_to_fuse": FUSE}
        want = Config(do_fuse=True, fuse_max_seq_len=512, modules_to_fuse=FUSE)
        assert Config.of(theirs) == Config.of(SimpleNamespace(**theirs)) == want
        assert Config.of({"quant_method": "awq", "do_fuse": None, "fuse_max_seq_len": None}) == Config()
        assert not Config.of({"quant_method": "awq", "do_fuse": False}).do_fuse


class TestFusing:
    attention = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    mlp = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]

    def test_all_by_default_and_none_without_do_fuse(self) -> None:
        assert Config().may_store_together(self.attention)
        assert not Config(do_fuse=False).may_store_together(self.attention)
        for kind in ("any", "attention", "mlp", "layernorm"):
            assert Config().may_fuse_in(kind)("model.layers.0")
            assert not Config(do_fuse=False, modules_to_fuse=FUSE).may_fuse_in(kind)("model.layers.0")

    def test_only_what_is_named(self) -> None:
        config = Config(modules_to_fuse=FUSE)
        assert config.may_store_together(self.attention)
        assert config.may_store_together(self.mlp)
        assert not config.may_store_together([self.attention[0], self.mlp[0]])
        assert not config.may_store_together(["a.in_proj", "a.gate_proj"])
        assert config.may_fuse_in("layernorm")("model.layers.0.input_layernorm")
        assert not config.may_fuse_in("layernorm")("model.layers.0.post_attention_layernorm")
        assert config.may_fuse_in("attention")("model.layers.0.self_attn")

    def test_an_empty_list_fuses_none_of_a_kind(self) -> None:
        config = Config(modules_to_fuse={**FUSE, "attention": [], "layernorm": []})
        assert not config.may_store_together(self.attention)
        assert config.may_store_together(self.mlp)
        assert not config.may_fuse_in("attention")("model.layers.0.self_attn")
        assert not config.may_fuse_in("layernorm")("model.layers.0.input_layernorm")
        assert config.may_fuse_in("mlp")("model.layers.0.mlp")

    def test_names_with_a_parent_confine(self) -> None:
        names = [f"language_model.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        allows = Config(modules_to_fuse={"attention": names}).may_fuse_in("attention")
        assert allows("language_model.layers.0.self_attn")
        assert allows("language_model.layers.0.self_attn.rotary")
        assert not allows("vision.layers.0.self_attn")


def test_canonical_form() -> None:
    config = Config(
        "u4/g64/asym/zero(u8/tensor/asym)",
        include="lm_head",
        exclude=["vision.*"],
        specs={"q_proj": "u8/g64/asym", "*": None},
        dump=Path("dumps"),
        modules_to_fuse=dict(reversed(FUSE.items())),
    )
    data = json.loads(config.to_json())
    assert data == config.to_dict()
    assert data["weights"] == "u4/g64/asym/zero(u8/tensor/asym)"
    assert data["specs"] == {"q_proj": "u8/g64/asym", "*": None}
    for twin in (Config.of(data), deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert twin == config
        assert hash(twin) == hash(config)
    assert config != "config"
    # The order of specs has a meaning.
    swapped = replace(config, specs={"*": None, "q_proj": "u8/g64/asym"})
    assert swapped != config
    assert Config(keep={"norm", "tiny"}).to_json() == Config(keep=["tiny", "norm", "tiny"]).to_json()


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
