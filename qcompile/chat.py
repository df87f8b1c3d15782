"""A conversation with a model, streamed as it is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Reply:
    """What the model said, and how many tokens in how many seconds that took, prompt included."""

    text: str
    tokens: int
    seconds: float


@dataclass
class Chat:
    """Keeps the turns of a conversation. `write` hears the reply piece by piece.

    Prompts go through the tokenizer's chat template if it has one and `raw` is False; otherwise every prompt is simply
    continued and nothing is kept. Greedy unless `temperature` is above 0.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    raw: bool = False
    write: Callable[[str], None] = lambda text: None
    turns: list[dict[str, str]] = field(default_factory=list)

    def reply(self, prompt: str) -> Reply:
        """The model's answer to `prompt`, or its continuation."""
        inputs = self._inputs(prompt).to(self.model.device)
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        start = time.perf_counter()
        with torch.no_grad():
            tokens = self.model.generate(
                **inputs,
                **sampling,
                max_new_tokens=self.max_new_tokens,
                streamer=_streamer(self.tokenizer, self.write),
                pad_token_id=self._padding(),
            )
        seconds = time.perf_counter() - start
        new = tokens[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        if self.templated:
            self.turns.append({"role": "assistant", "content": text})
        return Reply(text, len(new), seconds)

    @property
    def templated(self) -> bool:
        return not self.raw and bool(getattr(self.tokenizer, "chat_template", None))

    def _inputs(self, prompt: str) -> Any:
        if not self.templated:
            return self.tokenizer(prompt, return_tensors="pt")
        self.turns.append({"role": "user", "content": prompt})
        return self.tokenizer.apply_chat_template(
            self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def _padding(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        return 0


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
