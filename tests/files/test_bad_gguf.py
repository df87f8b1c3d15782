"""gguf_file: files made by hand, byte by byte. Two are good; each bad one is named at once, whatever it claims."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcompile
from qcompile.errors import CheckpointError, LoadError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.files.gguf_file import GgufFile

DATA = bytes(16)
HUGE = 2**64 - 1
SAFETENSORS = struct.pack("<Q", 65) + b'{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}' + DATA


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def place(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def gguf(
    places: list[bytes], values: list[bytes], data: bytes = b"", alignment: int = 32, version: int = 3, **counts: int
) -> bytes:
    start = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("tensors", len(places)), counts.get("entries", len(values))
    )
    text = start + b"".join(values) + b"".join(places)
    return text + bytes(-len(text) % alignment) + data


def number(key: str, count: int) -> bytes:
    return value(key, 4, struct.pack("<I", count))


def array(key: str, kind: int, count: int, data: bytes = b"") -> bytes:
    return value(key, 9, struct.pack("<IQ", kind, count) + data)


def open_bytes(folder: Path, data: bytes) -> GgufFile:
    (folder / "model.gguf").write_bytes(data)
    return GgufFile(folder / "model.gguf")


def test_other_alignment(tmp_path: Path) -> None:
    alignment = value("general.alignment", 4, struct.pack("<I", 64))
    infos = [place("a", (2,), 0, 0), place("b", (2,), 0, 64)]
    data = gguf(infos, [alignment], alignment=64) + struct.pack("<2f", 1, 2).ljust(64, b"\0") + struct.pack("<2f", 3, 4)
    file = open_bytes(tmp_path, data)
    assert file.read("b").tolist() == [3, 4]


def test_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        data = gguf([place(f"t{number}", (1,), 0, 0)], []) + struct.pack("<f", number)
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(data)
    for number in (1, 2):
        checkpoint = open_checkpoint(tmp_path / f"m-0000{number}-of-00002.gguf")
        assert [float(checkpoint.read(f"t{n}")) for n in (1, 2)] == [1, 2]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


F32 = place("w", (4,), 0, 0)
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are no GGUF file"),
    "magic": (b"GGML" + bytes(40), "starts with b'GGML'"),
    "version 1": (gguf([], [], version=1), "version 1; .*convert it again"),
    "big-endian": (gguf([], [], version=3 << 24), "big-endian"),
    "many tensors": (gguf([F32], [], tensors=HUGE), "more than any model has"),
    "more tensors than bytes": (gguf([F32], [], tensors=100_000), "100000 tensors do not fit"),
    "many entries": (gguf([], [], entries=HUGE), "more than any model has"),
    "more entries than bytes": (gguf([], [], entries=100_000), "100000 metadata entries do not fit"),
    "long key": (gguf([], [struct.pack("<Q", HUGE) + bytes(100)]), "a metadata key of 18446744073709551615 bytes"),
    "long string": (gguf([], [value("k", 8, struct.pack("<Q", 2**50))]), "k of 1125899906842624 bytes"),
    "key no text": (gguf([], [struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20)]), "a metadata key is not UTF-8"),
    "unknown value": (gguf([], [value("k", 13, bytes(8))]), "k is of unknown type 13"),
    "nested array": (gguf([], [value("k", 9, struct.pack("<IQ", 9, 1) + bytes(20))]), "k is an array of type 9"),
    "long array": (gguf([], [value("k", 9, struct.pack("<IQ", 0, HUGE))]), "numbers in k do not fit"),
    "many strings": (gguf([], [value("k", 9, struct.pack("<IQ", 8, HUGE))]), "strings in k do not fit"),
    "long strings": (
        gguf([], [value("k", 9, struct.pack("<IQQQ", 8, 2, HUGE, 1))]),
        "it ends in k; is it truncated",
    ),
    "key twice": (gguf([], [value("k", 0, b"1"), value("k", 0, b"2")]), "metadata k occurs twice"),
    "tensor twice": (gguf([F32, F32], []) + DATA, "tensor w occurs twice"),
    "long name": (gguf([struct.pack("<Q", 2**40) + bytes(60)], []), "a tensor's name of"),
    "no dimensions": (gguf([string("w") + bytes(40)], []), "w has 0 dimensions"),
    "five dimensions": (gguf([place("w", (1, 1, 1, 1, 1), 0, 0)], []), "w has 5 dimensions"),
    "no elements": (gguf([place("w", (0, 4), 0, 0)], []), r"w is of shape \(0, 4\)"),
    "huge shape": (gguf([place("w", (2**63, 2**63), 0, 0)], []), "w is of shape"),
    "unknown type": (gguf([place("w", (4,), 77, 0)], []) + DATA, "w is of unknown type 77"),
    "parts of blocks": (gguf([place("w", (2, 33), 2, 0)], []) + DATA, "rows of Q4_0 are multiples of 32"),
    "unaligned": (gguf([place("w", (4,), 0, 8)], []) + bytes(64), "w starts at 8, which 32 does not divide"),
    "overlap": (gguf([place("v", (9,), 0, 0), place("w", (4,), 0, 32)], []) + bytes(64), "w overlaps v"),
    "same place": (gguf([F32, place("v", (4,), 0, 0)], []) + DATA, "v overlaps w"),
    "truncated": (gguf([F32], []) + DATA[:-1], "is it truncated"),
    "far away": (gguf([place("w", (4,), 0, 2**60)], []) + DATA, "is it truncated"),
    "alignment 0": (gguf([F32], [value("general.alignment", 4, bytes(4))]) + DATA, "general.alignment is 0"),
    "alignment 24": (
        gguf([F32], [value("general.alignment", 4, struct.pack("<I", 24))]) + DATA,
        "is 24, not a power",
    ),
    "alignment text": (gguf([F32], [value("general.alignment", 8, string("x"))]) + DATA, "alignment is 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path: Path, case: str) -> None:
    data, message = WRONG[case]
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        open_bytes(tmp_path, data)
    assert time.perf_counter() - start < 1


LLAMA = value("general.architecture", 8, string("llama"))
GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "four bytes": (b"GGUF", "no GGUF file"),
    "cut in the counts": (gguf([], [])[:20], "no GGUF file"),
    "safetensors": (SAFETENSORS, "starts with"),
    "GGML": (b"ggml" + bytes(40), "starts with b'ggml'"),
    "magic turned round": (b"FUGG" + bytes(40), "starts with b'FUGG'"),
    "version 0": (gguf([], [], version=0), "version 0"),
    "version 1": (gguf([], [], version=1), "version 1"),
    "version 4": (gguf([], [], version=4), "version 4"),
    "version 2**32 - 1": (gguf([], [], version=2**32 - 1), "version 4294967295"),
    "big-endian": (gguf([], [], version=3 << 24), "big-endian"),
    "2**64 tensors": (gguf([], [], tensors=HUGE), "more than any model has"),
    "2**63 tensors": (gguf([], [], tensors=2**63), "more than any model has"),
    "100000 tensors": (gguf([place("w")], [], DATA, tensors=100_000), "do not fit"),
    "one tensor too many": (gguf([place("w")], [], DATA, tensors=2), "."),
    "2**64 entries": (gguf([], [], entries=HUGE), "more than any model has"),
    "100000 entries": (gguf([], [LLAMA], entries=100_000), "do not fit"),
    "one entry too many": (gguf([], [LLAMA], entries=2), "."),
    "key of 2**64": (gguf([], [struct.pack("<Q", HUGE) + bytes(50)]), "a metadata key of"),
    "key of 2**20": (gguf([], [string("k" * 2**20) + bytes(50)]), "a metadata key of"),
    "key no UTF-8": (gguf([], [string(b"\xff") + bytes(50)]), "is not UTF-8"),
    "key cut short": (gguf([], [struct.pack("<Q", 5000) + b"k" * 30]), "do not fit"),
    "key twice": (gguf([], [number("k", 1), number("k", 2)]), "occurs twice"),
    "type 13": (gguf([], [value("k", 13, bytes(40))]), "unknown type 13"),
    "type 2**32 - 1": (gguf([], [value("k", 2**32 - 1, bytes(40))]), "unknown type 4294967295"),
    "string of 2**64": (gguf([], [value("k", 8, struct.pack("<Q", HUGE) + bytes(50))]), "k of 18446744073709551615"),
    "string of 2**50": (gguf([], [value("k", 8, struct.pack("<Q", 2**50) + bytes(50))]), "k of 1125899906842624"),
    "string of 99 million": (gguf([], [value("k", 8, struct.pack("<Q", 99_000_000) + bytes(50))]), "do not fit"),
    "string no UTF-8": (gguf([], [value("k", 8, string(b"\xc3"))], bytes(50)), "is not UTF-8"),
    "array of arrays": (gguf([], [array("k", 9, 1, bytes(50))]), "is an array of type 9"),
    "array of type 77": (gguf([], [array("k", 77, 1, bytes(50))]), "is an array of type 77"),
    "array of 2**64 bytes": (gguf([], [array("k", 0, HUGE)]), "do not fit"),
    "array of 2**61 doubles": (gguf([], [array("k", 12, 2**61)]), "do not fit"),
    "array of 2**64 strings": (gguf([], [array("k", 8, HUGE)]), "do not fit"),
    "array of 2**40 strings": (gguf([], [array("k", 8, 2**40)]), "do not fit"),
    "strings that are too long": (gguf([], [array("k", 8, 2, struct.pack("<QQ", HUGE, HUGE))]), "it ends in k"),
    "strings that overflow": (gguf([], [array("k", 8, 3, struct.pack("<QQQ", 2**63, 2**63, 8))]), "it ends in k"),
    "cut in a number": (gguf([], [value("k", 10, b"")])[:40], "."),
    "alignment 0": (gguf([place("w")], [number("general.alignment", 0)], DATA), "alignment is 0"),
    "alignment 3": (gguf([place("w")], [number("general.alignment", 3)], DATA), "alignment is 3"),
    "alignment 2**31": (gguf([place("w")], [number("general.alignment", 2**31)], DATA), "truncated"),
    "alignment below zero": (
        gguf([place("w")], [value("general.alignment", 5, struct.pack("<i", -32))], DATA),
        "alignment is -32",
    ),
    "alignment a float": (
        gguf([place("w")], [value("general.alignment", 6, struct.pack("<f", 32))], DATA),
        "alignment is 32.0",
    ),
    "alignment true": (gguf([place("w")], [value("general.alignment", 7, b"\1")], DATA), "alignment is True"),
    "alignment a text": (gguf([place("w")], [value("general.alignment", 8, string("32"))], DATA), "alignment is '32'"),
    "alignment an array": (gguf([place("w")], [array("general.alignment", 4, 1, bytes(4))], DATA), "alignment is"),
    "name of 2**64": (gguf([struct.pack("<Q", HUGE) + bytes(50)], []), "a tensor's name of"),
    "name no UTF-8": (gguf([string(b"\xff") + bytes(50)], []), "is not UTF-8"),
    "tensor twice": (gguf([place("w"), place("w", offset=32)], [], bytes(48)), "occurs twice"),
    "no dimensions": (gguf([place("w", ())], [], DATA + bytes(40)), "has 0 dimensions"),
    "five dimensions": (gguf([place("w", (1,) * 5)], [], DATA), "has 5 dimensions"),
    "2**32 - 1 dimensions": (gguf([string("w") + struct.pack("<I", 2**32 - 1) + bytes(60)], []), "dimensions"),
    "dimension 0": (gguf([place("w", (4, 0))], [], DATA), "is of shape"),
    "2**64 elements": (gguf([place("w", (2**32, 2**32))], [], DATA), "is of shape"),
    "2**63 elements": (gguf([place("w", (2**63,))], [], DATA), "is of shape"),
    "shape that overflows to 4": (gguf([place("w", (2**62, 2**2, 2**62, 4))], [], DATA), "is of shape"),
    "2**40 elements": (gguf([place("w", (2**40,))], [], DATA), "truncated"),
    "type 4": (gguf([place("w", kind=4)], [], DATA), "unknown type 4"),
    "type 5": (gguf([place("w", kind=5)], [], DATA), "unknown type 5"),
    "type 99": (gguf([place("w", kind=99)], [], DATA), "unknown type 99"),
    "parts of Q4_0 blocks": (gguf([place("w", (2, 31), 2)], [], bytes(64)), "rows of Q4_0 are multiples of 32"),
    "parts of Q4_K blocks": (gguf([place("w", (2, 128), 12)], [], bytes(500)), "rows of Q4_K are multiples of 256"),
    "unaligned": (gguf([place("w", offset=4)], [], bytes(64)), "which 32 does not divide"),
    "offset 2**63": (gguf([place("w", offset=2**63)], [], DATA), "truncated"),
    "offset 2**64 - 32": (gguf([place("w", offset=HUGE - 31)], [], DATA), "truncated"),
    "overlap": (gguf([place("v", (9,)), place("w", offset=32)], [], bytes(64)), "w overlaps v"),
    "same place": (gguf([place("v"), place("w")], [], DATA), "overlaps"),
    "truncated": (gguf([place("w")], [], DATA[:-1]), "truncated"),
    "no data": (gguf([place("w")], []), "truncated"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], write: Callable[..., Any], case: str
) -> None:
    data, message = GGUF[case]
    write(tmp_path, {"model.gguf": data})
    with refused(rf"model\.gguf: .*{message}"):
        examine(tmp_path / "model.gguf")


HEADS = [number("llama.attention.head_count", 4), number("llama.attention.head_count_kv", 2)]
LAYERS = number("llama.block_count", 1)
GGUF_MODELS: dict[str, list[bytes]] = {
    "no architecture": [],
    "architecture a number": [number("general.architecture", 7)],
    "architecture an array": [array("general.architecture", 4, 1, bytes(4))],
    "unknown architecture": [value("general.architecture", 8, string("abacus"))],
    "a vision tower": [value("general.architecture", 8, string("clip"))],
    "no sizes": [LLAMA],
    "layers a text": [LLAMA, *HEADS, value("llama.block_count", 8, string("two"))],
    "layers a float": [LLAMA, *HEADS, value("llama.block_count", 6, struct.pack("<f", 1))],
    "layers an array": [LLAMA, *HEADS, array("llama.block_count", 4, 2, bytes(8))],
    "no layers": [LLAMA, *HEADS, number("llama.block_count", 0)],
    "2**32 - 1 layers": [LLAMA, *HEADS, number("llama.block_count", 2**32 - 1)],
    "no heads": [LLAMA, LAYERS],
    "0 heads": [LLAMA, LAYERS, number("llama.attention.head_count", 0)],
    "heads a text": [LLAMA, LAYERS, value("llama.attention.head_count", 8, string("4"))],
    "heads a layer": [LLAMA, LAYERS, array("llama.attention.head_count", 4, 2, bytes(8))],
    "width a text": [LLAMA, LAYERS, *HEADS, value("llama.embedding_length", 8, string("64"))],
    "width 0": [LLAMA, LAYERS, *HEADS, number("llama.embedding_length", 0)],
    "width 2**32 - 1": [LLAMA, LAYERS, *HEADS, number("llama.embedding_length", 2**32 - 1)],
}


@pytest.mark.parametrize("case", GGUF_MODELS)
def test_gguf_models(tmp_path: Path, write: Callable[..., Any], case: str) -> None:
    write(tmp_path, {"model.gguf": gguf([place("token_embd.weight", (4, 64))], GGUF_MODELS[case], bytes(1024))})
    start = time.process_time()
    with pytest.raises((CheckpointError, LoadError)):
        qcompile.load(str(tmp_path / "model.gguf"), progress=False)
    assert time.process_time() - start < 2


def test_gguf_shards(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], write: Callable[..., Any]
) -> None:
    data = gguf([place("w")], [LLAMA], DATA)
    write(tmp_path, {"m-00001-of-99999.gguf": data, "n-00001-of-00002.gguf": data, "n-00002-of-00002.gguf": data})
    with refused(r"m-00002-of-99999\.gguf is missing"):
        examine(tmp_path / "m-00001-of-99999.gguf")
    with refused(r"w is in n-00001-of-00002\.gguf and in n-00002-of-00002\.gguf"):
        examine(tmp_path / "n-00001-of-00002.gguf")


def test_enough_cases() -> None:
    assert len(WRONG) + len(GGUF) + len(GGUF_MODELS) >= 120
