"""inspect, convert, and quantized checkpoints given to the other commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import qcompile
from qcompile import api, cli, cli_checkpoint, models
from qcompile.files.checkpoint import open_checkpoint

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


@pytest.fixture(scope="module")
def quantized(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_chat in the format gptq, with its tokenizer."""
    folder = tmp_path_factory.mktemp("quantized") / "gptq"
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["model"]["vocab"] = {"th" if index == 257 else t: index for t, index in said["model"]["vocab"].items()}
    said["model"]["merges"] = [["t", "h"]]  # GGUF has no empty lists
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)), bos_token="<s>", eos_token="</s>"
    )
    model = qcompile.load(str(tiny_chat), dtype=torch.float16, progress=False)
    model = qcompile.optimize(model, "i4/g32/sym", progress=False)
    qcompile.save(model, folder, "gptq", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def gguf(quantized: Path) -> Path:
    """The same as a .gguf file."""
    target = quantized.parent / "gguf"
    assert cli.main(["convert", str(quantized), str(target), "--to", "gguf"]) == 0
    return target / "model.gguf"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `optimize` gets, and leaves as it is: model and configuration."""
    seen: list[Any] = []
    monkeypatch.setattr(api, "optimize", lambda model, config, **_: seen.append((model, config)) or model)
    return seen


def same(one: Path, other: Path) -> bool:
    ours, theirs = (qcompile.dequantize(str(path)) for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# inspect


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(CHECKPOINTS / "awq-gemm-g128")]) == 0
    assert "7 of 12 parameters quantized" in capsys.readouterr().out
    assert cli.main(["inspect", str(CHECKPOINTS / "awq-gemm-g128"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "awq"


# convert


@pytest.mark.parametrize("format", ["qcompile", "compressed-tensors", "awq", "hqq", "gptq"])
def test_convert(quantized: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(quantized), str(tmp_path / "out"), "--to", format]) == 0
    assert "every weight is the same number" in capsys.readouterr().out
    assert same(quantized, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hi").input_ids
    before, after = (open_checkpoint(path).tensors for path in (quantized, tmp_path / "out"))
    assert after["model.norm.weight"].dtype == before["model.norm.weight"].dtype == torch.float16


def test_convert_to_float(quantized: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(quantized), str(tmp_path), "--to", "float"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = qcompile.dequantize(str(quantized))
    assert theirs.dtype == torch.float32
    assert all(torch.equal(tensor, want[name]) for name, tensor in theirs.state_dict().items())


def test_convert_gguf(quantized: Path, gguf: Path, tmp_path: Path) -> None:
    assert same(quantized, gguf)
    assert cli.main(["convert", str(gguf), str(tmp_path / "back"), "--to", "awq"]) == 0
    assert same(quantized, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_convert_in_place(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantized, folder)
    (folder / "README.md").write_text("mine")
    assert cli.main(["convert", str(folder), str(folder), "--to", "gguf"]) == 0
    assert same(quantized, folder)
    assert not (folder / "config.json").exists() and (folder / "README.md").read_text() == "mine"


def test_what_a_format_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(CHECKPOINTS / "hqq-b2-g16-axis1"), str(tmp_path / "out")
    assert cli.main(["convert", source, target, "--to", "gptq"]) == 2
    error = capsys.readouterr().err
    assert "7 of 7 weights have no exact form in gptq" in error and "its zero points are floats, such as" in error
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["convert", source, target, "--to", "gptq", "--requantize"]) == 0
    assert "model.layers.*.self_attn.q_proj.weight        1  " in capsys.readouterr().out


def test_a_float_checkpoint_has_nothing_to_convert(
    tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", str(tiny_chat), str(tmp_path / "out"), "--to", "gptq"]) == 2
    assert "the model has no quantized weights, which gptq is for" in capsys.readouterr().err


# The other commands


def test_generate_runs_what_is_quantized_already(
    quantized: Path, gguf: Path, given: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for path in (quantized, gguf):
        arguments = ["generate", str(path), "Hi", "--raw", "--max-new-tokens", "4", "--dtype", "float32"]
        assert cli.main(arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    for model, config in given:
        assert config.weights is None and "i4/g32/sym" in str(model)


def test_gguf_is_unpacked_where_weights_are_asked_for(gguf: Path, given: list[Any]) -> None:
    assert cli.main(["generate", str(gguf), "Hi", "--max-new-tokens", "2", "--weights", "u8/g64/asym"]) == 0
    ((model, config),) = given
    assert str(config.weights) == "u8/g64/asym" and model.lm_head.weight.is_leaf and "i4/g32/sym" not in str(model)


def test_plan_and_explain(quantized: Path, interpreted: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(quantized), "--json"]) == 0
    found = {row["path"]: row for row in json.loads(capsys.readouterr().out)["parameters"]}
    assert found["model.layers.0.mlp.up_proj.weight"]["spec"] == "i4/g32/sym"
    assert cli.main(["explain", str(quantized)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("qcompile report   LlamaForCausalLM   i4/g32/sym   on cpu") and "fuse_siblings" in text


def test_other_weights_need_the_float_original(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(quantized), "--weights", "u4/g64/asym"]) == 2
    assert "is quantized already (gptq)" in capsys.readouterr().err


def test_who_is_packed(tiny_chat: Path, tmp_path: Path) -> None:
    found = {
        name: cli_checkpoint.is_packed(models.find(str(CHECKPOINTS / name)))
        for name in ("gguf-f16", "gguf-q4_0", "quanto-int8", "hqq-native-pt", "awq-gemm-g128")
    }
    assert found == dict.fromkeys(found, True) | {"gguf-f16": False}
    assert not cli_checkpoint.is_packed(models.find(str(tiny_chat)))
    # Only a configuration: enough for a plan.
    shutil.copy(tiny_chat / "config.json", tmp_path)
    assert not cli_checkpoint.is_packed(models.find(str(tmp_path)))
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "quantization_config": {"quant_method": "x"}})
    )
    assert cli_checkpoint.is_packed(models.find(str(tmp_path)))
