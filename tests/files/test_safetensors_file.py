"""safetensors_file: bad files, made by hand, are CheckpointErrors within two seconds and little memory."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2, 2), start: Any = 0, end: Any = 16, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


DATA = bytes(16)
NESTED = b'{"a":' * 100_000
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot hold a header"),
    "seven bytes": (bytes(7), "cannot hold a header"),
    "no header": (bytes(8), "not JSON"),
    "header beyond the end": (safetensors({}, length=100), "header of 100"),
    "header of 2**64": (safetensors({}, length=2**64 - 1), "header of 18446744073709551615"),
    "header of 2**63": (safetensors({}, length=2**63), "cannot hold a header"),
    "header cut short": (safetensors({"w": entry()}, DATA, length=20), "not JSON"),
    "header too long by one": (safetensors({"w": entry()}, DATA, length=len(json.dumps({"w": entry()})) + 1), "JSON"),
    "text": (b"this is no file of tensors at all", "cannot hold a header"),
    "pickle": (pickle.dumps({"w": 1}, 2), "cannot hold a header"),
    "zip": (b"PK\3\4" + bytes(100), "cannot hold a header"),
    "a page of HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "cannot hold a header"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "cannot hold"),
    "no UTF-8": (safetensors(b'{"\xff": 1}'), "not JSON"),
    "UTF-16": (safetensors('{"w": 1}'.encode("utf-16")), "not JSON"),
    "null": (safetensors(None), "the header is a NoneType"),
    "list": (safetensors([entry()], DATA), "the header is a list"),
    "number": (safetensors(7), "the header is a int"),
    "nested without end": (safetensors(NESTED), "not JSON"),
    "digits without end": (safetensors(b'{"w": ' + b"9" * 100_000 + b"}"), "not JSON"),
    "a name twice": (safetensors(b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"w":{}}', bytes(4)), "twice"),
    "a key of an entry twice": (
        safetensors(b'{"w":{"dtype":"F32","dtype":"U8","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "'dtype' occurs twice",
    ),
    "entry null": (safetensors({"w": None}), "w: an entry has dtype"),
    "entry a list": (safetensors({"w": [1]}), "w: an entry has dtype"),
    "no dtype": (safetensors({"w": {"shape": [2, 2], "data_offsets": [0, 16]}}, DATA), "w: an entry has dtype"),
    "no shape": (safetensors({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, DATA), "w: an entry has dtype"),
    "no offsets": (safetensors({"w": {"dtype": "F32", "shape": [2, 2]}}, DATA), "w: an entry has dtype"),
    "one key too many": (safetensors({"w": entry(offset=1)}, DATA), "w: an entry has dtype"),
    "unknown dtype": (safetensors({"w": entry(dtype="F33")}, DATA), "unknown dtype 'F33'"),
    "dtype in small letters": (safetensors({"w": entry(dtype="f32")}, DATA), "unknown dtype"),
    "dtype a number": (safetensors({"w": entry(dtype=1)}, DATA), "unknown dtype"),
    "dtype a list": (safetensors({"w": entry(dtype=["F32"])}, DATA), "unknown dtype"),
    "dtype of other width": (safetensors({"w": entry(dtype="F16")}, DATA), "16 bytes; F16 of .* needs 8"),
    "shape a number": (safetensors({"w": entry(4)}, DATA), "shape is 4"),
    "shape a text": (safetensors({"w": entry("22")}, DATA), "shape is 22"),
    "shape null": (safetensors({"w": entry(None)}, DATA), "shape is None"),
    "shape of floats": (safetensors({"w": entry([2.0, 2.0])}, DATA), "not a list of counts"),
    "shape of truths": (safetensors({"w": entry([True, 4])}, DATA), "not a list of counts"),
    "shape of texts": (safetensors({"w": entry(["2", "2"])}, DATA), "not a list of counts"),
    "shape of lists": (safetensors({"w": entry([[2, 2]])}, DATA), "not a list of counts"),
    "shape below zero": (safetensors({"w": entry([-2, -2])}, DATA), "not a list of counts"),
    "shape of 2**63": (safetensors({"w": entry([2**63])}, DATA), "not a list of counts"),
    "shape of 2**62 twice": (safetensors({"w": entry([2**62, 2**62])}, DATA), "needs"),
    "shape that overflows to 16 bytes": (safetensors({"w": entry([2**32, 2**32 + 1, 4])}, DATA), "needs"),
    "shape too large": (safetensors({"w": entry([2, 3])}, DATA), "16 bytes; F32 of .* needs 24"),
    "shape too small": (safetensors({"w": entry([2, 1])}, DATA), "16 bytes; F32 of .* needs 8"),
    "shape of nothing": (safetensors({"w": entry([0, 2**40])}, DATA), "16 bytes; F32 of .* needs 0"),
    "offsets a number": (safetensors({"w": {**entry(), "data_offsets": 0}}, DATA), "data_offsets is 0"),
    "offsets null": (safetensors({"w": {**entry(), "data_offsets": None}}, DATA), "data_offsets is None"),
    "one offset": (safetensors({"w": {**entry(), "data_offsets": [16]}}, DATA), "not a start and an end"),
    "three offsets": (safetensors({"w": {**entry(), "data_offsets": [0, 8, 16]}}, DATA), "not a start and an end"),
    "offsets of floats": (safetensors({"w": entry(start=0.0, end=16.0)}, DATA), "not a list of counts"),
    "offsets below zero": (safetensors({"w": entry(start=-16, end=0)}, DATA), "not a list of counts"),
    "offsets turned round": (safetensors({"w": entry(start=16, end=0)}, DATA), "-16 bytes"),
    "offsets beyond the end": (safetensors({"w": entry(start=16, end=32)}, DATA), "starts at byte 16"),
    "offsets of 2**62": (safetensors({"w": entry([2**60], 0, 2**62)}, DATA), "is it truncated"),
    "a gap before": (safetensors({"w": entry(start=4, end=20)}, bytes(20)), "starts at byte 4"),
    "a gap between": (safetensors({"v": entry(), "w": entry(start=20, end=36)}, bytes(36)), "w starts at byte 20"),
    "bytes left over": (safetensors({"w": entry()}, bytes(17)), "end at byte 16 of 17"),
    "truncated": (safetensors({"w": entry()}, DATA[:-1]), "end at byte 16 of 15; is it truncated"),
    "no data": (safetensors({"w": entry()}), "is it truncated"),
    "overlap": (safetensors({"v": entry(), "w": entry(start=8, end=24)}, bytes(24)), "w starts at byte 8"),
    "one inside the other": (safetensors({"v": entry(), "w": entry([1], 4, 8)}, DATA), "w starts at byte 4"),
    "same place": (safetensors({"v": entry(), "w": entry()}, DATA), "w starts at byte 0"),
    "data without tensors": (safetensors({}, DATA), "end at byte 0 of 16"),
    "metadata a list": (safetensors({"__metadata__": [1], "w": entry()}, DATA), "not a mapping of strings"),
    "metadata a text": (safetensors({"__metadata__": "pt", "w": entry()}, DATA), "not a mapping of strings"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}, "w": entry()}, DATA), "not a mapping of strings"),
    "metadata of mappings": (safetensors({"__metadata__": {"a": {}}, "w": entry()}, DATA), "not a mapping of strings"),
    "metadata a tensor": (safetensors({"__metadata__": entry(), "w": entry()}, DATA), "not a mapping of strings"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], write: Callable[..., Any], case: str
) -> None:
    data, message = SAFETENSORS[case]
    write(tmp_path, {"model.safetensors": data, "config.json": {}})
    with refused(rf"model\.safetensors: .*{message}"):
        examine(tmp_path)


def test_enough_cases() -> None:
    assert len(SAFETENSORS) >= 70
