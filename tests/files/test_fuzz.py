"""20,000 mutants of real checkpoints: each is read, or is a CheckpointError or a LoadError, soon and in little memory.

A mutant is a fixture after one to three mutations: of the bytes of its file, of the JSON of its header or
configuration, or of a tensor, in a file that stays well formed. Hypothesis draws the same ones each time.
"""

import copy
import json
import math
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.errors import CheckpointError, LoadError
from qcompile.files.safetensors_file import DTYPES

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
# gguf-blocks is no model.
FIXTURES = sorted(folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir() and folder.name != "gguf-blocks")
MUTANTS = 20_000
NO_INPUT = ("expected.safetensors", "peer_logits.safetensors", "tokenizer.json", "generation_config.json")

WRONG: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 2**200, -(2**70), 1.5, float("nan"), float("inf")),
    *("", "x", "4", "nope", "\0", "a" * 5000, "u4/g64/asym", "int8", "float8_e4m3fn", "re:("),
    *([], [[]], [1, 2], ["a"], [128, 128], [0, 0], [-1, 1], [2**40, 2**40], [None], [{}]),
    *({}, {"a": 1}, {"a": {}}, {"weight": None}),
]
NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
ENDINGS = (".weight", ".qweight", ".scales", "_scale", ".g_idx", ".absmax", ".SCB", "._data", ".x", "")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(min(4, len(value))) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutate_json(draw: random.Random, value: Any, below: tuple[Any, ...] = ()) -> Any:
    """The value with one part exchanged, left out, or copied from elsewhere in it; a part of `below` if that exists."""
    value = copy.deepcopy(value)
    known = list(places(value))
    inside = [path for path in known if path[: len(below)] == below] or known
    path, other = draw.choice(inside), draw.choice(known)
    if not path:
        return copy.deepcopy(draw.choice(WRONG))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    match draw.randrange(5):
        case 0:
            del owner[path[-1]]
        case 1:
            part = value
            for key in other:
                part = part[key]
            owner[path[-1]] = copy.deepcopy(part)
        case _:
            owner[path[-1]] = copy.deepcopy(draw.choice(WRONG))
    return value


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    end = min(len(data), draw.choice([32, 1000, len(data)])) or 1
    at = draw.randrange(end)
    match draw.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
        case 2:
            return data[:at] + data[at + draw.randrange(1, 9) :]
        case 3:
            size = draw.choice("IQ")
            number = draw.choice(NUMBERS) % (1 << 8 * struct.calcsize(size))
            return data[:at] + struct.pack(f"<{size}", number) + data[at + struct.calcsize(size) :]
        case _:
            changed = bytearray(data or b"\0")
            for _ in range(draw.randrange(1, 6)):
                changed[draw.randrange(end)] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
            return bytes(changed)


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def build(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_header(draw: random.Random, data: bytes) -> bytes:
    header, rest = parse(data)
    described = header.get("__metadata__", {})
    if described and draw.random() < 0.5:
        name = draw.choice(sorted(described))
        try:
            described[name] = json.dumps(mutate_json(draw, json.loads(described[name])))
        except ValueError:
            described[name] = draw.choice(["", "{", "null", "[]", "1", "{}", '{"_type":"x"}'])
        return build(header, rest)
    return build(mutate_json(draw, header), rest)


def mutate_tensor(draw: random.Random, data: bytes) -> bytes:
    """One tensor with other numbers, dtype, shape or name, left out, or cut: in a file that is well formed."""
    header, rest = parse(data)
    metadata = header.pop("__metadata__", None)
    tensors = {name: [entry, rest[slice(*entry["data_offsets"])]] for name, entry in header.items()}
    name, other = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
    entry, content = tensors[name]
    shape = entry["shape"]
    fits = [dtype for dtype, real in DTYPES.items() if len(content) % real.itemsize == 0]
    match draw.randrange(9):
        case 0:
            del tensors[name]
        case 1:
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 2:
            tensors[name.rpartition(".")[0] + draw.choice(ENDINGS)] = tensors.pop(name)
        case 3:
            width = DTYPES[entry["dtype"]].itemsize
            entry["dtype"] = draw.choice([dtype for dtype in fits if DTYPES[dtype].itemsize == width])
        case 4:
            entry["dtype"] = draw.choice(fits)
            entry["shape"] = [len(content) // DTYPES[entry["dtype"]].itemsize]
        case 5:
            entry["shape"] = draw.choice([shape[::-1], [1, *shape], [*shape, 1], [math.prod(shape)]])
        case 6:
            entry["shape"] = [max(0, size + draw.choice([-1, 0, 0, 1, -size, size])) for size in shape]
            needs = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            tensors[name][1] = (content * (needs // max(1, len(content)) + 1))[:needs].ljust(needs, b"\0")
        case 7:
            tensors[name][1] = draw.choice([b"\0", b"\x7f", b"\x80", b"\xff"]) * len(content)
        case _:
            changed = bytearray(content)
            for _ in range(draw.randrange(1, 8)):
                if changed:
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
            tensors[name][1] = bytes(changed)
    header, parts, at = {} if metadata is None else {"__metadata__": metadata}, [], 0
    for name, (entry, content) in tensors.items():
        header[name] = {**entry, "data_offsets": [at, at + len(content)]}
        parts.append(content)
        at += len(content)
    return build(header, b"".join(parts))


class Folder:
    """A copy of a fixture that mutations come to, and go from again."""

    def __init__(self, fixture: Path, place: Path):
        self.path = place / fixture.name
        shutil.copytree(fixture, self.path, ignore=shutil.ignore_patterns(*NO_INPUT))
        self.files = {file.name: file.read_bytes() for file in sorted(self.path.iterdir())}
        self.texts = [name for name in self.files if name.endswith(".json")]
        (self.weights,) = (name for name in self.files if name not in self.texts)

    @property
    def opened(self) -> Path:
        return self.path / self.weights if self.weights.endswith(".gguf") else self.path

    def mutated(self, mutations: list[tuple[str, int]]) -> dict[str, bytes]:
        files = dict(self.files)
        for kind, seed in mutations:
            draw = random.Random(f"{self.path.name} {seed}")
            if kind == "json" and self.texts:
                name = draw.choice(self.texts)
                below = ("quantization_config",) if draw.random() < 0.9 else ()
                try:
                    files[name] = json.dumps(mutate_json(draw, json.loads(files[name]), below)).encode()
                except ValueError:
                    files[name] = mutate_bytes(draw, files[name])
                continue
            data = files[self.weights]
            if self.weights.endswith(".safetensors") and kind in ("header", "tensor"):
                try:
                    files[self.weights] = (mutate_header if kind == "header" else mutate_tensor)(draw, data)
                    continue
                except (ValueError, LookupError, TypeError, AttributeError):
                    pass  # an earlier mutation left no header
            files[self.weights] = mutate_bytes(draw, data)
        return {name: data for name, data in files.items() if data != self.files[name]}

    def write(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            # A new file: tensors of the old one may still be mapped. Put in its place, it would be flushed to the disk.
            (self.path / name).unlink()
            (self.path / name).write_bytes(data)


KINDS = ("json", "json", "header", "tensor", "tensor", "tensor", "bytes")


@pytest.mark.parametrize("fixture", FIXTURES)
def test_mutants(tmp_path: Path, examine: Callable[..., int], fixture: str) -> None:
    torch.set_num_threads(1)  # a mutant is small
    folder = Folder(CHECKPOINTS / fixture, tmp_path)
    assert examine(folder.opened, 2) > 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=-(-MUTANTS // len(FIXTURES)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32)), min_size=1, max_size=3))
    def check(mutations: list[tuple[str, int]]) -> None:
        changed = folder.mutated(mutations)
        folder.write(changed)
        start = time.process_time()
        try:
            examine(folder.opened, 2)
        except (CheckpointError, LoadError):
            pass
        finally:
            folder.write({name: folder.files[name] for name in changed})
        assert time.process_time() - start < 2

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB
