"""A checkpoint's tensors in a model's places, and the account of what is left."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcompile import formats, models
from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.filler import Filler
from qcompile.formats import Stored
from qcompile.storage import packed_in

CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "awq-gemm-notconvert"
NORM = "model.norm.weight"

Edit = Callable[[dict[str, Tensor]], object]


def filler_of(folder: Path, edit: Edit = lambda tensors: None) -> Filler:
    """For the checkpoint, with its tensors edited."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    method = formats.find(checkpoint)
    assert method is not None
    model = models.empty(models.find(str(folder)))
    return Filler(model, checkpoint, list(method.weights(checkpoint)), torch.device("cpu"), quantize_inputs=True)


class Bar:
    """Counts, as a progress bar does."""

    def __init__(self) -> None:
        self.count = 0

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass

    def update(self) -> None:
        self.count += 1


def test_everything_has_its_place(tmp_path: Path) -> None:
    filler, bar = filler_of(tmp_path), Bar()
    filler.fill(bar)
    assert filler.left() == []
    assert bar.count == len(filler.places)
    assert not any(tensor.is_meta for tensor in (*filler.model.parameters(), *filler.model.buffers()))
    stored = {entry.path for entry in filler.stored if isinstance(entry, Stored)}
    assert {path for packed in packed_in(filler.model) for path in packed.parameter.paths} == stored


@pytest.mark.parametrize(
    ("edit", "left"),
    [
        (lambda tensors: tensors.update(surplus=torch.ones(3)), "nothing reads 1 of its tensors: surplus"),
        (lambda tensors: tensors.pop(NORM), f"nothing fills 1 parameters: {NORM}"),
        (lambda tensors: tensors.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(3)}), None),
    ],
)
def test_left(tmp_path: Path, edit: Edit, left: str | None) -> None:
    filler = filler_of(tmp_path, edit)
    filler.fill(Bar())
    assert filler.left() == ([left] if left else [])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(5, dtype=torch.float16), f"{NORM} is (5,), the model needs (32,)"),
        (torch.ones(32, dtype=torch.int32), f"{NORM} is torch.int32, the model needs torch.bfloat16"),
    ],
)
def test_a_tensor_that_does_not_fit(tmp_path: Path, tensor: Tensor, message: str) -> None:
    filler = filler_of(tmp_path, lambda tensors: tensors.update({NORM: tensor}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        filler.fill(Bar())


def test_a_packed_weight_that_does_not_fit(tmp_path: Path) -> None:
    filler = filler_of(tmp_path)
    weight = next(entry for entry in filler.stored if isinstance(entry, Stored))
    with pytest.raises(CheckpointError, match=r"nowhere\.weight is quantized in the checkpoint; the model has no such"):
        filler.pack(replace(weight, path="nowhere.weight"))
    message = f"{weight.path} is (8, 3) as {weight.spec}; the model needs ("
    with pytest.raises(CheckpointError, match=re.escape(message)):
        filler.pack(replace(weight, shape=(8, 3)))
