"""Steps of decoding as CUDA graphs: the model's call, the choice of a token and its way into the text are one launch.

A recording belongs to a static cache, whose memory it reads and writes, and is there for the next text on that cache.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qcompile.again import Bound
from qcompile.decode_state import State
from qcompile.replay import WARM, looks, recorded

# Recordings of one cache: of as many ways to choose a token.
KEPT = 4
Scores = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recording:
    """A CUDA graph that reads and writes the memory of `state`, and where it leaves logits and scores."""

    key: tuple[Hashable, ...]
    state: State
    graph: torch.cuda.CUDAGraph
    scores: Scores

    def __call__(self) -> Scores:
        self.graph.replay()
        return self.scores


class Recordings:
    """The recordings of a model's steps, by cache; they go with their cache."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[Any, list[Recording]] = WeakKeyDictionary()
        self.sides: dict[torch.device, torch.cuda.Stream] = {}
        self.refused: set[Hashable] = set()
        self.lock = threading.Lock()

    def key(self, bound: Bound, state: State, choice: Hashable) -> tuple[Hashable, ...]:
        """What must be equal for a recording to serve: operations, and the memory of weights and cache."""
        moved = {id(x) for x in vars(state).values()}
        stay = [x for x in (*bound[1], *bound[2]) if id(x) not in moved]
        return bound[0].run, tuple(x.data_ptr() for x in stay), looks(stay), state.form, choice

    def find(self, cache: Any, key: Hashable) -> Recording | None:
        with self.lock:
            return next((recording for recording in self.of.get(cache, ()) if recording.key == key), None)

    def warmth(self, cache: Any, key: tuple[Hashable, ...]) -> int:
        """How many steps run before one on this cache is recorded: lazy set-up and tuning are over then."""
        return 0 if any(recording.key[0] is key[0] for recording in self.of.get(cache, ())) else WARM

    def refuses(self, key: tuple[Hashable, ...]) -> bool:
        """Whether a step like this could not be recorded before."""
        return (key[0], key[-1]) in self.refused

    def make(self, cache: Any, key: tuple[Hashable, ...], state: State, step: Callable[[], Scores]) -> Recording | None:
        """A recording of `step`, not yet run; None, with a warning, if it cannot be recorded."""
        device = state.text.device
        with self.lock:
            try:
                if device not in self.sides:
                    self.sides[device] = torch.cuda.Stream(device)
                recording = Recording(key, state, *recorded(step, self.sides[device]))
            except Exception as error:  # whatever a kernel may not do while it is recorded
                warnings.warn(f"qcompile: decoding runs without a CUDA graph: {error}", stacklevel=4)
                self.refused.add((key[0], key[-1]))
                return None
            kept = [recording, *self.of.get(cache, ())]
            self.of[cache] = kept[:KEPT]
        return recording
