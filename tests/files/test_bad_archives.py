"""pickle_file: bad archives, made by hand, are CheckpointErrors within two seconds and little memory."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _zipped(path: Path, name: str = "x/data.pkl", data: bytes = b"\x80\x02}.", **fields: Any) -> bytes:
    with zipfile.ZipFile(path, "w", fields.pop("compression", zipfile.ZIP_STORED)) as file:
        file.writestr(name, data)
    return path.read_bytes()


ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "no zip": lambda path: b"\x80\x02}.",
    "old torch.save": lambda path: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    "a tar": lambda path: b"data.pkl".ljust(1024, b"\0"),
    "an empty archive": lambda path: b"PK\5\6" + bytes(18),
    "no pickle": lambda path: _zipped(path, "x/other"),
    "a pickle at the top": lambda path: _zipped(path, "data.pkl"),
    "deflated": lambda path: _zipped(path, data=bytes(10_000), compression=zipfile.ZIP_DEFLATED),
    "a zip bomb": lambda path: _zipped(path, data=bytes(300_000_000), compression=zipfile.ZIP_DEFLATED),
    "bzip2": lambda path: _zipped(path, data=bytes(10_000), compression=zipfile.ZIP_BZIP2),
    "lzma": lambda path: _zipped(path, data=bytes(10_000), compression=zipfile.ZIP_LZMA),
    "truncated": lambda path: _zipped(path)[:-10],
    "cut in two": lambda path: _zipped(path, data=bytes(100))[:60],
    "its start missing": lambda path: _zipped(path)[40:],
    "a header of its own missing": lambda path: _zipped(path).replace(b"PK\3\4", b"XX\3\4"),
    "longer than the file": lambda path: _zipped(path).replace(
        struct.pack("<II", 4, 4), struct.pack("<II", 2**31 - 1, 2**31 - 1)
    ),
    "stored, but of two sizes": lambda path: _zipped(path).replace(struct.pack("<II", 4, 4), struct.pack("<II", 4, 9)),
    "encrypted": lambda path: _encrypted(_zipped(path)),
    "directory elsewhere": lambda path: (data := _zipped(path))[:-6] + struct.pack("<I", 2**31) + data[-2:],
}


def _encrypted(data: bytes) -> bytes:
    place = data.rindex(b"PK\1\2") + 8
    return data[:place] + b"\1\0" + data[place + 2 :]


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], write: Callable[..., Any], case: str
) -> None:
    data = ARCHIVES[case](tmp_path / "made")
    write(tmp_path, {"pytorch_model.bin": data})
    with refused(r"pytorch_model\.bin: "):
        examine(tmp_path)


def test_enough_cases() -> None:
    assert len(ARCHIVES) >= 10
