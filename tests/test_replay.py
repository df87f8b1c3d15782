"""replay."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import _guards, recordings, replay
from qcompile.replay import KEPT, WARM, Replay
from qcompile.runtime import runner_of


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors were on a GPU."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: 0)


class Recorded:
    """Stands in for a CUDA graph: the same inputs again, but for those that move."""

    made = 0

    def __init__(self, run: Any, args: Any, moving: Any, kept: Any, beside: Any):
        assert beside is None or isinstance(beside, Recorded)
        Recorded.made += 1
        self.run, self.args, self.moving, self.kept, self.form = run, args, moving, kept, None

    def __call__(self, *moving: Tensor) -> Any:
        given = list(self.args)
        for i, value in zip(self.moving, moving, strict=True):
            given[i] = value
        return self.run(*given)


@pytest.fixture
def step(fake: None, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """A program with a weight, a cache that it writes to, and a token."""
    Recorded.made = 0
    monkeypatch.setattr(replay, "Recording", Recorded)

    def run(weight: Tensor, token: Tensor, cache: Tensor) -> list[Tensor]:
        cache.add_(1)
        return [weight * token + cache]

    return Replay(run, [1])


def same(_: Any) -> bool:
    return True


def call(step: Replay, *args: Tensor, form: Any = same) -> Any:
    return step(args, form)


def test_a_call_is_recorded_when_it_has_come_often_enough(step: Replay) -> None:
    weight, cache = torch.tensor([2.0]), torch.zeros(1)
    for index in range(WARM + 4):
        assert call(step, weight, torch.tensor([[float(index)]]), cache)[0].item() == 2 * index + index + 1
        assert Recorded.made == (index >= WARM)


def test_other_memory_and_other_shapes_are_other_recordings(step: Replay) -> None:
    weight, caches = torch.tensor([2.0]), [torch.zeros(1) for _ in range(KEPT + 2)]
    for cache in caches:
        for times in range(WARM + 2):
            before = Recorded.made
            call(step, weight, torch.ones(1, 1), cache)
            # A kind of call that was recorded before needs no more than a second call on its memory.
            assert (Recorded.made > before) == (times == (WARM if cache is caches[0] else 1))
        assert cache.item() == WARM + 2
    assert Recorded.made == KEPT + 2 and len(step.recordings) == KEPT
    for _ in range(WARM + 1):
        assert call(step, weight, torch.ones(2, 1), caches[-1])[0].shape == (2, 1)
    assert Recorded.made == KEPT + 3


def test_memory_read_in_another_way_is_another_recording(step: Replay) -> None:
    weight, cache, token = torch.arange(4.0).view(2, 2), torch.zeros(1), torch.ones(1, 1)
    forms = [_guards.same_form([x, cache]) for x in (weight, weight.t())]
    for _ in range(WARM + 2):
        call(step, weight, token, cache, form=forms[0])
    assert Recorded.made == 1
    assert call(step, weight, token, cache, form=_guards.same_form([weight, cache])) and Recorded.made == 1
    assert torch.equal(call(step, weight.t(), token, cache, form=forms[1])[0], weight.t() + cache)
    assert Recorded.made == 2


def test_strides_over_one_element_make_no_difference(step: Replay) -> None:
    weight, cache, tokens = torch.tensor([2.0]), torch.zeros(1), torch.ones(1, 9)
    for index in range(WARM + 3):
        call(step, weight, tokens[:, : 2 + index][:, -1:], cache)
        call(step, weight, torch.ones(1, 1), cache)
    assert Recorded.made == 1


def test_calls_that_take_turns_are_recorded(step: Replay) -> None:
    weight, cache = torch.tensor([2.0]), torch.zeros(1)
    for index in range(12):
        call(step, weight, torch.ones(1, 1 + index % 2), cache)
    assert Recorded.made == 2


def test_calls_that_never_come_back_are_not_recorded(step: Replay) -> None:
    weight, cache = torch.tensor([2.0]), torch.zeros(1)
    for length in range(1, replay.COUNTED + 9):
        call(step, weight, torch.ones(1, length), cache)
    assert Recorded.made == 0 and len(step.times) == replay.COUNTED


def test_more_kinds_of_calls_than_are_kept_are_not_recorded_in_turns(step: Replay) -> None:
    weight, caches = torch.tensor([2.0]), [torch.zeros(1) for _ in range(KEPT + 1)]
    for _ in range(12):
        for cache in caches:
            call(step, weight, torch.ones(1, 1), cache)
    assert len(step.recordings) == KEPT and Recorded.made < 7 * len(caches)


def test_what_was_released_is_recorded_again(step: Replay) -> None:
    weight, cache, token = torch.tensor([2.0]), torch.zeros(1), torch.ones(1, 1)
    for _ in range(2):
        for _ in range(WARM + 1):
            call(step, weight, token, cache)
        assert len(step.recordings) == 1
        step.release()
        assert not step.recordings
    assert Recorded.made == 2


def test_large_results_are_not_recorded(step: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_BYTES", 16)
    weight, cache = torch.tensor([2.0]), torch.zeros(1)
    for _ in range(WARM + 2):
        call(step, weight, torch.ones(1, 4), cache)
        call(step, weight, torch.ones(1, 5), cache)
    assert [recording.args[1].shape[1] for recording in step.recordings.values()] == [4]


def test_many_tokens_are_not_recorded(step: Replay) -> None:
    for _ in range(WARM + 2):
        call(step, torch.ones(1), torch.ones(1, replay.MOST_TOKENS + 1), torch.ones(1))
    assert Recorded.made == 0


def test_one_token_beside_a_wide_mask_is_recorded(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorded.made = 0
    monkeypatch.setattr(replay, "Recording", Recorded)
    step, cache = Replay(lambda cache, mask, token: [token + mask.sum()], [1, 2]), torch.zeros(1)
    mask = torch.ones(1, replay.MOST_TOKENS + 1, dtype=torch.long)
    for _ in range(WARM + 2):
        call(step, cache, mask, torch.tensor([[1]]))
    assert Recorded.made == 1


def test_what_cannot_be_recorded_runs_and_says_so(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "Recording", refuse)
    step = Replay(lambda x: [x + 1], [0])
    with pytest.warns(UserWarning, match="run without a CUDA graph: operation not permitted"):
        results = [call(step, torch.zeros(1, 1))[0].item() for _ in range(WARM + 3)]
    assert results == [1] * (WARM + 3)


@pytest.mark.cuda
def test_random_numbers_can_be_drawn_after_a_recording_that_failed() -> None:
    with pytest.raises(RuntimeError):
        replay.recorded(lambda: torch.rand(1, device="cuda").item(), torch.cuda.Stream())
    torch.cuda.manual_seed(0)
    want = torch.rand(1, device="cuda")
    torch.cuda.manual_seed(0)
    graph, got = replay.recorded(lambda: torch.rand(1, device="cuda"), torch.cuda.Stream())
    graph.replay()
    assert torch.equal(got, want)
    graph.replay()
    assert not torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("prompts", [1, 2])
def test_generate_on_a_gpu(tiny_llama: Callable[..., nn.Module], prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    record = recordings.Recording
    monkeypatch.setattr(recordings, "Recording", lambda *args: made.append(record(*args)) or made[-1])
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    inputs = torch.randint(2, 90, (prompts, 7), device="cuda")
    mask = torch.ones_like(inputs)
    mask[0, :2] = 0
    want = tiny_llama().cuda().generate(inputs, attention_mask=mask, **options)
    model = qcompile.optimize(tiny_llama().cuda(), progress=False)
    for _ in range(3):
        assert torch.equal(model.generate(inputs, attention_mask=mask, **options), want)
        assert len(made) == 1
    runner = runner_of(model)
    assert runner is not None
    assert any(p.replay and p.replay.recordings for programs in runner.programs.values() for p in programs)
    model.generate.release()
    assert not model.generate.recordings.of
    assert not any(p.replay and p.replay.recordings for programs in runner.programs.values() for p in programs)
    assert torch.equal(model.generate(inputs, attention_mask=mask, **options), want) and len(made) == 2
    plain = qcompile.optimize(tiny_llama().cuda(), cuda_graphs=False, progress=False)
    assert torch.equal(plain.generate(inputs, attention_mask=mask, **options), want) and len(made) == 2


@pytest.mark.cuda
def test_calls_without_a_cache_on_a_gpu(tiny_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of encoders: of two lengths in turns, with new tokens each time."""
    made = []
    record = replay.Recording
    monkeypatch.setattr(replay, "Recording", lambda *args: made.append(record(*args)) or made[-1])
    model = qcompile.optimize(tiny_llama().cuda(), progress=False)
    same = qcompile.optimize(tiny_llama().cuda(), cuda_graphs=False, progress=False)
    with torch.no_grad():
        for _ in range(WARM + 2):
            for length in (9, 12):
                ids = torch.randint(2, 90, (2, length), device="cuda")
                got = model(input_ids=ids, use_cache=False).logits
                assert torch.equal(got, same(input_ids=ids, use_cache=False).logits)
    assert len(made) == 2


