"""decode: token by token what transformers' own loop gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import qcompile
from qcompile import decode, recordings
from qcompile.decode import Ended
from qcompile.errors import ConfigError


@pytest.fixture(scope="module")
def pair(twins: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    return twins()


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The loops that ran here, by how they ended; a test that uses it fails if transformers' loop ran instead."""
    made: list[Any] = []

    class Counted(Ended):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(decode, "Ended", Counted)
    return made


class Graph:
    """Stands in for a CUDA graph."""

    made = 0

    def __init__(self, run: Any, results: list[Any]):
        Graph.made += 1
        self.run, self.results = run, results

    def replay(self) -> None:
        self.results[:] = self.run()


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop looks at flags a step late and runs recordings, as if tensors were on a GPU."""

    class Stream:
        device = None

        def __init__(self, *_: Any): ...
        def wait_stream(self, other: Any) -> None: ...

    class Event:
        def __init__(self, blocking: bool): ...
        def record(self, stream: Any) -> None: ...
        def synchronize(self) -> None: ...

    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: self.dtype == torch.long))
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def recorded(run: Any, side: Any) -> tuple[Graph, list[Any]]:
        graph = Graph(run, [])
        return graph, graph.results

    Graph.made = 0
    monkeypatch.setattr(recordings, "recorded", recorded)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # no calls of the model are recorded
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended and value.device.type == "cpu"
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def prompts(batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Prompts of which the first is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, 100, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    if batch > 1:
        mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def both(pair: tuple[Any, Any], given: dict[str, Any], **options: Any) -> list[Any]:
    """What each of the two generates, from the same seed on, and the next random number."""
    outs = []
    for model in pair:
        torch.manual_seed(3)
        streamer = Collected()
        options = {"max_new_tokens": 12, "pad_token_id": 0, **options}
        out = model.generate(**given, streamer=streamer, **copy.deepcopy(options))
        drawn = torch.rand(1, device=given["input_ids"].device).item()
        outs.append((out, streamer.seen, streamer.ended, drawn))
    return outs


def assert_same(pair: tuple[Any, Any], given: dict[str, Any], **options: Any) -> Tensor:
    ours, theirs = both(pair, given, **options)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]
    return ours[0]


CASES = {
    "greedy": {},
    "until eos": dict(eos_token_id=range(20)),
    "until eos, of 32 bits": dict(eos_token_id=torch.arange(20).int(), pad_token_id=torch.tensor(7).int()),
    "no sooner than": dict(eos_token_id=range(20), min_new_tokens=5),
    "sampling": dict(do_sample=True),
    "until eos, sampling": dict(do_sample=True, eos_token_id=range(20)),
    "temperature, top k, top p": dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.8),
    "min p, typical": dict(do_sample=True, min_p=0.01, typical_p=0.9, top_k=0),
    "cut-offs": dict(do_sample=True, epsilon_cutoff=1e-3, eta_cutoff=1e-3, renormalize_logits=True),
    "repetition": dict(repetition_penalty=1.4, no_repeat_ngram_size=2, bad_words_ids=[[5], [9, 11]]),
    "forced": dict(suppress_tokens=list(range(50)), forced_eos_token_id=60, eos_token_id=60, min_length=9),
    "bias, decay": dict(sequence_bias={(8,): 3.0}, exponential_decay_length_penalty=(3, 1.5), eos_token_id=8),
    "many of one": dict(do_sample=True, num_return_sequences=3),
    "max_length": dict(max_new_tokens=None, max_length=11),
    "one token": dict(max_new_tokens=1),
    "no time": dict(max_time=0.0),
    "dynamic cache": dict(cache_implementation="dynamic"),
    "chunks": dict(prefill_chunk_size=3),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(pair: tuple[Any, Any], looped: list[Any], name: str) -> None:
    options = {key: list(value) if isinstance(value, range) else value for key, value in CASES[name].items()}
    assert_same(pair, prompts(), **options)
    assert len(looped) == 1 and not looped[0].reads
    if "eos" in name:
        assert_same(pair, prompts(1), **options)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dynamic cache", "no time")])
def test_a_step_late_on_a_gpu(pair: tuple[Any, Any], looped: list[Any], as_on_gpu: None, name: str) -> None:
    options = {key: list(value) if isinstance(value, range) else value for key, value in CASES[name].items()}
    outs = [assert_same(pair, prompts(batch), **options) for batch in (3, 1)]
    assert len(looped) == 2 and all(ended.reads for ended in looped)
    for ended, out in zip(looped, outs, strict=True):
        assert ended.surplus == (out.shape[1] < 19 and name != "max_length" and name != "one token")


@pytest.mark.parametrize("late", [False, True])
def test_what_is_returned_beside_tokens(pair: tuple[Any, Any], late: bool, request: pytest.FixtureRequest) -> None:
    if late:
        request.getfixturevalue("as_on_gpu")
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, eos_token_id=[*range(20)])
    (ours, *_), (theirs, *_) = both(pair, prompts(), do_sample=True, top_k=9, **options)
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    assert torch.equal(ours.sequences, theirs.sequences) and ours.sequences.shape[1] < 19
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    length = theirs.past_key_values.get_seq_length()
    for mine, layer in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert mine.cumulative_length == length
        torch.testing.assert_close(mine.keys[:, :, :length], layer.keys, rtol=1e-4, atol=1e-5)
    only = pair[0].generate(**prompts(), max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    assert only.scores is None and only.logits is None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_conversation_goes_on(
    pair: tuple[Any, Any], kind: str, late: bool, request: pytest.FixtureRequest, looped: list[Any]
) -> None:
    """A second call with the cache of the first and all tokens so far, the padding's mask longer than before."""
    if late:
        request.getfixturevalue("as_on_gpu")
    results = []
    for model in pair:
        cache = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache()
        given = prompts()
        for _ in range(2):
            out = model.generate(
                **given, past_key_values=cache, max_new_tokens=8, eos_token_id=[*range(20)], pad_token_id=0
            )
            results.append(out)
            ones = torch.ones((3, out.shape[1] - given["input_ids"].shape[1] + 2), dtype=torch.long)
            given = {
                "input_ids": torch.cat([out, torch.full((3, 2), 50)], 1),
                "attention_mask": torch.cat([given["attention_mask"], ones], 1),
            }
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert [bool(ended.reads) for ended in looped] == [late and kind == "static"] * 2


