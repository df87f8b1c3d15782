"""from_pretrained, save_pretrained and push_to_hub of Transformers."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, HqqConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

import qcompile
from qcompile.errors import CheckpointError, ConfigError, UnsupportedError

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 60, 70]])

pytestmark = pytest.mark.usefixtures("interpreted")


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = qcompile.dequantize(one), qcompile.dequantize(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def saved(folder: Path, model: Any, config: Any = "u4/g64/asym") -> torch.nn.Module:
    model = qcompile.optimize(model, config, progress=False)
    qcompile.save(model, folder)
    return model


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u3/g32/asym_int", "u4/g64/asym/scale(u8/o16/asym)", "nf4/g64/sym"])
def test_from_pretrained_of_a_saved_model(tmp_path: Path, tiny_llama, spec: str) -> None:
    model = saved(tmp_path / "one", tiny_llama(), spec)
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    loaded, info = both
    assert not any(info.values()), info
    same(loaded, model)
    assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)
    assert qcompile.dump(loaded) == qcompile.dump(model)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_ties(tmp_path: Path, tiny_llama) -> None:
    config = qcompile.Config("u4/g64/asym", include=["embed_tokens", "lm_head"])
    model = saved(tmp_path, tiny_llama(tie_word_embeddings=True), config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.packed_weight is loaded.model.embed_tokens.packed_weight
    same(loaded, model)


def test_weights_that_lie_transposed(tmp_path: Path) -> None:
    sizes = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=1)
    model = saved(tmp_path, GPT2LMHeadModel(sizes).eval())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(loaded, model)
    assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_rounded_activations(tmp_path: Path) -> None:
    model = qcompile.load(str(CHECKPOINTS / "ct-int8-w8a8-static"), dtype=torch.float32, progress=False)
    qcompile.save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_without_its_head(tmp_path: Path, tiny_llama) -> None:
    model = saved(tmp_path, tiny_llama(), qcompile.Config("u4/g64/asym", include=["lm_head"]))
    loaded = AutoModel.from_pretrained(tmp_path)
    want = model(INPUT_IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(loaded(INPUT_IDS).last_hidden_state, want)


def test_shards(tmp_path: Path, tiny_llama) -> None:
    model = saved(tmp_path / "one", tiny_llama())
    qcompile.save(model, tmp_path / "two", largest_shard=8000)
    assert len(list((tmp_path / "two").glob("model-*-of-*.safetensors"))) > 2
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), model)


@pytest.mark.parametrize("name", ["hqq-b4-g64-axis1", "hqq-b3-g64-axis0", "hqq-dynamic", "hqq-b4-float-view-bf16"])
def test_checkpoints_of_hqq(tmp_path: Path, name: str) -> None:
    both: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32, output_loading_info=True)
    model, info = both
    assert not any(info.values()), info
    same(model, qcompile.load(str(CHECKPOINTS / name), dtype=torch.float32, progress=False))
    model.save_pretrained(tmp_path)
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_an_hqq_config_for_a_float_checkpoint_stays_with_transformers() -> None:
    quantizer = AUTO_QUANTIZER_MAPPING["hqq"](HqqConfig(nbits=4), pre_quantized=False)
    assert type(quantizer) is HqqHfQuantizer and not quantizer.pre_quantized


@pytest.mark.parametrize("as_dict", [False, True])
def test_quantization_config(tmp_path: Path, tiny_llama, as_dict: bool) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    config: Any = qcompile.Config("u4/g64/asym", exclude=["layers.0.mlp"])
    given = {"quant_method": "qcompile", "weights": "u4/g64/asym", "exclude": ["layers.0.mlp"]} if as_dict else config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=given)
    want = qcompile.optimize(tiny_llama(), config, progress=False)
    same(model, want)
    assert torch.equal(model(INPUT_IDS).logits, want(INPUT_IDS).logits)
    assert qcompile.explain(model).to_dict()["config"] == config.to_dict()
    assert json.loads(model.config.to_json_string())["quantization_config"]["weights"] == "u4/g64/asym"
    model.save_pretrained(tmp_path / "packed")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), want)


def test_a_config_that_matches_nothing(tmp_path: Path, tiny_llama) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="unknown config key 'wieghts'"):
        given = {"quant_method": "qcompile", "wieghts": "u4/g64/asym"}
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    with pytest.raises(ConfigError, match=r"layers\.9"):
        config = qcompile.Config("u4/g64/asym", exclude=["layers.9"])
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_several_devices(tmp_path: Path, tiny_llama) -> None:
    saved(tmp_path, tiny_llama())
    with pytest.raises(UnsupportedError, match="packed weights lie on one device"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "disk"})


def test_damaged_files(tmp_path: Path, tiny_llama) -> None:
    saved(tmp_path, tiny_llama())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight.scale"].fill_(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.scale holds numbers that are infinite or NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del tensors["model.layers.0.mlp.up_proj.weight.scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.scale is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_save_pretrained_writes_the_files_of_save(tmp_path: Path, tiny_llama) -> None:
    model = saved(tmp_path / "one", tiny_llama())
    model.save_pretrained(tmp_path / "two")
    qcompile.load(str(tmp_path / "one"), dtype=torch.float32, progress=False).save_pretrained(tmp_path / "three")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "four")
    assert (
        digest(tmp_path / "one") == digest(tmp_path / "two") == digest(tmp_path / "three") == digest(tmp_path / "four")
    )
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    with pytest.raises(ConfigError, match="takes no variant"):
        model.save_pretrained(tmp_path / "other", variant="fp16")


def test_save_pretrained_of_a_float_model(tmp_path: Path, tiny_llama) -> None:
    qcompile.optimize(tiny_llama(), progress=False).save_pretrained(tmp_path / "one")
    tiny_llama().save_pretrained(tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_push_to_hub(tmp_path: Path, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pushed = saved(tmp_path / "one", tiny_llama()), {}

    def upload(self: Any, folder: str, repo: str, **options: Any) -> None:
        pushed[repo] = digest(Path(folder))

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": name})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("me/first")
    model.save_pretrained(tmp_path / "second", push_to_hub=True)
    for files in pushed.values():
        files.pop("README.md")
    assert pushed == {"me/first": digest(tmp_path / "one"), "second": digest(tmp_path / "one")}


ORDERS = {
    "qcompile first": "import qcompile; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import qcompile",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_qcompile_is_enough(tmp_path: Path, tiny_llama, order: str) -> None:
    saved(tmp_path, tiny_llama())
    code = f"{ORDERS[order]}; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).forward.plan"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
