"""inspect_checkpoint()."""

import json
import shutil
from pathlib import Path

import pytest

from qcompile.errors import LoadError
from qcompile.files.checkpoint import Checkpoint
from qcompile.inspect_checkpoint import inspect_checkpoint

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


def test_text(golden) -> None:
    found = inspect_checkpoint(str(CHECKPOINTS / "ct-mixed-precision"))
    golden("inspect_checkpoint", str(found).replace(str(CHECKPOINTS), "checkpoints"))


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir()))
def test_every_checkpoint(name: str) -> None:
    if name == "gguf-blocks":
        pytest.skip("tensors of no model")
    found = inspect_checkpoint(str(CHECKPOINTS / name))
    assert any(row.quantized for row in found.rows) == (name != "gguf-f16")
    assert json.dumps(found.to_dict()) and len(str(found).splitlines()) > 5
    assert sum(row.nbytes for row in found.rows) <= sum(found.files.values())


def test_weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or whole(self, name))
    inspect_checkpoint(str(CHECKPOINTS / "gptq-v1-b4-g32-actorder"))
    assert read and {name.rpartition(".")[2] for name in read} == {"g_idx", "qzeros"}


def test_without_a_configuration(tmp_path: Path, tiny_llama) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "config.json").unlink()
    found = inspect_checkpoint(str(tmp_path))
    assert found.method is None and {row.stored for row in found.rows} == {"float32"}
    assert "all are floats" in str(found) and f"in {len(found.files)} files" in str(found)


def test_shapes_come_from_the_model_where_files_lack_them(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "quanto-int4-g128", tmp_path / "model")
    rows = {row.path: row for row in inspect_checkpoint(str(tmp_path / "model")).rows}
    assert rows["model.layers.0.mlp.down_proj.weight"].shape == (256, 32)


def test_what_is_not_here() -> None:
    with pytest.raises(LoadError, match=r"is no folder and no \.gguf file here; download it first: hf download a/b"):
        inspect_checkpoint("a/b")
