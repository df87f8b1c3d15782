"""Names in checkpoints that are not the model's: experts, and models without their prefix."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM

import qcompile
from qcompile.algorithms import rtn
from qcompile.errors import CheckpointError
from qcompile.quant.spec import QSpec
from qcompile.writers.native import pieces

INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 60, 70]])
EXPERT = re.compile(r"experts\.\d+\.w[123]\.weight$")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A float Mixtral as its checkpoints are: a linear an expert."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=12)).eval()
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def quantize(folder: Path, spec: str) -> Path:
    """The checkpoint in qcompile's format with its experts quantized one by one."""
    tensors, weights = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if EXPERT.search(name):
            packed = rtn.quantize(tensor, QSpec.parse(spec))
            tensors.update({f"{name}.{key}": piece.contiguous() for key, piece in pieces(packed).items()})
            weights[name] = {"spec": spec, "shape": list(packed.shape)}
        else:
            tensors[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qcompile", "version": 1, "weights": weights}
    target = folder.with_name("packed")
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


def load(folder: Path) -> torch.nn.Module:
    return qcompile.load(str(folder), dtype=torch.float32, progress=False)


def test_float_experts_are_joined(mixtral: Path) -> None:
    want = MixtralForCausalLM.from_pretrained(mixtral)
    got = load(mixtral)
    assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in want.state_dict().items())


@pytest.mark.parametrize("spec", ["u4/g32/asym_int", "i8/row/sym", "fp8_e4m3/tensor/sym", "fp8_e4m3/b32x32/sym"])
def test_packed_experts_lie_in_one_parameter(mixtral: Path, spec: str) -> None:
    model = load(quantize(mixtral, spec))
    weights, original = qcompile.dequantize(model), load_file(mixtral / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts"
    for expert in (0, 2, 11):
        want = {kind: rtn.quantize(original[f"{prefix}.{expert}.{kind}.weight"], QSpec.parse(spec)).dequantize()
                for kind in ("w1", "w2", "w3")}  # fmt: skip
        gate, up = weights["model.layers.1.mlp.experts.gate_up_proj"][expert].chunk(2)
        assert torch.equal(gate, want["w1"]) and torch.equal(up, want["w3"])
        assert torch.equal(weights["model.layers.1.mlp.experts.down_proj"][expert], want["w2"])
    reference = MixtralForCausalLM(model.config).eval()
    reference.load_state_dict(weights)
    torch.testing.assert_close(model(INPUT_IDS).logits, reference(INPUT_IDS).logits, rtol=1e-4, atol=1e-4)


def test_experts_of_two_specs(mixtral: Path) -> None:
    folder = quantize(mixtral, "u4/g32/asym_int")
    config = json.loads((folder / "config.json").read_text())
    name = next(name for name in config["quantization_config"]["weights"] if name.endswith("3.w1.weight"))
    config["quantization_config"]["weights"][name]["spec"] = "u4/g64/asym_int"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: its experts are u4/g32/asym_int, u4/g64/asym_int"):
        load(folder)


def test_base_model_without_its_prefix(tmp_path: Path, tiny_llama) -> None:
    whole: LlamaForCausalLM = tiny_llama(tie_word_embeddings=True)
    base: LlamaModel = whole.model
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    torch.testing.assert_close(load(tmp_path)(INPUT_IDS).logits, whole(INPUT_IDS).logits)
