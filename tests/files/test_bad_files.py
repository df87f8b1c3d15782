"""Bad files, made by hand: each is a CheckpointError within two seconds and little memory, and never a model."""

import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile
from qcompile.errors import CheckpointError, LoadError

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
HUGE = 2**64 - 1


@contextmanager
def refused(message: str = ".") -> Iterator[None]:
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError, match=message):
        yield
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Files from bytes, texts and values of JSON."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


# ---- safetensors


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
    "header of 2**64": (safetensors({}, length=HUGE), "header of 18446744073709551615"),
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
def test_safetensors(tmp_path: Path, examine: Callable[..., int], case: str) -> None:
    data, message = SAFETENSORS[case]
    write(tmp_path, {"model.safetensors": data, "config.json": {}})
    with refused(rf"model\.safetensors: .*{message}"):
        examine(tmp_path)


# ---- folders: indices, names, configurations

GOOD = safetensors({"w": entry()}, DATA)
OTHER = safetensors({"v": entry()}, DATA)
INDEX = "model.safetensors.index.json"


def index(**weights: Any) -> dict[str, Any]:
    return {"weight_map": weights}


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "holds no .safetensors, .bin or .pt"),
    "a configuration alone": ({"config.json": {}}, "holds no .safetensors, .bin or .pt"),
    "weights of others": ({"tf_model.h5": b"", "model.onnx": b"", "weights.npz": b""}, "holds no .safetensors"),
    "a trainer's leavings": ({"training_args.bin": b"", "optimizer.pt": b""}, "holds no .safetensors"),
    "a shard and no index": ({"model-00001-of-00002.safetensors": GOOD}, f"no {INDEX}"),
    "two files and no index": ({"a.safetensors": GOOD, "b.safetensors": OTHER}, f"2 .safetensors files and no {INDEX}"),
    "empty index": ({INDEX: b""}, "is not JSON"),
    "index no JSON": ({INDEX: "{'weight_map': {}}"}, "is not JSON"),
    "index no UTF-8": ({INDEX: b'{"weight_map": "\xff"}'}, "is not JSON"),
    "index nested without end": ({INDEX: NESTED}, "is not JSON"),
    "index a list": ({INDEX: [1]}, "holds a list"),
    "index null": ({INDEX: None}, "holds a NoneType"),
    "no weight_map": ({INDEX: {"metadata": {}}}, "no weight_map"),
    "weight_map null": ({INDEX: {"weight_map": None}}, "no weight_map"),
    "weight_map a list": ({INDEX: {"weight_map": ["model.safetensors"]}}, "no weight_map"),
    "weight_map a text": ({INDEX: {"weight_map": "model.safetensors"}}, "no weight_map"),
    "weight_map empty": ({INDEX: index(), "model.safetensors": GOOD}, "no weight_map"),
    "a file that is a number": ({INDEX: index(w=1)}, "which is no file of weights"),
    "a file that is null": ({INDEX: index(w=None)}, "which is no file of weights"),
    "a file that is a list": ({INDEX: index(w=["model.safetensors"])}, "which is no file of weights"),
    "files of two types": ({INDEX: index(v=1, w="a.safetensors")}, "which is no file of weights"),
    "a missing shard": ({INDEX: index(w="a.safetensors")}, "names a.safetensors, which is missing"),
    "one of two shards": (
        {INDEX: index(v="a.safetensors", w="b.safetensors"), "a.safetensors": OTHER},
        "names b.safetensors, which is missing",
    ),
    "itself": ({INDEX: index(w=INDEX)}, "which is no file of weights"),
    "another index": ({INDEX: index(w="b.index.json"), "b.index.json": index(w=INDEX)}, "which is no file of weights"),
    "the configuration": ({INDEX: index(w="config.json"), "config.json": {}}, "which is no file of weights"),
    "no name": ({INDEX: index(w="")}, "which is no file of weights"),
    "a dot": ({INDEX: index(w=".")}, "which is no file of weights"),
    "the folder above": ({INDEX: index(w="..")}, "which is no file of weights"),
    "a file above": ({INDEX: index(w="../outside.safetensors")}, "which is no file of weights"),
    "a file above, by detours": ({INDEX: index(w="a/../../outside.safetensors")}, "which is no file of weights"),
    "a file below": ({INDEX: index(w="a/model.safetensors")}, "which is no file of weights"),
    "a file in a folder of its own name": ({INDEX: index(w="./model.safetensors")}, "which is no file of weights"),
    "an absolute name": ({INDEX: index(w="/etc/model.safetensors")}, "which is no file of weights"),
    "an address": ({INDEX: index(w="https://example.org/model.safetensors")}, "which is no file of weights"),
    "the name of a device": ({INDEX: index(w="/dev/zero")}, "which is no file of weights"),
    "a name with a zero byte": ({INDEX: index(w="a\0.safetensors")}, "names .*missing|no file of weights"),
    "a name too long": ({INDEX: index(w="a" * 10_000 + ".safetensors")}, "names .*missing|no file of weights"),
    "half a character": ({INDEX: '{"weight_map": {"w": "\\ud800.safetensors"}}'}, "names .*missing|no file of weights"),
    "a shard that is a GGUF file": ({INDEX: index(w="a.gguf"), "a.gguf": b"GGUF"}, "which is no file of weights"),
    "a tensor in two shards": (
        {INDEX: index(w="a.safetensors", v="b.safetensors"), "a.safetensors": GOOD, "b.safetensors": GOOD},
        "w is in a.safetensors and in b.safetensors",
    ),
    "a bad shard": (
        {INDEX: index(w="a.safetensors", v="b.safetensors"), "a.safetensors": GOOD, "b.safetensors": GOOD[:-1]},
        "b.safetensors: .*truncated",
    ),
    "an index of pickles": ({"pytorch_model.bin.index.json": index(w="../a.bin")}, "which is no file of weights"),
    "configuration empty": ({"model.safetensors": GOOD, "config.json": b""}, "config.json is not JSON"),
    "configuration cut short": ({"model.safetensors": GOOD, "config.json": '{"a": 1'}, "config.json is not JSON"),
    "configuration no UTF-8": ({"model.safetensors": GOOD, "config.json": b'{"a": "\xff"}'}, "config.json is not JSON"),
    "configuration nested": ({"model.safetensors": GOOD, "config.json": NESTED}, "config.json is not JSON"),
    "configuration a list": ({"model.safetensors": GOOD, "config.json": [1]}, "config.json holds a list"),
    "configuration a text": ({"model.safetensors": GOOD, "config.json": '"llama"'}, "config.json holds a str"),
    "configuration null": ({"model.safetensors": GOOD, "config.json": None}, "config.json holds a NoneType"),
    "an unknown method": (
        {"model.safetensors": GOOD, "config.json": {"quantization_config": {"quant_method": "magic"}}},
        "quantized by 'magic', which qcompile does not read",
    ),
    "a method that is a list": (
        {"model.safetensors": GOOD, "config.json": {"quantization_config": {"quant_method": ["awq"]}}},
        "which qcompile does not read",
    ),
    "a method that is a mapping": (
        {"model.safetensors": GOOD, "config.json": {"quantization_config": {"quant_method": {"a": 1}}}},
        "which qcompile does not read",
    ),
    "a side file that is a list": ({"model.safetensors": GOOD, "quantize_config.json": [1]}, "holds a list"),
    "a side file that is no JSON": ({"model.safetensors": GOOD, "quant_config.json": "x"}, "is not JSON"),
}
for method in ("awq", "gptq", "hqq", "torchao", "quanto", "compressed-tensors", "quark", "vptq", "bitsandbytes"):
    said = {"quantization_config": {"quant_method": method}}
    if method not in ("bitsandbytes", "compressed-tensors", "quark", "quanto", "hqq", "vptq"):
        FOLDERS[f"{method} without a quantized weight"] = ({"model.safetensors": GOOD, "config.json": said}, ".")


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path: Path, examine: Callable[..., int], case: str) -> None:
    files, message = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(GOOD)
    write(folder, files)
    with refused(message):
        examine(folder)


