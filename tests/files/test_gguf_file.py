"""gguf_file: what the package gguf writes is read as it says, and damaged files are CheckpointErrors."""

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


@settings(max_examples=200, deadline=1000)
@given(cut=st.integers(0, 4576), flips=st.lists(st.tuples(st.integers(0, 4575), st.integers(0, 255)), max_size=4))
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]) -> None:
    """Whatever is cut off or overwritten, a file opens or is a CheckpointError."""
    data = bytearray((CHECKPOINTS / "gguf-f16" / "model.gguf").read_bytes())
    for place, value in flips:
        data[place] = value
    try:
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        path.write_bytes(data if flips else data[:cut])
        file = GgufFile(path)
        values: list[Any] = [file.read(name) for name in file.tensors]
        assert len(values) == len(file.tensors)
    except CheckpointError:
        pass
