import json
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
        ({"specs": {"q_proj": "u4/g64"}}, "specs['q_proj']: 'u4/g64' is not a spec"),
        ({"specs": {"q_proj": "u4/g64/sym"}}, "specs['q_proj']: u4 has no symmetric form; write i4/g64/sym"),
        ({"keep": ["lmhead"]}, "keep: unknown role 'lmhead'; did you mean 'lm_head'?"),
        ({"activations": 8}, "activations=8 is not a spec; a spec is spelled like 'i8/token/dynamic'"),
        ({"activations": "i8/row/dynamic"}, "activations: 'i8/row/dynamic': unknown granularity 'row'"),
        (
            {"activations": "i8/tensor/static"},
            "'i8/tensor/static' needs numbers that only a checkpoint has",
        ),
        ({"strict": 1}, "strict=1 is neither True nor False"),
        ({"do_fuse": None}, "do_fuse=None is neither True nor False"),
        ({"dump": 3}, "dump=3 is not a path"),
        ({"fuse_max_seq_len": 0}, "fuse_max_seq_len=0 is not a positive int"),
        ({"fuse_max_seq_len": True}, "fuse_max_seq_len=True is not a positive int"),
        ({"fuse_max_seq_len": 512.0}, "fuse_max_seq_len=512.0 is not a positive int"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**fields)


def test_unmatched() -> None:
    modules = ["", "model", "model.layers.0", Q0, "lm_head"]
    config = Config(U4, include=["lm_haed"], exclude=["layers.0", "vision.*"], specs={"k_proj": U8, "q_proj": None})
    assert config.unmatched(iter(modules)) == ["lm_haed", "vision.*", "k_proj"]
    assert Config(U4, exclude=["tag:lm_head", "tag:mlp.up"]).unmatched(["model"]) == ["tag:mlp.up"]
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
            ({"weights": U4, "group_size": 64}, {}, "unknown config key 'group_size'; known: activations, algorithm, "),
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


def test_canonical_form() -> None:
    config = Config(
        "u4/g64/asym/zero(u8/tensor/asym)",
        include="lm_head",
        exclude=["vision.*"],
        specs={"q_proj": "u8/g64/asym", "*": None},
        dump=Path("dumps"),
        modules_to_fuse={"hidden_size": 576, "attention": ["q_proj", "k_proj", "v_proj"]},
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


def test_kv_cache() -> None:
    assert Config(kv_cache="i8").to_dict()["kv_cache"] == "i8" and Config.of({"kv_cache": "fp8_e4m3"}) != Config()
    with pytest.raises(ConfigError, match="kv_cache='fp8'; known: i8, fp8_e4m3, none"):
        Config(kv_cache="fp8")
