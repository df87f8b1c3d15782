"""unpickle: bad pickles, made by hand, are CheckpointErrors within two seconds and little memory; nothing runs."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Calls(tuple):
    """A function and its arguments: pickles as the call."""

    def __reduce__(self) -> Any:
        return tuple(self)


def named(path: str, *arguments: bytes) -> bytes:
    """A pickle that calls a function by its name, whether it is there or not."""
    return b"\x80\x02}X\1\0\0\0wc" + path.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tRs."


def storage(kind: str = "FloatStorage", key: bytes = b"X\1\0\0\x000", more: bytes = b"X\3\0\0\0cpuK\4t") -> bytes:
    return b"(X\7\0\0\0storagectorch\n" + kind.encode() + b"\n" + key + more + b"Q"


def rebuilt(stored: bytes, offset: bytes = b"K\0", size: bytes = b"K\4\x85", stride: bytes = b"K\1\x85") -> bytes:
    return named("torch._utils _rebuild_tensor_v2", stored, offset, size, stride, b"\x89}")


def big(count: int) -> bytes:
    data = count.to_bytes((count.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


FORBIDDEN = (
    *("os system", "posix system", "nt system", "subprocess Popen", "subprocess check_output", "builtins eval"),
    *("builtins exec", "builtins compile", "builtins open", "builtins __import__", "__builtin__ eval", "io open"),
    *("builtins type", "builtins object", "builtins dict", "builtins bytearray", "builtins print", "sys exit"),
    *("importlib import_module", "pickle loads", "_pickle loads", "torch load", "torch.jit load", "torch.hub load"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._tensor _rebuild_from_type", "torch.serialization load"),
    *("torch.storage _load_from_bytes", "torch.package importer", "torch.distributed._tensor DTensor", "shutil rmtree"),
    *(
        "numpy load",
        "numpy.core.multiarray _reconstruct",
        "numpy ndarray",
        "runpy run_path",
        "ctypes CDLL",
        "marshal loads",
    ),
    *("functools partial", "operator attrgetter", "operator methodcaller", "webbrowser open", "socket socket"),
    *("collections Counter", "collections.OrderedDict fromkeys", "transformers AutoModel", "qcompile load", "a.b c.d"),
)
PICKLES: dict[str, bytes] = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "only a stop": b".",
    "text": b"hello",
    "a list": b"\x80\x02].",
    "a number": b"\x80\x02K\1.",
    "nothing": b"\x80\x02N.",
    "a tuple": b"\x80\x02).",
    "a tuple from nothing": b"\x80\x02\x87.",
    "a mark from nothing": b"\x80\x02t.",
    "an item for nothing": b"\x80\x02K\1K\1s.",
    "an item for a list": b"\x80\x02]K\1K\1s.",
    "an odd number of items": b"\x80\x02}(K\1u.",
    "elements of a mapping": b"\x80\x02}(K\1e.",
    "a key that is a mapping": b"\x80\x02}}K\1s.",
    "a key that is a float": b"\x80\x02}G" + bytes(8) + b"K\1s.",
    "a key that is nothing": b"\x80\x02}NK\1s.",
    "a number for a name": b"\x80\x02}K\1K\1s.",
    "a memo that is not there": b"\x80\x02h\7.",
    "a memo of nothing": b"\x80\x02q\0.",
    "pop": b"\x80\x02}0.",
    "duplicate": b"\x80\x02}2.",
    "a global without a name": b"\x80\x02c\n\n.",
    "a global cut short": b"\x80\x02cos\n",
    "a stack global of numbers": b"\x80\x04K\1K\2\x93.",
    "an extension": b"\x80\x02\x82\1.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "an object": b"\x80\x02(cos\nsystem\no.",
    "new object with names": b"\x80\x04cos\nsystem\n)}\x92.",
    "a persistent name": b"P0\n.",
    "a buffer out of band": b"\x80\x05\x97.",
    "a call of a number": b"\x80\x02K\1)R.",
    "a call with a list": b"\x80\x02ctorch\nSize\n]R.",
    "a call with nothing": b"\x80\x02ctorch\nSize\nNR.",
    "a call with too much": named("torch Size", b"K\1K\1K\1"),
    "a size of a number": named("torch Size", b"K\1"),
    "attributes of a number": b"\x80\x02K\1}b.",
    "attributes of a list": b"\x80\x02]}b.",
    "a string beyond the end": b"\x80\x02X\xff\xff\xff\xffab.",
    "a string of 2**63": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"ab.",
    "bytes of 2**63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"ab.",
    "a number of 2**31 bytes": b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"ab.",
    "a number of -1 bytes": b"\x80\x02\x8b" + struct.pack("<i", -1) + b"ab.",
    "digits without end": b"\x80\x02}X\1\0\0\0wI" + b"9" * 10_000 + b"\ns.",
    "a text that is no UTF-8": b"\x80\x02X\2\0\0\0\xff\xfe.",
    "an ordered mapping of a number": named("collections OrderedDict", b"K\1"),
    "an ordered mapping of triples": named("collections OrderedDict", b"((K\1K\2K\3tt"),
    "an encoding of a number": named("_codecs encode", b"K\1"),
    "getattr of a number": named("builtins getattr", b"K\1X\1\0\0\0a"),
    "getattr of a function": named("builtins getattr", b"ctorch\nSize\nK\1"),
    "a storage of nothing": named("torch._utils _rebuild_tensor_v2", b"NK\0)))"),
    "a storage that is a number": rebuilt(b"K\1"),
    "a storage of two": rebuilt(b"(X\7\0\0\0storageK\1tQ"),
    "a storage of another name": rebuilt(b"(X\7\0\0\0STORAGEctorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"),
    "a storage by its number": rebuilt(storage(key=b"K\0")),
    "a storage of a path": rebuilt(storage(key=b"X\6\0\0\0../../")),
    "a storage that is missing": rebuilt(storage(key=b"X\1\0\0\x009")),
    "a storage of quantized numbers": rebuilt(storage("QInt8Storage")),
    "a storage of complex numbers": rebuilt(storage("ComplexFloatStorage")),
    "a storage that is a dtype": rebuilt(storage("float32")),
    "a storage of wider numbers": rebuilt(storage("DoubleStorage")),
    "too large": rebuilt(storage(), size=b"K\5\x85"),
    "too far": rebuilt(storage(), offset=b"K\1"),
    "far beyond": rebuilt(storage(), offset=big(2**61)),
    "2**70": rebuilt(storage(), size=big(2**70) + b"\x85"),
    "before the start": rebuilt(storage(), offset=big(-1)),
    "a size below zero": rebuilt(storage(), size=big(-4) + b"\x85"),
    "a stride below zero": rebuilt(storage(), stride=big(-1) + b"\x85"),
    "a wide stride": rebuilt(storage(), size=b"K\2\x85", stride=b"K\4\x85"),
    "one number 2**40 times": rebuilt(storage(), size=big(2**40) + b"\x85", stride=b"K\0\x85"),
    "a stride too few": rebuilt(storage(), stride=b")"),
    "a stride too many": rebuilt(storage(), stride=b"K\1K\1\x86"),
    "a size that is a number": rebuilt(storage(), size=b"K\4"),
    "a size of texts": rebuilt(storage(), size=b"X\1\0\0\x004\x85"),
    "a size of floats": rebuilt(storage(), size=b"G" + struct.pack(">d", 4) + b"\x85"),
    "a size of sizes": rebuilt(storage(), size=b"K\4\x85\x85"),
    "an offset that is nothing": rebuilt(storage(), offset=b"N"),
    "a tensor of too few arguments": named("torch._utils _rebuild_tensor_v2", storage()),
    "a third version of no dtype": named(
        "torch._utils _rebuild_tensor_v3", storage(), b"K\0K\4\x85K\1\x85\x89}ctorch\nSize\n"
    ),
    "a subclass of a number": named("torch._tensor _rebuild_from_type_v2", b"K\1K\1)}"),
    "a subclass that is called": named("torch._tensor _rebuild_from_type_v2", b"cos\nsystem\nK\1)}"),
    "a wrapper of a number": named("torch._utils _rebuild_wrapper_subclass", b"K\1K\1)))"),
    "a wrapper without a size": named("torch._utils _rebuild_wrapper_subclass", b"ctorchao.x\nX\nK\1K\1)"),
    **{f"{name}": named(name, b"X\4\0\0\0true") for name in FORBIDDEN},
}


def archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", bytes(16))


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], case: str) -> None:
    archive(tmp_path / "pytorch_model.bin", PICKLES[case])
    with refused(r"pytorch_model\.bin: " + ("it asks for .*nothing of it was run" if case in FORBIDDEN else "")):
        examine(tmp_path)


def test_a_good_pickle(tmp_path: Path, examine: Callable[..., int]) -> None:
    """What the cases above spoil."""
    archive(tmp_path / "pytorch_model.bin", rebuilt(storage()))
    assert examine(tmp_path) == 0


def test_nothing_is_run(tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any]) -> None:
    ran = tmp_path / "ran"
    for call in ((os.mkdir, (str(ran),)), (eval, (f"open({str(ran)!r}, 'w')",)), (os.system, (f"touch {ran}",))):
        for protocol in range(6):
            archive(tmp_path / "pytorch_model.bin", pickle.dumps({"w": Calls(call)}, protocol))
            with refused("pytorch_model.bin"):
                examine(tmp_path)
    assert not ran.exists()


def _laughs(depth: int, wide: int, make: Callable[[list[Any]], Any]) -> Any:
    item: Any = 1
    for _ in range(depth):
        item = make([item] * wide)
    return {"w": item}


BOMBS: dict[str, Any] = {
    "mappings": _laughs(18, 9, lambda items: {str(number): item for number, item in enumerate(items)}),
    "lists": _laughs(18, 9, list),
    "tuples": _laughs(18, 9, tuple),
    "deep lists": _laughs(300, 1, list),
    "deep mappings": _laughs(300, 1, lambda items: {"a": items[0]}),
}


@pytest.mark.parametrize("case", BOMBS)
def test_pickles_of_endless_values(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], case: str
) -> None:
    archive(tmp_path / "pytorch_model.bin", pickle.dumps(BOMBS[case], 2))
    with refused("without end"):
        examine(tmp_path)


def test_enough_cases() -> None:
    assert len(PICKLES) + len(BOMBS) >= 130
