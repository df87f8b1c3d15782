"""Calls of a compiled program on a GPU as replays of a CUDA graph: one launch instead of hundreds.

A step of decoding is some two hundred small kernels, which Python launches more slowly than the GPU runs them, and a
prompt of some hundred tokens is no different. A call that has come before with the same memory (weights and caches stay
where they are while a text grows) and the same shapes is recorded once and replayed from then on.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

# Calls of one kind that run as they are before one is recorded: lazy set-up and tuning are over then.
WARM = 2
# More tokens keep the GPU busier than Python takes to launch. NOTE: a layer of Llama-3-8B's shape, u4/g64, H100, 128
# tokens: 1.7 ms by Python, 0.24 by a recording; 2048 tokens: 4.4 and 1.8.
MOST_TOKENS = 4096
# Larger results would take more memory, and a copy of it at each call, than is saved in time.
MOST_BYTES = 64 << 20
# Recordings of a program that are kept: of as many caches, batch sizes or lengths of prompts.
KEPT = 32
# Kinds of calls that are counted until they have come often enough.
COUNTED = 64

Run = Callable[..., Sequence[Any]]
Form = Callable[[Sequence[Tensor]], bool]
T = TypeVar("T")


class Replay:
    """Runs `run`, or a recording of it. It has the same inputs: those at `moving` may lie anywhere at each call, the
    others are expected to stay where they are."""

    def __init__(self, run: Run, moving: Collection[int]):
        self.run = run
        self.moving = tuple(sorted(moving))
        self.recordings: OrderedDict[tuple[Hashable, ...], Recording] = OrderedDict()
        self.times: OrderedDict[Hashable, int] = OrderedDict()
        self.refused: set[Hashable] = set()
        self.lock = threading.Lock()

    def __call__(self, args: Sequence[Tensor], form: Form) -> Sequence[Any]:
        """`form` is the one of the last call where those of `args` that stay look as they did then."""
        if not self._pays(args):
            return self.run(*args)
        kept = list(args)
        for i in reversed(self.moving):
            del kept[i]
        key = self._key(args, kept)
        with self.lock:
            recording = self.recordings.get(key)
            if recording is None or (recording.form is not form and recording.kept != looks(kept)):
                recording = self._record(key, args, kept)
            if recording is not None:
                recording.form = form
                self.recordings.move_to_end(key)
                return recording(*(args[i] for i in self.moving))
        outputs = self.run(*args)
        if sum(output.nbytes for output in outputs if isinstance(output, Tensor)) <= MOST_BYTES:
            self._count(key)
        return outputs

    def release(self) -> None:
        """Give up the recordings and their memory. Calls that come back are recorded again."""
        with self.lock:
            self.recordings.clear()

    def _count(self, key: Hashable) -> None:
        with self.lock:
            self.times[key] = self.times.pop(key, 0) + 1
            while len(self.times) > COUNTED:
                self.times.popitem(last=False)

    def _pays(self, args: Sequence[Tensor]) -> bool:
        moving = [args[i] for i in self.moving]
        if not moving or not all(x.is_cuda for x in moving) or torch.cuda.is_current_stream_capturing():
            return False
        # The tokens are among the integers; a mask may be as wide as the cache is long.
        tokens = [x.shape.numel() for x in moving if x.dim() == 2 and not x.is_floating_point()]
        return min(tokens, default=moving[0].shape[:2].numel()) <= MOST_TOKENS

    def _key(self, args: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Hashable, ...]:
        given = tuple((args[i].shape, strides(args[i])) for i in self.moving)
        return torch.cuda.current_stream(args[self.moving[0]].device), given, tuple(map(Tensor.data_ptr, kept))

    def _record(self, key: tuple[Hashable, ...], args: Sequence[Tensor], kept: Sequence[Tensor]) -> Recording | None:
        """A recording of this call, not yet run; None until it has come often enough, or if it cannot be recorded."""
        # On other memory the same kind of call is warm already: it has only to come twice.
        warm = 1 if any(other[:2] == key[:2] for other in self.recordings) else WARM
        if self.times.get(key, 0) < warm or key[:2] in self.refused:
            return None
        try:
            beside = next((found for (stream, *_), found in self.recordings.items() if stream == key[0]), None)
            recording = Recording(self.run, args, self.moving, looks(kept), beside)
        except Exception as error:  # whatever a kernel may not do while it is recorded
            warnings.warn(f"qcompile: calls like this one run without a CUDA graph: {error}", stacklevel=5)
            self.refused.add(key[:2])
            return None
        self.recordings[key] = recording
        while len(self.recordings) > KEPT:
            dropped, _ = self.recordings.popitem(last=False)
            self.times.pop(dropped, None)
        return recording


def strides(x: Tensor) -> tuple[int, ...]:
    """Those that say where elements lie: over a single element any stride is the same."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1)


def looks(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What memory at one place can be read as."""
    return tuple((x.dtype, x.shape, x.stride()) for x in tensors)


def _once(x: Tensor) -> Tensor:
    """`x` without what is repeated along expanded dimensions."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


class Recording:
    """A CUDA graph of one call. It refers to memory, not to tensors: who replays it has them still; `kept` is what they
    looked like, and `form` holds for those of the last call.

    It shares its own memory with the recording `beside` it, of the same stream: they run one after the other, and
    nothing that one leaves there is read after the other began. What it returns is new memory each time.
    """

    def __init__(
        self,
        run: Run,
        args: Sequence[Tensor],
        moving: Sequence[int],
        kept: tuple[Hashable, ...],
        beside: Recording | None = None,
    ):
        self.kept = kept
        self.form: Form | None = None
        with torch.inference_mode(False):  # else no call outside of that mode could write to them
            given = [args[i] for i in moving]
            self.inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in given]
            for buffer, value in zip(self.inputs, given, strict=True):
                _once(buffer).copy_(_once(value))
        given = list(args)
        for i, buffer in zip(moving, self.inputs, strict=True):
            given[i] = buffer
        device = self.inputs[0].device
        # What libraries keep for a stream, such as cuBLAS its workspace, is made once for recordings that take turns.
        self.side = beside.side if beside else torch.cuda.Stream(device)
        # A pool is gone with the last graph in it, so it is asked of one that lives.
        pool = beside.graph.pool() if beside else None
        self.graph, outputs = recorded(lambda: run(*given), self.side, pool)
        self.outputs = list(outputs)

    def __call__(self, *moving: Tensor) -> list[Any]:
        for buffer, value in zip(self.inputs, moving, strict=True):
            _once(buffer).copy_(_once(value))
        self.graph.replay()
        return [output.clone() if isinstance(output, Tensor) else output for output in self.outputs]


def recorded(run: Callable[[], T], side: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """`run`, not run but recorded on the stream `side`, and where each replay leaves what it returns."""
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side), torch.no_grad():
        try:
            graph, result = _captured(run, pool or torch.cuda.graph_pool_handle())
        except Exception:
            # Until a capture ends well, the random generator takes itself for captured and refuses to draw.
            _captured(lambda: torch.zeros(1, device=side.device), torch.cuda.graph_pool_handle())
            raise
    current.wait_stream(side)
    return graph, result


def _captured(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        result = run()
    except Exception:
        with contextlib.suppress(RuntimeError):  # it would say that the capture failed, and not why
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, result
