"""Files of a checkpoint: written for a test, and read as load() does, short of making a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile import formats
from qcompile.errors import CheckpointError, FormatError, SpecError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats import Dense, Gguf, Ignored
from qcompile.quant.activation import ActivationSpec


def _examine(path: Path, most: int = 1_000_000) -> int:
    """Open a checkpoint, find its format and read the first `most` entries; returns how many there are.

    Raises CheckpointError, also where load() makes one of a FormatError or a SpecError.
    """
    checkpoint = open_checkpoint(path)
    method = formats.find(checkpoint)
    if isinstance(method, Gguf):
        method.config(checkpoint)
    try:
        entries = [entry for entry in method.weights(checkpoint) if not isinstance(entry, Ignored)] if method else []
        for entry in entries[:most]:
            if isinstance(entry, Dense):
                checkpoint.need(entry.tensor)
                entry.value(checkpoint.read(entry.tensor))
            else:
                entry.read(checkpoint.read)
                for rounding in (entry.input, entry.output):
                    if rounding is not None:
                        ActivationSpec.parse(rounding.spec)
    except (FormatError, SpecError) as error:
        raise CheckpointError(str(error)) from error
    return len(entries)


@pytest.fixture
def examine() -> Callable[..., int]:
    return _examine


@pytest.fixture
def write() -> Callable[[Path, dict[str, Any]], Path]:
    """`write(folder, {"config.json": {}})`: files from bytes, texts and values of JSON; returns the folder."""

    def run(folder: Path, files: dict[str, Any]) -> Path:
        for name, content in files.items():
            data = content if isinstance(content, bytes | str) else json.dumps(content)
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return folder

    return run