def test_own_code_sees_every_step_once(pair: tuple[Any, Any], as_on_gpu: None) -> None:
    seen: list[Any] = []

    class Odd(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids.tolist())
            return scores.index_fill(1, torch.arange(0, 100, 2), -torch.inf)

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        seen.append(input_ids[:, -1].tolist())
        return input_ids[:, -1] < 30

    out = assert_same(pair, prompts(), logits_processor=[Odd()], stopping_criteria=[stop], eos_token_id=99)
    assert (out[:, 7:] % 2 == 1).logical_or(out[:, 7:] == 0).all()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    only = dict(prefix_allowed_tokens_fn=lambda row, ids: seen.append(ids.tolist()) or [3, 4])
    seen.clear()
    assert_same(pair, prompts(), **only)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_steps_keep_their_shapes(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = pair[0], []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append({name: x.shape for name, x in kwargs.items() if isinstance(x, Tensor)})

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**prompts(), max_new_tokens=6, pad_token_id=0)
    assert shapes[1:] == [{"input_ids": (3, 1), "position_ids": (3, 1), "attention_mask": (3, 64)}] * 5
    shapes.clear()
    model.generate(**prompts(1), max_new_tokens=6, pad_token_id=0)
    hook.remove()
    assert shapes[1:] == [{"input_ids": (1, 1), "position_ids": (1, 1)}] * 5


def test_a_cache_that_is_too_short_is_an_error_at_once(pair: tuple[Any, Any]) -> None:
    model, streamer = pair[0], Collected()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ConfigError, match="room for 16 tokens, a prompt of 7 and 11 new ones need 17; make it longer"):
        model.generate(**prompts(), past_key_values=cache, max_new_tokens=11, pad_token_id=0)
    assert cache.get_seq_length() == 0
    out = model.generate(**prompts(), past_key_values=cache, max_new_tokens=10, pad_token_id=0, streamer=streamer)
    assert out.shape == (3, 17) and len(streamer.seen) == 11


def test_other_models_steps_run_in_transformers_loop(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, looped: list[Any]
) -> None:
    model, reference = pair
    want = reference.generate(**prompts(), max_new_tokens=6, pad_token_id=0)
    prepare = LlamaForCausalLM.prepare_inputs_for_generation
    monkeypatch.setattr(
        LlamaForCausalLM, "prepare_inputs_for_generation", lambda *args, **kwargs: prepare(*args, **kwargs)
    )
    streamer = Collected()
    with pytest.warns(UserWarning, match="transformers' own loop: LlamaForCausalLM has a prepare_inputs_for_gen"):
        got = model.generate(**prompts(), max_new_tokens=6, pad_token_id=0, streamer=streamer)
    assert torch.equal(got, want) and not looped and len(streamer.seen) == 7 and streamer.ended == 1
    monkeypatch.undo()
    plain = dict(max_new_tokens=4, pad_token_id=0, use_cache=False)
    assert torch.equal(model.generate(**prompts(), **plain), reference.generate(**prompts(), **plain))
    with pytest.warns(UserWarning, match="own loop: the argument inputs_embeds"):
        embeds = reference.model.embed_tokens(prompts()["input_ids"])
        given = dict(inputs_embeds=embeds, attention_mask=prompts()["attention_mask"], max_new_tokens=4, pad_token_id=0)
        assert torch.equal(model.generate(**given), reference.generate(**given))


