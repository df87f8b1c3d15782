"""The demo's table in full: size, speed and perplexity of a chat model in float, compiled, and in 8, 4, 3 and 2 bits.

    python -m benchmarks.demo [--text FILE] [--model MODEL] [--bits 8 4 3 2]

Without a text, perplexity is measured on the demo's own page of prose.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.record import device_slug, record
from qcompile import demo, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=f"default: {models.DEMO_MODEL}, from the package {models.DEMO_PACKAGE} or the hub"
    )
    parser.add_argument("--text", type=Path, help="documents separated by blank lines")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=models.best_device())
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=20, help="windows of 512 tokens of the text")
    options = parser.parse_args()

    source = models.find(options.model) if options.model else models.find_demo()
    run = demo.Demo(
        source, options.bits, True, options.dtype, options.device,
        text=options.text and options.text.read_text("utf-8"), windows=options.windows if options.text else None,
        prompt=options.prompt, new=options.new, rounds=options.rounds, quick=False,
    )  # fmt: skip
    rows, chat = run.run(write)
    write(f"\n{demo.table(rows)}\n\n> {demo.QUESTION}\n")
    reply = chat.reply(demo.QUESTION)
    text = f"{options.windows} windows of 512 tokens of {options.text.name}" if options.text else "the demo's own text"
    name = source.gguf or (Path(source.place).name if source.local else source.place)
    notes = (
        f"Model: {name}. Batch 1, prompt of {run.prompt} tokens, {run.new} new ones; medians of "
        f"{run.rounds} rounds in which the models take turns. Perplexity on {text}. `made in` is the time to quantize "
        f"and to compile generation. Token embeddings are {demo.EMBEDDINGS} in all of qcompile's rows."
    )
    asked = f"The 4-bit model on “{demo.QUESTION}”: {reply.text}"
    file = "demo-" + device_slug(options.device)
    print(record(file, "The demo in full", f"{notes}\n\n{demo.table(rows, 'github')}\n\n{asked}", options.device))


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
