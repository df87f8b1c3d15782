"""save()."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile import algorithms
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.quant.spec import QSpec
from qcompile.storage import Parameter, put
from qcompile.stores import ScaledActivation

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 60, 70]])


def load(folder: Path) -> torch.nn.Module:
    return qcompile.load(str(folder), dtype=torch.float32, progress=False)


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = qcompile.dequantize(one), qcompile.dequantize(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(one(INPUT_IDS).logits, other(INPUT_IDS).logits)


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u3/g32/asym_int", "u4/g64/asym/scale(u8/o16/asym)", "nf4/g64/sym"])
def test_own_format_holds_every_spec(tmp_path: Path, tiny_llama, spec: str) -> None:
    model = qcompile.optimize(tiny_llama(), spec, progress=False)
    qcompile.save(model, tmp_path / "one")
    loaded = load(tmp_path / "one")
    ours, theirs = qcompile.dequantize(model), qcompile.dequantize(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    qcompile.save(loaded, tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_shards_and_ties(tmp_path: Path, tiny_llama) -> None:
    config = qcompile.Config("u4/g64/asym", include=["embed_tokens", "lm_head"])
    model = qcompile.optimize(tiny_llama(tie_word_embeddings=True), config, progress=False)
    qcompile.save(model, tmp_path / "one", largest_shard=8000)
    assert len(list((tmp_path / "one").glob("model-*-of-*.safetensors"))) > 2
    loaded = load(tmp_path / "one")
    assert loaded.lm_head.packed_weight is loaded.model.embed_tokens.packed_weight
    assert qcompile.dequantize(loaded)["lm_head.weight"].equal(qcompile.dequantize(model)["lm_head.weight"])


def test_other_files_of_the_folder_stay(tmp_path: Path, tiny_llama) -> None:
    model = qcompile.optimize(tiny_llama(), "u4/g64/asym", progress=False)
    folder = tmp_path / "model"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "model-00001-of-00009.safetensors").write_text("of an older checkpoint")
    qcompile.save(model, folder)
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failure_leaves_the_old_one(tmp_path: Path, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qcompile.optimize(tiny_llama(), "u4/g64/asym", progress=False)
    qcompile.save(model, tmp_path / "model")
    before = digest(tmp_path / "model")
    monkeypatch.setattr("qcompile.files.write.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qcompile.save(model, tmp_path / "model", largest_shard=5000)
    assert digest(tmp_path / "model") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_unknown_format(tmp_path: Path, tiny_llama) -> None:
    with pytest.raises(ConfigError, match="unknown format 'onnx'; known: qcompile"):
        qcompile.save(tiny_llama(), tmp_path, format="onnx")


KILLED = """
import os, random, signal, sys, time, torch
from pathlib import Path
from qcompile.files.checkpoint import open_checkpoint
from qcompile.files.write import replacing, write_shards

torch.set_num_threads(1)
folder, rounds, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)

def save(number):
    with replacing(folder) as fresh:
        write_shards(fresh, {f"t{i}": lambda: torch.full((4096,), number) for i in range(6)}, 40000, {})

save(0)
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        for number in range(1, 10**6):
            save(number)
    time.sleep(draw.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checkpoint = open_checkpoint(folder)
    found = {int(checkpoint.read(name)[0]) for name in checkpoint.tensors}
    assert len(checkpoint.tensors) == 6 and len(found) == 1, (found, sorted(checkpoint.tensors))
save(0)
assert os.listdir(folder.parent) == [folder.name], os.listdir(folder.parent)
"""


def test_killed_at_any_time_it_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    """Six tensors in six shards, all of one save: a mixture would show as two numbers."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model"), "200"], check=True, timeout=600)


def test_what_load_put_into_the_model(tmp_path: Path, tiny_llama) -> None:
    model = qcompile.optimize(tiny_llama().half(), "i4/g32/sym", progress=False)
    model.model.layers[0].mlp.act_fn = ScaledActivation(torch.nn.SiLU(), 128, torch.float16).to_empty(device="cpu")
    for format in ("gptq", "compressed-tensors", "hqq", "float"):
        with pytest.raises(UnsupportedError, match=rf"mlp\.act_fn divides by scales, .* which {format} cannot say"):
            qcompile.save(model, tmp_path / "one", format=format)
    for format in ("qcompile", "awq"):
        qcompile.save(model, tmp_path / format, format=format)
    model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(UnsupportedError, match=r"model\.rotary_emb has frequencies"):
        qcompile.save(model, tmp_path / "one")


def test_a_quantized_head_of_a_tied_model(tmp_path: Path, tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=True).half().requires_grad_(False)
    tensor = algorithms.quantize(model.lm_head.weight, QSpec.parse("i8/g32/sym"), "rtn")
    put(model, [Parameter(("lm_head.weight",), tuple(model.lm_head.weight.shape), torch.float16)], [tensor])
    for format in ("qcompile", "compressed-tensors", "hqq", "gguf", "float"):
        qcompile.save(model, tmp_path / format, format=format)
        loaded = qcompile.load(str(tmp_path / format), dtype="stored", progress=False)
        ours, theirs = qcompile.dequantize(model), qcompile.dequantize(loaded)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert loaded.config.tie_word_embeddings is False
