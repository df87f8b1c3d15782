"""Every checkpoint in tests/checkpoints, written again in every format that can hold it, and read back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import CheckpointError, UnsupportedError
from qcompile.load import load
from qcompile.writers import WRITERS

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
# Weights alone: an architecture that is nobody's.
FOLDERS = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir() and path.name != "gguf-blocks")
# What must not be refused: how many of the other formats hold the weights of a kind of checkpoint.
HELD = {
    **dict.fromkeys(["awq-gemm-g128", "awq-gemv-g32", "awq-gemvfast-g64", "awq-llmawq-g64", "quark-awqcompat"], 7),
    **dict.fromkeys(["gptq-v1-b4-g32-asym", "gptq-v1-b3-g32-asym", "quark-uint4-pergroup", "ct-pack-w4-g32-sym"], 7),
    **dict.fromkeys(["gptq-v1-dynamic", "torchao-int8wo", "eetq-int8", "quark-int8-pergroup"], 6),
    **dict.fromkeys(["gptq-v1-b4-g32-actorder", "hqq-b3-g64-axis0", "ct-nvfp4", "ct-mxfp4", "gguf-q4_k"], 3),
}


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], nn.Module]:
    """The model of a checkpoint; the last one is kept."""
    last: dict[str, nn.Module] = {}

    def run(name: str) -> nn.Module:
        if name not in last:
            last.clear()
            last[name] = load(str(CHECKPOINTS / name), dtype="stored", progress=False)
        return last[name]

    return run


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_again(model_of: Callable, tmp_path: Path, name: str) -> None:
    try:
        model = model_of(name)
    except CheckpointError as error:
        pytest.skip(str(error))
    want, held = qcompile.dequantize(model), 0
    for writer in WRITERS:
        folder = tmp_path / writer.name
        try:
            qcompile.save(model, folder, format=writer.name)
        except UnsupportedError as error:
            assert writer.name not in ("qcompile", "float") and not folder.exists(), error
            continue
        held += 1
        got = qcompile.dequantize(load(str(folder), dtype="stored", progress=False))
        assert got.keys() == want.keys(), writer.name
        assert not [path for path in want if not torch.equal(want[path], got[path])], writer.name
    assert held == HELD.get(name, held)


def test_dense_tensors_keep_their_dtypes(model_of: Callable, tmp_path: Path) -> None:
    from qcompile.files.checkpoint import open_checkpoint

    qcompile.save(model_of("gguf-q4_k"), tmp_path, format="qcompile")
    tensors = open_checkpoint(tmp_path).tensors
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float16