@pytest.fixture
def no_graph(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a recording, without its graph."""

    class Graph:
        def capture_begin(self, *_: Any, **__: Any) -> None: ...
        def capture_end(self) -> None: ...
        def replay(self) -> None: ...
        def pool(self) -> None: ...

    stream = type("Stream", (), {"wait_stream": lambda *_: None, "device": None})()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_a_recording_of_inference_mode_serves_others_too(no_graph: None) -> None:
    with torch.inference_mode():
        recording = replay.Recording(lambda x: [x], [torch.zeros(1, 1)], [0], ())
    with torch.no_grad():
        assert recording(torch.ones(1, 1))[0].item() == 1
    with torch.inference_mode():
        assert recording(torch.full((1, 1), 2.0))[0].item() == 2


@pytest.mark.parametrize("x", [torch.zeros(1, 1).expand(3, 2), torch.zeros(3, 9)[:, 2:4], torch.zeros(2, 3).t()])
def test_a_recording_reads_inputs_as_they_lay(x: Tensor, no_graph: None) -> None:
    recording = replay.Recording(lambda x: [x], [x], [0], ())
    assert recording.inputs[0].stride() == x.stride()
    assert torch.equal(recording(x + 1)[0] if x.stride(0) else recording(torch.ones(1, 1).expand(3, 2))[0], x + 1)


def test_only_the_kind_that_failed_is_refused(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Any, args: Any, *others: Any) -> Any:
        if len(args[0]) == 2:
            raise RuntimeError("not this one")
        return Recorded(run, args, *others)

    Recorded.made = 0
    monkeypatch.setattr(replay, "Recording", record)
    step = Replay(lambda x: [x + 1], [0])
    with pytest.warns(UserWarning, match="not this one"):
        for _ in range(WARM + 2):
            call(step, torch.zeros(2, 1))
    for _ in range(WARM + 2):
        call(step, torch.zeros(1, 1))
    assert Recorded.made == 1
