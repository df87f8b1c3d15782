"""Which passes run where, and where the dumps go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.config import Config
from qcompile.pipeline import Pipeline


class TestDumpFolder:
    def test_the_environment_names_it_where_the_config_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QCOMPILE_DUMP", raising=False)
        assert Pipeline.of(Config()).dump is None
        monkeypatch.setenv("QCOMPILE_DUMP", "from/environment")
        assert Pipeline.of(Config()).dump == Path("from/environment")

    def test_the_config_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QCOMPILE_DUMP", "from/environment")
        assert Pipeline.of(Config(dump=Path("from/config"))).dump == Path("from/config")

    def test_empty_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QCOMPILE_DUMP", "")
        assert Pipeline.of(Config()).dump is None


class TestAlibi:
    """use_alibi in modules_to_fuse."""

    def test_no_rope_is_fused_and_attention_is(self, tiny_llama: Callable[..., nn.Module], interpreted: None) -> None:
        names = [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
        fuse = {"attention": names, "use_alibi": True}
        model = qcompile.optimize(tiny_llama(), "u4/g32/asym", modules_to_fuse=fuse, algorithm="rtn", progress=False)
        passes = {result.name: result for result in qcompile.explain(model).outcomes[0].passes}
        assert not passes["fuse_rope"].rewrites
        assert [(reason, site.module) for reason, site in passes["fuse_rope"].misses] == [
            ("modules_to_fuse has use_alibi: no rope belongs here", "model.layers.0.self_attn"),
            ("modules_to_fuse has use_alibi: no rope belongs here", "model.layers.0.self_attn"),
            ("the module is not named in modules_to_fuse", "model.layers.1.self_attn"),
            ("the module is not named in modules_to_fuse", "model.layers.1.self_attn"),
        ]
        assert [site.module for site in passes["fuse_attention"].rewrites] == ["model.layers.0.self_attn"]

    def test_attention_with_its_bias_is_fused(self, interpreted: None) -> None:
        class Alibi(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
                self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None])

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = (linear(x).unflatten(-1, (4, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v))
                steps = torch.arange(x.shape[1])
                scores = q @ k.transpose(2, 3) / 4 + self.slopes * (steps - steps[:, None])
                return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        model, x = Alibi(), torch.randn(2, 5, 64)
        fuse = {"attention": ["q", "k", "v", "o"], "use_alibi": True, "num_attention_heads": 4, "hidden_size": 64}
        fast = qcompile.optimize(copy.deepcopy(model), "u4/g32/asym", modules_to_fuse=fuse, progress=False)
        model.load_state_dict(qcompile.dequantize(fast))
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        passes = {result.name: result for result in qcompile.explain(fast).outcomes[0].passes}
        assert len(passes["fuse_attention"].rewrites) == len(passes["fuse_siblings"].rewrites) == 1
        assert not passes["fuse_rope"].misses
