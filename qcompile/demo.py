"""The demo: a small chat model before and after, measured side by side on this machine."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from qcompile import models
from qcompile.api import optimize
from qcompile.chat import Chat
from qcompile.evaluate import Speed, document_tokens, perplexity, throughput, throughputs
from qcompile.explain import size
from qcompile.runtime import runner_of

# After this no new round of measuring begins in the quick version.
QUICK_SECONDS = 20.0
EMBEDDINGS = "u8/g64/asym"
QUESTION = "What is the capital of France?"
TEXT = Path(__file__).with_name("demo.txt")

Write = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of the table: bytes of all parameters, seconds to quantize and compile, and what was measured."""

    name: str
    bytes: int
    perplexity: float
    prepare: float = 0.0
    speed: Speed | None = None


@dataclass(frozen=True)
class Demo:
    """What to compare: the model in float, in `bits` bits each, and with `compiled` in float through torch.compile.

    `text` is what the perplexity is measured on: its documents, at most `windows` windows of `window` tokens; without
    windows, all its tokens in one. It depends on the weights only, so with `quick` the quantized model runs uncompiled
    for it, which saves compiling a program for this one call.
    """

    source: models.Source
    bits: Sequence[int] = (4,)
    compiled: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    text: str | None = None
    window: int = 512
    windows: int | None = None
    prompt: int = 128
    new: int = 32
    rounds: int = 3
    quick: bool = True

    def run(self, write: Write) -> tuple[list[Row], Chat]:
        """Load, quantize, compile and measure; tells `write` what is going on. Returns the rows, and a chat with the
        model of 4 bits, or of the most bits."""
        with _step(write, "load the model"):
            model = models.load(self.source, self.dtype, self.device)
            tokenizer = models.load_tokenizer(self.source)
        tokens = document_tokens(self.text or TEXT.read_text("utf-8"), tokenizer)
        window, windows = (self.window, self.windows) if self.windows else (len(tokens) - 1, 1)
        name = str(model.dtype).removeprefix("torch.")
        with _step(write, f"{name}, eager: perplexity of {window * windows} tokens"):
            base = perplexity(model, tokens, window, windows)
        rows = [Row(f"{name}, eager", _bytes(model), base)]
        contenders: dict[str, nn.Module] = {rows[0].name: model}
        if self.compiled:
            rows.append(replace(rows[0], name=f"{name}, torch.compile"))
            contenders[rows[-1].name] = compiled = _compiled(model)
            with _step(write, f"{rows[-1].name}: compile") as compiling:
                self._warm_up(compiled)
            rows[-1] = replace(rows[-1], prepare=compiling())
        for bits in self.bits:
            spec = f"u{bits}/g64/asym"
            quantized = copy.deepcopy(model)
            with _step(write, f"qcompile {spec}: quantize with HQQ") as quantizing:
                optimize(quantized, spec, specs=_embeddings(model), progress=False)
            with _step(write, f"qcompile {spec}: compile") as compiling:
                self._warm_up(quantized)
            with _step(write, f"qcompile {spec}: perplexity"):
                found = perplexity(_Uncompiled(quantized) if self.quick else quantized, tokens, window, windows)
            rows.append(Row(f"qcompile {spec}", _bytes(quantized), found, quantizing() + compiling()))
            contenders[rows[-1].name] = quantized
        gc.collect()
        with _step(write, f"speed, side by side, {'up to ' if self.quick else ''}{self.rounds} rounds"):
            seconds = QUICK_SECONDS if self.quick else math.inf
            speeds = throughputs(contenders, self.prompt, self.new, self.rounds, warm_up=False, seconds=seconds)
        rows = [replace(row, speed=speeds[row.name]) for row in rows]
        speaks = 4 if 4 in self.bits else max(self.bits)
        return rows, Chat(contenders[f"qcompile u{speaks}/g64/asym"], tokenizer, write=write)

    def _warm_up(self, model: nn.Module) -> None:
        # As many tokens as are measured later: torch.compile makes a program for each length of a static cache.
        throughput(model, self.prompt, self.new, rounds=1, warm_up=False)


def table(rows: Sequence[Row], style: str = "simple") -> str:
    """The rows as text; factors are against the first one."""
    first = rows[0].speed
    assert first is not None
    lines = []
    for row in rows:
        assert row.speed is not None
        decode, prefill = row.speed.decode, row.speed.prefill
        lines.append(
            [
                row.name,
                size(row.bytes),
                f"{decode:.1f} ({decode / first.decode:.2f}x)",
                f"{prefill:.0f} ({prefill / first.prefill:.2f}x)",
                f"{row.perplexity:.2f}",
                f"{row.prepare:.0f} s" if row.prepare else "",
            ]
        )
    headers = ["model", "parameters", "decode tokens/s", "prefill tokens/s", "perplexity", "made in"]
    align = ("left", "right", "right", "right", "right", "right")
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def converse(chat: Chat, write: Write, read: Callable[[str], str]) -> None:
    """Ask and answer until the user says exit, or the input ends."""
    write("Type a message; an empty line or Ctrl-D ends the chat.\n")
    while True:
        try:
            prompt = read("> ").strip()
        except EOFError:
            write("\n")
            return
        if not prompt:
            return
        chat.reply(prompt)
        write("\n")


def _embeddings(model: Any) -> dict[str, str]:
    """A rule for the token table and the output layer, which are half of a small model and kept dense by default."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: EMBEDDINGS for name, module in model.named_modules() if any(module is table for table in tables)}


class _Uncompiled(nn.Module):
    """An optimized model's own forward, on its quantized weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        runner = runner_of(model)
        self.run = model if runner is None else runner.original

    def forward(self, **inputs: Any) -> Any:
        return self.run(**inputs)


def _bytes(model: nn.Module) -> int:
    """Bytes of all parameters, packed or not."""
    if (runner := runner_of(model)) is not None:
        return runner.plan.after
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _compiled(model: nn.Module) -> nn.Module:
    """A copy whose forward goes through torch.compile, over the static cache that it needs to be fast."""
    twin: Any = copy.deepcopy(model)
    twin.forward = torch.compile(twin.forward)
    twin.generation_config.cache_implementation = "static"
    return twin


@contextlib.contextmanager
def _step(write: Write, title: str) -> Iterator[Callable[[], float]]:
    """Tells what is going on and then how long it took; yields the seconds, to be asked afterwards."""
    write(f"{title + ' ':.<58} ")
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: end[0]
        end.append(time.perf_counter() - start)
        write(f"{end[0]:6.1f} s\n")
    except BaseException:
        write("\n")
        raise
