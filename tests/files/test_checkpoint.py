"""checkpoint: bad folders, indices, links and configurations are named within two seconds; none becomes a model."""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.errors import CheckpointError, LoadError

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def safetensors(name: str) -> bytes:
    """A good file of one tensor."""
    text = json.dumps({name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


GOOD = safetensors("w")
OTHER = safetensors("v")
NESTED = b'{"a":' * 100_000
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
def test_folders(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], write: Callable[..., Any], case: str
) -> None:
    files, message = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(GOOD)
    write(folder, files)
    with refused(message):
        examine(folder)


def test_what_is_no_file(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any], write: Callable[..., Any]
) -> None:
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


def test_links_may_lead_out_of_the_folder(
    tmp_path: Path, examine: Callable[..., int], refused: Callable[..., Any]
) -> None:
    """The hub's cache is made of them. What a link leads to is read as a checkpoint, and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "model" / "model.safetensors").symlink_to("../blob")
    assert examine(tmp_path / "model") == 0
    (tmp_path / "blob").write_text("root:x:0:0")
    with refused("cannot hold a header"):
        examine(tmp_path / "model")


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
def test_configurations(tmp_path: Path, write: Callable[..., Any], key: str, value: Any) -> None:
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


def test_enough_cases() -> None:
    assert len(FOLDERS) + sum(map(len, CONFIGS.values())) >= 120
