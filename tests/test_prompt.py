"""prompt: calls of a few lengths give what the prompts themselves give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import qcompile
from qcompile import caches, prompt
from qcompile.decode_step import Step, room_of
from qcompile.quant.activation import ActivationSpec
from qcompile.runtime import runner_of
from qcompile.stores import ActivationRounding

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)


def given(ids: Tensor, padded: int = 0, **others: Any) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"attention_mask": mask, "logits_to_keep": 1, "use_cache": True, **others}


def logits_of(model: Any, ids: Tensor, room: int, fresh: bool, **options: Any) -> tuple[Tensor, Any]:
    runner = runner_of(model)
    assert runner is not None and runner.heads is not None
    cache = caches.static_cache(runner.heads, room, len(ids), torch.float32, ids.device)
    kwargs = given(ids, **options, past_key_values=cache)
    with torch.no_grad():
        return Step(model, GenerationConfig(), kwargs, room_of(cache)).first(ids, fresh), cache


@pytest.mark.parametrize("config", [LLAMA, GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=40, vocab_size=100)])
def test_logits_and_cache_are_those_of_the_prompt(
    config: Any, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = (LlamaForCausalLM if config is LLAMA else GPT2LMHeadModel)(config).eval()
    model = qcompile.optimize(model, "u4/g32/asym", progress=False)
    lengths = []
    plain = model._prefill
    monkeypatch.setattr(model, "_prefill", lambda ids, *rest: lengths.append(ids.shape[1]) or plain(ids, *rest))
    for length, room, longer in (
        (5, 48, 16),
        (16, 48, 16),
        (17, 48, 32),
        (17, 24, 24),
        (33, 64, min(48, config.max_position_embeddings)),
    ):
        for padded in (0, 3):
            ids = torch.randint(0, 100, (2, length))
            (got, filled), (want, other) = (
                logits_of(model, ids, room, fresh, padded=padded) for fresh in (True, False)
            )
            torch.testing.assert_close(got, want)
            assert lengths[-2:] == [longer, length]
            for layer, expected in zip(filled.layers, other.layers, strict=True):
                assert layer.cumulative_length == length
                torch.testing.assert_close(layer.keys[0, :, padded:length], expected.keys[0, :, padded:length])


def test_lengths_are_few_and_not_much_longer() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=2048))

    def length(n: int, batch: int = 1, room: int = 4096) -> int:
        return prompt.length_of(model, torch.empty(batch, n, device="meta"), room)

    assert [length(n) for n in (2, 16, 17, 128, 129, 500, 1000)] == [16, 16, 32, 128, 160, 512, 1024]
    assert [length(n) for n in (1025, 1040, 1041, 2047)] == [1040, 1040, 1056, 2048]
    assert len({length(n) for n in range(2, 1025)}) == 20
    assert all(length(n) - n < max(16, n / 4) for n in range(2, 1025))
    assert length(17, room=20) == 20 and length(17, room=3) == 17
    # Of all sequences together.
    assert length(60, batch=16) == 64 and length(65, batch=16) == 65
    assert length(1025, batch=16) == 1040
    model.config.max_position_embeddings = 20
    assert length(17) == 20 and length(21) == 21


def test_positions_go_on() -> None:
    ids, position = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [0, 1, 2]])
    longer, kwargs = prompt.lengthened(ids, given(ids, 1, position_ids=position), 5)
    assert longer.tolist() == [[3, 4, 5, 5, 5], [6, 7, 8, 8, 8]]
    assert kwargs["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert kwargs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert kwargs["logits_to_keep"].tolist() == [2]


def test_refusals() -> None:
    model: Any = LlamaForCausalLM(LLAMA).eval()
    ids, config = torch.ones(1, 4, dtype=torch.int64), GenerationConfig()
    assert prompt.refuses(model, config, ids, given(ids)) is None
    assert prompt.refuses(model, config, ids[:, :1], given(ids[:, :1])) == "one token is what steps take"
    assert prompt.refuses(model, config, ids[:, 1:], given(ids)) == "the mask covers other tokens"
    every = {**given(ids), "logits_to_keep": 0}
    assert prompt.refuses(model, config, ids, every) == "the model gives the logits of all tokens"
    chunked = GenerationConfig(prefill_chunk_size=2)
    assert prompt.refuses(model, chunked, ids, given(ids)) == "the prompt comes in chunks"
    for rounding in ("i8/tensor/dynamic", "i8/token/dynamic/outliers(6.0)"):
        together = qcompile.optimize(copy.deepcopy(model), "i8/row/sym", activations=rounding, progress=False)
        assert prompt.refuses(together, config, ids, given(ids)) == "activations of all tokens are rounded together"
    stored = copy.deepcopy(model)
    stored.model.layers[1].extra = ActivationRounding(ActivationSpec.parse("i8/tensor/dynamic"))
    assert prompt.refuses(stored, config, ids, given(ids)) == "activations of all tokens are rounded together"
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    assert prompt.refuses(hooked, config, ids, given(ids)) == "hooks see the model's arguments"
    ahead = copy.deepcopy(model)
    ahead.config.is_causal = False
    assert prompt.refuses(ahead, config, ids, given(ids)) == "tokens attend to later ones"
    without = BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=100))
    assert prompt.refuses(without, config, ids, given(ids)) == "nobody says how many positions the model has"


@pytest.mark.cuda
def test_a_recording_serves_prompts_of_several_lengths() -> None:
    torch.manual_seed(0)
    plain: Any = LlamaForCausalLM(LLAMA).eval().cuda()
    model, unrecorded = (
        qcompile.optimize(copy.deepcopy(plain), progress=False, cuda_graphs=graphs) for graphs in (True, False)
    )
    for length in (17, 20, 29, 18, 32, 20):
        ids = torch.randint(1, 100, (2, length), device="cuda")
        mask = given(ids, padded=3)["attention_mask"]
        tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0) for m in (model, unrecorded)]
        assert torch.equal(*tokens)
    runner = runner_of(model)
    assert runner is not None
    replays = [program.replay for programs in runner.programs.values() for program in programs]
    assert sum(len(replay.recordings) for replay in replays if replay is not None) == 1