def test_recordings_serve_other_texts(pair: tuple[Any, Any], as_on_gpu: None) -> None:
    pair[0].generate.release()
    ways = (
        {},
        dict(do_sample=True, top_k=9, temperature=0.7, top_p=0.8, eos_token_id=[*range(20)]),
        dict(repetition_penalty=1.3, min_new_tokens=5, eos_token_id=[*range(20)]),
    )
    for count, options in enumerate(ways, 1):
        for length, end in ((7, 19), (5, 11), (9, 3)):
            given = prompts(3, length)
            if "eos_token_id" in options:
                options = {**options, "eos_token_id": [end, *range(19)]}
            assert_same(pair, given, **options)
            assert Graph.made == count
    assert_same(pair, prompts(), do_sample=True, temperature=0.6)
    assert Graph.made == 4
    # What cannot be recorded runs as before: here the next token depends on the text.
    assert_same(pair, prompts(), no_repeat_ngram_size=2)
    assert Graph.made == 4


def test_a_recording_is_of_a_cache_and_of_weights(tiny_llama: Any, interpreted: None, as_on_gpu: None) -> None:
    reference: Any = tiny_llama()
    model = qcompile.optimize(copy.deepcopy(reference), "u4/g32/asym", progress=False)
    reference.load_state_dict(qcompile.dequantize(model))
    cache = StaticCache(config=model.config, max_cache_len=40)
    options = dict(past_key_values=cache, return_dict_in_generate=True, output_logits=True, output_scores=True)

    def assert_close() -> None:
        outs = []
        for twin in (model, reference):
            outs.append(twin.generate(**prompts(), max_new_tokens=8, pad_token_id=0, **options))
            cache.reset()
        for name in ("sequences", "logits", "scores"):
            torch.testing.assert_close(*(torch.stack([*out[name]]) for out in outs), rtol=1e-4, atol=1e-5)

    for _ in range(2):
        assert_same((model, reference), prompts())
        assert Graph.made == 1
    for _ in range(2):
        assert_close()
        assert Graph.made == 2
    for twin in (model, reference):
        twin.model.norm.weight.data = torch.linspace(0.5, 2, 64)
    for _ in range(2):
        assert_close()
        assert Graph.made == 3
    assert len(model.generate.recordings.of) == 2
    for layer in cache.layers:
        layer.keys = layer.keys.clone()
    assert_close()
    assert Graph.made == 4


def test_what_cannot_be_recorded_runs_and_says_so_once(
    pair: tuple[Any, Any], as_on_gpu: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recordings, "recorded", refuse)
    pair[0].generate.release()
    for _ in range(2):
        assert_same(pair, prompts(), do_sample=True, temperature=0.9)
    told = [str(warning.message) for warning in recwarn if "CUDA graph" in str(warning.message)]
    assert told == ["qcompile: decoding runs without a CUDA graph: operation not permitted when stream is capturing"]


@pytest.fixture
def on_gpu() -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    reference: Any = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).eval().cuda()
    return qcompile.optimize(copy.deepcopy(reference), progress=False), reference


@pytest.mark.cuda
def test_on_a_gpu(on_gpu: tuple[Any, Any], looped: list[Any]) -> None:
    for name, case in CASES.items():
        options = {key: list(value) if isinstance(value, range) else value for key, value in case.items()}
        for batch in (3, 1, 3):
            given = {key: value.cuda() for key, value in prompts(batch).items()}
            assert_same(on_gpu, given, **options)
            assert bool(looped[-1].reads) == (name != "dynamic cache"), name


@pytest.mark.cuda
def test_nobody_waits_for_the_gpu(on_gpu: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the tenth token to the thirtieth, no operation makes the host wait but the look at the step before."""

    class Watched(Ended):
        count = 0

        def __call__(self, *args: Any) -> bool:
            Watched.count += 1
            torch.cuda.set_sync_debug_mode("error" if 10 <= Watched.count < 30 else "default")
            return super().__call__(*args)

    monkeypatch.setattr(decode, "Ended", Watched)
    model = on_gpu[0]
    given = {key: value.cuda() for key, value in prompts().items()}
    for options in ({}, dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.8)):
        Watched.count = 0
        try:
            out = model.generate(
                **given, max_new_tokens=40, min_new_tokens=40, eos_token_id=5, pad_token_id=0, **options
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert out.shape == (3, 47) and Watched.count == 40
