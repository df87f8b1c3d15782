"""gguf_file: headers are read as the format says, and wrong ones are named at once, whatever they claim."""

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.files.gguf_file import BLOCKS, PLAIN, GgufFile

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def header(infos: list[bytes], values: list[bytes], alignment: int = 32, version: int = 3, **counts: int) -> bytes:
    tensors, entries = counts.get("tensors", len(infos)), counts.get("entries", len(values))
    start = b"GGUF" + struct.pack("<IQQ", version, tensors, entries)
    text = start + b"".join(values) + b"".join(infos)
    return text + bytes(-len(text) % alignment)


def open_bytes(folder: Path, data: bytes) -> GgufFile:
    (folder / "model.gguf").write_bytes(data)
    return GgufFile(folder / "model.gguf")


def test_what_the_package_writes(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("f", 0.5)
    writer.add_bool("b", True)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("flags", [True, False])
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_string("after", "the strings")
    plain = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    blocks = np.arange(2 * 36, dtype=np.uint8).reshape(2, 36)
    writer.add_tensor("plain", plain)
    writer.add_tensor("half", plain.astype(np.float16))
    writer.add_tensor("blocks", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in checkpoint.metadata.items()
    }
    expected = {"llama.block_count": 3, "f": 0.5, "b": True, "numbers": [1, 2, 3], "flags": [True, False]}
    assert metadata == {"general.architecture": "llama", **expected, "after": "the strings"}
    assert torch.equal(checkpoint.read("plain"), torch.from_numpy(plain))
    assert torch.equal(checkpoint.read("half"), torch.from_numpy(plain).half())
    assert torch.equal(checkpoint.read("blocks"), torch.from_numpy(blocks))
    assert checkpoint.tensors["blocks"].blocks == "Q4_0"
    assert checkpoint.tensors["plain"].blocks == ""


def test_sizes_are_those_of_the_package() -> None:
    for code, (name, elements, size) in BLOCKS.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType(code)] == (elements, size)
        assert GGMLQuantizationType(code).name == name
    for code, dtype in PLAIN.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType(code)] == (1, dtype.itemsize)


def test_other_alignment(tmp_path: Path) -> None:
    alignment = entry("general.alignment", 4, struct.pack("<I", 64))
    infos = [tensor("a", (2,), 0, 0), tensor("b", (2,), 0, 64)]
    data = header(infos, [alignment], 64) + struct.pack("<2f", 1, 2).ljust(64, b"\0") + struct.pack("<2f", 3, 4)
    file = open_bytes(tmp_path, data)
    assert file.read("b").tolist() == [3, 4]


def test_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        data = header([tensor(f"t{number}", (1,), 0, 0)], []) + struct.pack("<f", number)
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(data)
    for number in (1, 2):
        checkpoint = open_checkpoint(tmp_path / f"m-0000{number}-of-00002.gguf")
        assert [float(checkpoint.read(f"t{n}")) for n in (1, 2)] == [1, 2]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


F32 = tensor("w", (4,), 0, 0)
DATA = bytes(16)
HUGE = 2**64 - 1
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are no GGUF file"),
    "magic": (b"GGML" + bytes(40), "starts with b'GGML'"),
    "version 1": (header([], [], version=1), "version 1; .*convert it again"),
    "big-endian": (header([], [], version=3 << 24), "big-endian"),
    "many tensors": (header([F32], [], tensors=HUGE), "more than any model has"),
    "more tensors than bytes": (header([F32], [], tensors=100_000), "100000 tensors do not fit"),
    "many entries": (header([], [], entries=HUGE), "more than any model has"),
    "more entries than bytes": (header([], [], entries=100_000), "100000 metadata entries do not fit"),
    "long key": (header([], [struct.pack("<Q", HUGE) + bytes(100)]), "a metadata key of 18446744073709551615 bytes"),
    "long string": (header([], [entry("k", 8, struct.pack("<Q", 2**50))]), "k of 1125899906842624 bytes"),
    "key no text": (header([], [struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20)]), "a metadata key is not UTF-8"),
    "unknown value": (header([], [entry("k", 13, bytes(8))]), "k is of unknown type 13"),
    "nested array": (header([], [entry("k", 9, struct.pack("<IQ", 9, 1) + bytes(20))]), "k is an array of type 9"),
    "long array": (header([], [entry("k", 9, struct.pack("<IQ", 0, HUGE))]), "numbers in k do not fit"),
    "many strings": (header([], [entry("k", 9, struct.pack("<IQ", 8, HUGE))]), "strings in k do not fit"),
    "long strings": (
        header([], [entry("k", 9, struct.pack("<IQQQ", 8, 2, HUGE, 1))]),
        "it ends in k; is it truncated",
    ),
    "key twice": (header([], [entry("k", 0, b"1"), entry("k", 0, b"2")]), "metadata k occurs twice"),
    "tensor twice": (header([F32, F32], []) + DATA, "tensor w occurs twice"),
    "long name": (header([struct.pack("<Q", 2**40) + bytes(60)], []), "a tensor's name of"),
    "no dimensions": (header([string("w") + bytes(40)], []), "w has 0 dimensions"),
    "five dimensions": (header([tensor("w", (1, 1, 1, 1, 1), 0, 0)], []), "w has 5 dimensions"),
    "no elements": (header([tensor("w", (0, 4), 0, 0)], []), r"w is of shape \(0, 4\)"),
    "huge shape": (header([tensor("w", (2**63, 2**63), 0, 0)], []), "w is of shape"),
    "unknown type": (header([tensor("w", (4,), 77, 0)], []) + DATA, "w is of unknown type 77"),
    "parts of blocks": (header([tensor("w", (2, 33), 2, 0)], []) + DATA, "rows of Q4_0 are multiples of 32"),
    "unaligned": (header([tensor("w", (4,), 0, 8)], []) + bytes(64), "w starts at 8, which 32 does not divide"),
    "overlap": (header([tensor("v", (9,), 0, 0), tensor("w", (4,), 0, 32)], []) + bytes(64), "w overlaps v"),
    "same place": (header([F32, tensor("v", (4,), 0, 0)], []) + DATA, "v overlaps w"),
    "truncated": (header([F32], []) + DATA[:-1], "is it truncated"),
    "far away": (header([tensor("w", (4,), 0, 2**60)], []) + DATA, "is it truncated"),
    "alignment 0": (header([F32], [entry("general.alignment", 4, bytes(4))]) + DATA, "general.alignment is 0"),
    "alignment 24": (
        header([F32], [entry("general.alignment", 4, struct.pack("<I", 24))]) + DATA,
        "is 24, not a power",
    ),
    "alignment text": (header([F32], [entry("general.alignment", 8, string("x"))]) + DATA, "alignment is 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path: Path, case: str) -> None:
    data, message = WRONG[case]
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        open_bytes(tmp_path, data)
    assert time.perf_counter() - start < 1


@settings(max_examples=200, deadline=1000)
@given(cut=st.integers(0, 4576), flips=st.lists(st.tuples(st.integers(0, 4575), st.integers(0, 255)), max_size=4))
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]) -> None:
    """Whatever is cut off or overwritten, a file opens or is a CheckpointError."""
    data = bytearray((CHECKPOINTS / "gguf-f16" / "model.gguf").read_bytes())
    for place, value in flips:
        data[place] = value
    try:
        file = open_bytes(tmp_path_factory.mktemp("gguf"), bytes(data if flips else data[:cut]))
        values: list[Any] = [file.read(name) for name in file.tensors]
        assert len(values) == len(file.tensors)
    except CheckpointError:
        pass
