"""generate: which cache, which loop, and what a caller may give."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import qcompile
from qcompile import decode
from qcompile.errors import ConfigError

Make = Callable[..., nn.Module]


@pytest.fixture
def pair(tiny_llama: Make) -> tuple[Any, Any]:
    """An optimized model, and the untouched float model with the same quantized weights."""
    return pair_of(tiny_llama())


def pair_of(reference: Any, **options: object) -> tuple[Any, Any]:
    model = qcompile.optimize(copy.deepcopy(reference), "u4/g32/asym", progress=False, **options)
    reference.load_state_dict(qcompile.dequantize(model))
    return model, reference


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The loops of qcompile.decode that ran."""
    made: list[Any] = []
    monkeypatch.setattr(decode, "Ended", lambda *args, ended=decode.Ended: made.append(ended(*args)) or made[-1])
    return made


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 100, shape)


def programs(model: Any) -> int:
    return sum(map(len, model.forward.programs.values()))


def test_prompt_lengths_share_two_programs(pair, interpreted: None) -> None:
    model, reference = pair
    for length in (4, 9, 17, 30):
        x = ids(1, length)
        got, want = (m.generate(x, max_new_tokens=length, do_sample=False, pad_token_id=0) for m in (model, reference))
        assert torch.equal(got, want)
    # One graph for prefill and one for decode.
    assert programs(model) == 2 and not model.forward.eager


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair, interpreted: None, side: str) -> None:
    model, reference = pair
    x, mask = ids(3, 8), torch.ones((3, 8), dtype=torch.long)
    mask[0, : 3 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[1, 5:] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(x, **arguments), reference.generate(x, **arguments))
    assert not model.forward.eager


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches_of_the_caller(pair, interpreted: None, cache: str) -> None:
    from transformers import DynamicCache, StaticCache

    model, reference = pair
    x = ids(2, 6)
    outs = []
    for m in (model, reference):
        kv = StaticCache(config=m.config, max_cache_len=32) if cache == "static" else DynamicCache(config=m.config)
        outs.append(m.generate(x, past_key_values=kv, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*outs)
    assert not model.forward.eager


def test_sliding_windows_run_compiled(interpreted: None) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    for config, cls in ((MistralConfig, MistralForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)):
        torch.manual_seed(0)
        fields = dict(**sizes, num_hidden_layers=2, head_dim=16, sliding_window=8, max_position_embeddings=128)
        model, reference = pair_of(cls(config(**fields)).eval())
        x = ids(2, 6)
        arguments = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(model.generate(x, **arguments), reference.generate(x, **arguments)), cls.__name__
        assert programs(model) == 2 and not model.forward.eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_capped_attention(dtype: torch.dtype, interpreted: None) -> None:
    """Gemma 2, with scores on both sides of the cap, and a window in every other layer: logits of each step."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    capped = dict(attn_logit_softcapping=0.5, query_pre_attn_scalar=1, initializer_range=0.2)
    config = Gemma2Config(**sizes, **capped, num_hidden_layers=2, head_dim=16, sliding_window=8)
    model, reference = pair_of(Gemma2ForCausalLM(config).to(dtype).eval())
    arguments = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids(2, 6), **arguments, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        want = reference.double()(out.sequences).logits[:, 5:-1]
        config.attn_logit_softcapping = 1e9
        uncapped = Gemma2ForCausalLM(config).double().eval()
        uncapped.load_state_dict(reference.state_dict())
        assert (uncapped(out.sequences).logits[:, 5:-1] - want).norm() > 0.1 * want.norm()
    got = torch.stack(out.logits, 1)
    assert (got - want).norm() <= {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * want.norm()
    for outcome in model.forward.outcomes():
        done = {result.name: result for result in outcome.passes}
        assert len(done["recognize_attention"].rewrites) == len(done["fuse_attention"].rewrites) == 2
        assert not done["recognize_attention"].misses and not done["fuse_attention"].misses


def test_caches_are_kept_from_call_to_call(tiny_llama: Make, interpreted: None) -> None:
    model, reference = pair_of(tiny_llama(vocab_size=100))
    caches = model.generate.caches

    def kept() -> list[int]:
        return [id(cache) for _, cache in caches.kept]

    def assert_same(x: torch.Tensor, new: int) -> None:
        got, want = (m.generate(x, max_new_tokens=new, do_sample=False, pad_token_id=0) for m in (model, reference))
        assert torch.equal(got, want)

    for length, new in ((20, 40), (3, 5), (50, 14)):
        assert_same(ids(1, length), new)
        assert len(kept()) == 1 and caches.kept[0][1].layers[0].max_cache_len == 64
    first = kept()
    assert_same(ids(2, 9), 5)
    assert_same(ids(1, 70), 5)
    assert len(kept()) == 2 and first[0] not in kept()
    # A cache that a caller has is nobody else's.
    out = model.generate(ids(2, 9), max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0)
    assert len(kept()) == 1 and id(out.past_key_values) not in kept()
    found = weakref.ref(caches.kept[0][1])
    model.generate.release()
    assert not kept() and found() is None


def test_a_call_within_a_call_has_a_cache_of_its_own(pair: tuple[Any, Any], interpreted: None) -> None:
    model, reference = pair
    inner, outer = ids(1, 5), ids(1, 5)

    class Asks(BaseStreamer):
        found: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.found.append(model.generate(inner, **CALL))

        def end(self) -> None: ...

    got = model.generate(outer, streamer=Asks(), **CALL)
    assert torch.equal(got, reference.generate(outer, **CALL)) and len(Asks.found) == 6
    assert all(torch.equal(found, reference.generate(inner, **CALL)) for found in Asks.found)
    assert len(model.generate.caches.kept) == 2


def test_without_kept_caches(tiny_llama: Make, interpreted: None) -> None:
    model, reference = pair_of(tiny_llama(), keep_caches=0)
    x = ids(1, 5)
    assert torch.equal(model.generate(x, **CALL), reference.generate(x, **CALL)) and not model.generate.caches.kept


def test_too_long_for_the_stated_length(tiny_llama: Make) -> None:
    model, _ = pair_of(tiny_llama(), fuse_max_seq_len=16)
    with pytest.raises(ConfigError, match="12 prompt and 8 new tokens exceed fuse_max_seq_len=16"):
        model.generate(ids(1, 12), max_new_tokens=8)


@pytest.mark.parametrize("where", ["call", "config", "model"])
def test_stop_strings(tiny_chat: Path, interpreted: None, loops: list[Any], where: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    model, reference = pair_of(LlamaForCausalLM.from_pretrained(tiny_chat).eval())
    x = tokenizer("Hello there", return_tensors="pt").input_ids
    options = dict(max_new_tokens=24, eos_token_id=None, repetition_penalty=1.5)
    text = tokenizer.decode(reference.generate(x, **options)[0, x.shape[1] :])
    stop = [text[5:7], "never"]
    given: dict[str, Any] = {**options, "stop_strings": stop}
    if where == "config":
        given = {"generation_config": GenerationConfig(**given)}
    if where == "model":
        for m in (model, reference):
            m.generation_config.stop_strings = given.pop("stop_strings", stop)
    got, want = (m.generate(x, tokenizer=tokenizer, **given) for m in (model, reference))
    assert torch.equal(got, want) and want.shape[1] < x.shape[1] + 24
    assert len(loops) == 1
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        model.generate(x, **given)


def test_other_ways_to_decode_are_transformers_own(pair: tuple[Any, Any], interpreted: None, loops: list[Any]) -> None:
    model, reference = pair
    x = ids(2, 6)
    for options in (
        dict(num_beams=3),
        dict(num_beams=2, do_sample=True),
        dict(return_dict_in_generate=True, output_hidden_states=True),
    ):
        outs = []
        for m in (model, reference):
            torch.manual_seed(0)
            outs.append(m.generate(x, max_new_tokens=5, pad_token_id=0, **options))
        got, want = (out if isinstance(out, torch.Tensor) else out.sequences for out in outs)
        assert torch.equal(got, want)
    assert len(outs[0].hidden_states) == 5
    repeats = ids(1, 4).repeat(1, 4)
    got, want = (m.generate(repeats, max_new_tokens=5, pad_token_id=0, prompt_lookup_num_tokens=3) for m in pair)
    assert torch.equal(got, want)
    own = model.generate(x, custom_generate=lambda model, input_ids, **_: input_ids + 1, max_new_tokens=5)
    assert torch.equal(own, x + 1)
    assert not loops


def test_arguments_by_place(pair: tuple[Any, Any], interpreted: None, loops: list[Any]) -> None:
    model, reference = pair
    x, config = ids(1, 6), GenerationConfig(max_new_tokens=5, pad_token_id=0)
    want = reference.generate(x, config)
    assert torch.equal(model.generate(x, config), want) and torch.equal(model.generate(inputs=x, **CALL), want)
    assert torch.equal(model.generate(input_ids=x, **CALL), want) and len(loops) == 3
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        model.generate(x, inputs=x)


CALL = dict(max_new_tokens=5, pad_token_id=0)
