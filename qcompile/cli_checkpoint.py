"""The command line's part for checkpoints: `inspect`, `convert`, and opening what the other commands are given."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from qcompile import formats, models, writers
from qcompile.errors import CheckpointError
from qcompile.explain import size, without_numbers
from qcompile.files.checkpoint import open_checkpoint
from qcompile.inspect_checkpoint import inspect_checkpoint
from qcompile.load import load
from qcompile.models import Source
from qcompile.save import save

# What belongs to a tokenizer or a processor, beside the weights.
BESIDE = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.*", "preprocessor_config.json", "processor_config.json"),
)


def is_packed(source: Source) -> bool:
    """Whether these weights are quantized, so that they run as they are."""
    if not source.local:
        return models.quant_method(source) is not None
    try:
        checkpoint = open_checkpoint(Path(source.place) / source.gguf if source.gguf else Path(source.place))
        if source.gguf:
            return any(info.blocks for info in checkpoint.tensors.values())
        return formats.find(checkpoint) is not None
    except CheckpointError:  # load() says so better
        return source.gguf is not None or models.quant_method(source) is not None


def open_model(options: argparse.Namespace, packed: bool) -> nn.Module:
    """The model that a command is given: packed as its checkpoint stores it, or float."""
    if packed:
        return load(options.model, options.device, options.dtype, progress=sys.stderr.isatty())
    return models.load(models.find(options.model), options.dtype, options.device)


def inspect(options: argparse.Namespace) -> int:
    found = inspect_checkpoint(options.path)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)
    return 0


def convert(options: argparse.Namespace) -> int:
    source, target = models.find(options.source), Path(options.target)
    progress = sys.stderr.isatty()
    model = load(options.source, dtype="stored", progress=progress)
    in_a_file = writers.find(options.to).in_a_file
    tokenizer = models.load_tokenizer(source) if source.gguf and not in_a_file and _has_tokenizer(source) else None
    errors = save(model, target, options.to, options.requantize, tokenizer, progress=progress)
    if not in_a_file and not source.gguf:
        _copy_beside(models.fetch(source), target)
    print(_account(errors, target))
    return 0


def _account(errors: dict[str, float], target: Path) -> str:
    total = size(sum(file.stat().st_size for file in target.iterdir() if file.is_file()))
    if not errors:
        return f"{target}: {total}; every weight is the same number"
    worst: dict[str, tuple[int, float]] = {}
    for path, error in errors.items():
        times, most = worst.get(without_numbers(path), (0, 0.0))
        worst[without_numbers(path)] = (times + 1, max(most, error))
    rows = [[path, times, f"{most:.2%}"] for path, (times, most) in worst.items()]
    return f"{target}: {total}\n\n" + tabulate(rows, headers=["quantized again, or made dense", "times", "off by"])


def _has_tokenizer(source: Source) -> bool:
    return "tokenizer.ggml.model" in open_checkpoint(Path(source.place) / str(source.gguf)).metadata


def _copy_beside(folder: Path, target: Path) -> None:
    for pattern in BESIDE:
        for file in folder.glob(pattern):
            if file.is_file() and folder.resolve() != target.resolve():
                shutil.copy2(file, target / file.name)


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "inspect":
        parser.add_argument("path", metavar="PATH", help="a folder or a .gguf file")
        parser.add_argument("--json", action="store_true", help="print JSON")
        return
    known = [writer.name for writer in writers.WRITERS]
    parser.add_argument("source", metavar="SRC", help="a quantized checkpoint: a folder, a .gguf file or a hub id")
    parser.add_argument("target", metavar="DST", help="the folder to write; its other files stay")
    parser.add_argument("--to", required=True, choices=known, metavar="FORMAT", help=", ".join(known))
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize again what the format cannot hold exactly; without this it is an error",
    )


EXAMPLES: dict[str, Any] = {
    "inspect": """
examples:
  qcompile inspect MODEL               the method, and how each parameter is stored; reads no weights
  qcompile inspect model.gguf --json   as JSON
""",
    "convert": """
examples:
  qcompile convert AWQ-MODEL out --to gptq                the same numbers in another format
  qcompile convert model.gguf out --to compressed-tensors --requantize
  qcompile convert MODEL out --to float                   plain float32 weights

Exact or not at all: weights that the format cannot hold are listed with the reason, and nothing is written.
""",
}