def test_what_is_no_file(tmp_path: Path, examine: Callable[..., int]) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with refused("holds no|model.safetensors"):
        examine(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with refused("holds no|model.safetensors"):
        examine(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with refused("holds no|model.safetensors"):
        examine(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with refused("holds no|model.safetensors"):
        examine(tmp_path)
    with refused("neither a folder nor"):
        examine(tmp_path / "nowhere")
    with refused("neither a folder nor"):
        examine(write(tmp_path, {"a.txt": b""}) / "a.txt")


def test_links_may_lead_out_of_the_folder(tmp_path: Path, examine: Callable[..., int]) -> None:
    """The hub's cache is made of them. What a link leads to is read as a checkpoint, and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "model" / "model.safetensors").symlink_to("../blob")
    assert examine(tmp_path / "model") == 0
    (tmp_path / "blob").write_text("root:x:0:0")
    with refused("cannot hold a header"):
        examine(tmp_path / "model")


# ---- configurations of models


CONFIGS: dict[str, Any] = {
    "hidden_size": ["64", None, -64, 0, 1.5, [64], {}, 2**33, 2**70],
    "num_attention_heads": ["4", None, -4, 0, 3.5, [4], {}, 2**40],
    "head_dim": ["16", -16, 0, 1.5, [16], {}, 2**33],
    "num_hidden_layers": ["1", -1, 1.5, [1], {}, 2**20],
    "intermediate_size": ["128", -1, 0, [128], {}, 2**70],
    "vocab_size": ["x", -1, 1.5, [], {}, 2**70],
    "model_type": ["no such model", 7, None, ["llama"], {}],
    "hidden_act": ["no such function", 7, ["silu"], {}],
    "architectures": [7, "LlamaForCausalLM", ["no such class"], [7], {"a": 1}],
    "rope_parameters": [7, "x", [1], {"rope_type": "x"}, {"rope_type": 7}],
    "dtype": ["float3", 7, ["float16"]],
    "quantization_config": [{"quant_method": "awq", "bits": "x", "group_size": [1], "version": 7}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in CONFIGS.items() for value in values], ids=repr
)
def test_configurations(tmp_path: Path, key: str, value: Any) -> None:
    """A value of another type is refused, or the model is the checkpoint's all the same."""
    fixture = CHECKPOINTS / "awq-gemm-notconvert"
    config = json.loads((fixture / "config.json").read_text())
    write(tmp_path, {"config.json": {**config, key: value}})
    (tmp_path / "model.safetensors").symlink_to(fixture / "model.safetensors")
    start = time.process_time()
    try:
        model = qcompile.load(str(tmp_path), dtype=torch.float32, progress=False)
        want = qcompile.load(str(fixture), dtype=torch.float32, progress=False).state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    except (CheckpointError, LoadError):
        pass
    assert time.process_time() - start < 2


# ---- GGUF


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


LLAMA = value("general.architecture", 8, string("llama"))
GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "four bytes": (b"GGUF", "no GGUF file"),
    "cut in the counts": (gguf([], [])[:20], "no GGUF file"),
    "safetensors": (GOOD, "starts with"),
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
def test_gguf(tmp_path: Path, examine: Callable[..., int], case: str) -> None:
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
def test_gguf_models(tmp_path: Path, case: str) -> None:
    write(tmp_path, {"model.gguf": gguf([place("token_embd.weight", (4, 64))], GGUF_MODELS[case], bytes(1024))})
    start = time.process_time()
    with pytest.raises((CheckpointError, LoadError)):
        qcompile.load(str(tmp_path / "model.gguf"), progress=False)
    assert time.process_time() - start < 2


def test_gguf_shards(tmp_path: Path, examine: Callable[..., int]) -> None:
    data = gguf([place("w")], [LLAMA], DATA)
    write(tmp_path, {"m-00001-of-99999.gguf": data, "n-00001-of-00002.gguf": data, "n-00002-of-00002.gguf": data})
    with refused(r"m-00002-of-99999\.gguf is missing"):
        examine(tmp_path / "m-00001-of-99999.gguf")
    with refused(r"w is in n-00001-of-00002\.gguf and in n-00002-of-00002\.gguf"):
        examine(tmp_path / "n-00001-of-00002.gguf")


# ---- pickles


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


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


def archive(path: Path, pickled: bytes, **options: Any) -> None:
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", DATA)


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(tmp_path: Path, examine: Callable[..., int], case: str) -> None:
    archive(tmp_path / "pytorch_model.bin", PICKLES[case])
    with refused(r"pytorch_model\.bin: " + ("it asks for .*nothing of it was run" if case in FORBIDDEN else "")):
        examine(tmp_path)


def test_a_good_pickle(tmp_path: Path, examine: Callable[..., int]) -> None:
    """What the cases above spoil."""
    archive(tmp_path / "pytorch_model.bin", rebuilt(storage()))
    assert examine(tmp_path) == 0


def test_nothing_is_run(tmp_path: Path, examine: Callable[..., int]) -> None:
    ran = tmp_path / "ran"
    for call in (Calls(os.mkdir, str(ran)), Calls(eval, f"open({str(ran)!r}, 'w')"), Calls(os.system, f"touch {ran}")):
        for protocol in range(6):
            archive(tmp_path / "pytorch_model.bin", pickle.dumps({"w": call}, protocol))
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
def test_pickles_of_endless_values(tmp_path: Path, examine: Callable[..., int], case: str) -> None:
    archive(tmp_path / "pytorch_model.bin", pickle.dumps(BOMBS[case], 2))
    with refused("without end"):
        examine(tmp_path)


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
def test_archives(tmp_path: Path, examine: Callable[..., int], case: str) -> None:
    data = ARCHIVES[case](tmp_path / "made")
    write(tmp_path, {"pytorch_model.bin": data})
    with refused(r"pytorch_model\.bin: "):
        examine(tmp_path)


# ---- formats: one tensor of a real checkpoint spoiled

# A fixture, a module of it and the tensors that make its weight.
FORMATS = {
    "aqlm-1x10-int16": "gate_proj codes codebooks scales",
    "awq-gemm-g128": "down_proj qweight qzeros scales",
    "awq-gemv-g32": "down_proj qweight qzeros scales",
    "awq-gemvfast-g64": "down_proj qweight qzeros scales",
    "awq-llmawq-g64": "down_proj qweight scaled_zeros scales",
    "bitnet-offline": "down_proj weight weight_scale",
    "bnb-int8": "down_proj weight SCB",
    "bnb-nf4": "down_proj weight weight.absmax weight.quant_state.bitsandbytes__nf4",
    "bnb-nf4-dq": "down_proj weight weight.absmax weight.nested_absmax weight.nested_quant_map",
    "ct-fp8-block": "down_proj weight weight_scale",
    "ct-fp8-static-kvcache": "down_proj weight weight_scale input_scale",
    "ct-int8-w4a8-int-quantized": "down_proj weight weight_scale",
    "ct-int8-w8a8-static": "down_proj weight weight_scale input_scale",
    "ct-mxfp4": "down_proj weight_packed weight_scale",
    "ct-nvfp4": "down_proj weight_packed weight_scale weight_global_scale input_global_scale",
    "ct-pack-w3-g32-sym": "down_proj weight_packed weight_scale weight_shape",
    "ct-pack-w4-g32-actorder-group": "down_proj weight_packed weight_scale weight_shape weight_g_idx",
    "ct-pack-w4-g32-asym": "down_proj weight_packed weight_scale weight_zero_point",
    "eetq-int8": "down_proj weight weight_scales",
    "fbgemm-fp8": "down_proj weight weight_scale",
    "fp8-block128": "down_proj weight weight_scale_inv",
    "fp8-block32-ue8m0": "down_proj weight weight_scale_inv",
    "fp8-tensor-dynamic": "down_proj weight weight_scale_inv",
    "gptq-v1-b3-g32-asym": "q_proj qweight qzeros scales",
    "gptq-v2-b4-g32-asym-actorder": "q_proj qweight qzeros scales g_idx",
    "hqq-b3-g64-axis0": "down_proj W_q scale zero shape axis group_size nbits",
    "hqq-b4-float-view-bf16": "down_proj W_q scale zero",
    "mxfp4-gptoss": "experts down_proj_blocks down_proj_scales",
    "quanto-float8": "down_proj weight._data weight._scale",
    "quanto-int4-g128": "down_proj weight._data._data weight._scale weight._shift",
    "quanto-int8-act-int8": "down_proj weight._data weight._scale input_scale output_scale",
    "quark-fp4-pergroup": "down_proj weight weight_scale",
    "quark-fp8-pertensor-static": "down_proj weight weight_scale input_scale",
    "quark-int4-perchannel": "down_proj weight weight_scale weight_zero_point",
    "quark-int8-pertensor-static": "down_proj weight weight_scale weight_zero_point input_scale",
    "quark-mxfp6-e2m3": "down_proj weight weight_scale",
    "quark-uint4-pergroup": "down_proj weight weight_scale weight_zero_point",
    "torchao-float8dyn-row": "v_proj _weight_qdata _weight_scale",
    "torchao-int4wo-plain-g32": "gate_proj _weight_qdata _weight_scale _weight_zero_point",
    "torchao-int8wo": "o_proj _weight_qdata _weight_scale _weight_zero_point",
    "vptq-v8-k256-r16": "down_proj indices centroids.weight res_centroids.weight perm weight_scale weight_bias",
}


def _nan(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize > 1:
        return torch.full_like(tensor, float("nan"))
    return torch.full(tensor.shape, 0x7F if tensor.dtype == torch.float8_e4m3fn else 0xFF).byte().view(tensor.dtype)


def _cast(tensor: Tensor) -> Tensor:
    return tensor.float().to(torch.int32) if tensor.is_floating_point() else tensor.float()


SPOILED: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "a row short": lambda tensor: tensor[:-1] if tensor.dim() > 1 else tensor.flatten()[:-1],
    "a column short": lambda tensor: tensor[..., :-1] if tensor.dim() else tensor.reshape(1).repeat(2),
    "cast": _cast,
    "NaN": _nan,
    "its largest code": lambda tensor: torch.full_like(tensor, torch.iinfo(tensor.dtype).max),
}
# Scales tell who shares them, so half of them are a coarser group, or one for all; what merely describes is not read
# where there is no doubt; and powers of two may be stored as floats.
ACCEPTED = {
    *("ct-fp8-block weight_scale: a column short", "ct-pack-w3-g32-sym weight_scale: a column short"),
    *("fp8-block128 weight_scale_inv: a column short", "quark-fp4-pergroup weight_scale: a column short"),
    *("ct-mxfp4 weight_scale: a column short", "quark-mxfp6-e2m3 weight_scale: a column short"),
    *("ct-mxfp4 weight_scale: cast", "quark-mxfp6-e2m3 weight_scale: cast"),
    *("hqq-b3-g64-axis0 nbits: cast", "hqq-b3-g64-axis0 W_q: cast"),
    *("quark-int4-perchannel weight_zero_point: missing", "quark-int8-pertensor-static weight_zero_point: missing"),
    *("quark-int8-pertensor-static weight_zero_point: a column short", "torchao-int8wo _weight_zero_point: cast"),
}
# Codes may have any value; these are not codes.
BOUNDED = ("g_idx", "perm", "shape", "axis", "group_size", "nbits", "_scales", "nf4")


# Scales as powers of two have a code that is no number, and no NaN.
POWERS = ("ct-mxfp4", "mxfp4-gptoss", "quark-mxfp6-e2m3")


def _cases() -> Iterator[str]:
    for fixture, text in FORMATS.items():
        for kind in text.split()[1:]:
            floating = fixture not in POWERS and ("scale" in kind or kind in ("zero", "SCB"))
            for damage in SPOILED:
                fits = {"NaN": floating, "its largest code": not floating and kind.endswith(BOUNDED)}.get(damage, True)
                if fits and (case := f"{fixture} {kind}: {damage}") not in ACCEPTED:
                    yield case


@pytest.mark.parametrize("case", list(_cases()))
def test_formats(tmp_path: Path, case: str) -> None:
    place, damage = case.split(": ")
    fixture, kind = place.split()
    module = FORMATS[fixture].split()[0]
    whole = CHECKPOINTS / fixture / "model.safetensors"
    tensors, metadata = load_file(whole), safe_open(whole, "pt").metadata()
    name = next(name for name in tensors if name.endswith(f"{module}.{kind}"))
    if (spoiled := SPOILED[damage](tensors.pop(name))) is not None:
        tensors[name] = spoiled.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    for side in (CHECKPOINTS / fixture).glob("*.json"):
        (tmp_path / side.name).symlink_to(side)
    with refused():
        qcompile.load(str(tmp_path), dtype=torch.float32, progress=False)


def test_enough_cases() -> None:
    count = sum(map(len, (SAFETENSORS, FOLDERS, GGUF, GGUF_MODELS, PICKLES, BOMBS, ARCHIVES, list(_cases()))))
    assert count > 700
