"""load()."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.errors import CheckpointError

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 100, 200]])


def test_siblings_are_stored_together_by_optimize() -> None:
    model = qcompile.load(str(CHECKPOINTS / "awq-gemm-g128"), dtype=torch.float32, progress=False)
    before, eager = qcompile.dequantize(model), model(INPUT_IDS).logits
    qcompile.optimize(model, progress=False)
    plan = {entry.path.removeprefix("model.layers.0."): entry for entry in model.forward.plan.entries}
    assert plan["self_attn.q_proj.weight"].group == plan["self_attn.v_proj.weight"].group is not None
    assert plan["mlp.gate_proj.weight"].group == plan["mlp.up_proj.weight"].group is not None
    assert plan["mlp.down_proj.weight"].packed and plan["mlp.down_proj.weight"].group is None
    after = qcompile.dequantize(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(model(INPUT_IDS).logits, eager, rtol=1e-4, atol=1e-4)
    assert "fuse_siblings" in qcompile.dump(model)


def test_a_tensor_that_nothing_reads(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINTS / "awq-gemm-notconvert", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.surplus": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"nothing reads 1 of its tensors: model\.layers\.0\.surplus"):
        qcompile.load(str(folder), progress=False)
    with pytest.warns(UserWarning, match="nothing reads 1 of its tensors"):
        assert qcompile.load(str(folder), progress=False, strict=False) is not None


def test_a_method_that_nobody_reads(tmp_path: Path, tiny_llama) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "spqr"}}))
    with pytest.raises(CheckpointError, match=r"quantized by 'spqr', which qcompile does not read .*float original"):
        qcompile.load(str(tmp_path), progress=False)


def test_float_checkpoint(tmp_path: Path, tiny_llama) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "float")
    loaded = qcompile.load(str(tmp_path / "float"), dtype=torch.float32, progress=False)
    torch.testing.assert_close(loaded(INPUT_IDS % 50).logits, model(INPUT_IDS % 50).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_sharded_and_tied(tmp_path: Path, tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    loaded = qcompile.load(str(tmp_path / "sharded"), dtype=torch.float32, progress=False)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(INPUT_IDS % 50).logits, model(INPUT_IDS % 50).logits)


MEMORY = """
import json, sys
from pathlib import Path
import torch, transformers.models.llama.modeling_llama
from qcompile.load import load

def held(what):
    return int(Path("/proc/self/status").read_text().partition(what + ":")[2].split()[0]) >> 10

before = held("VmRSS")
model = load(sys.argv[1], dtype=torch.bfloat16, progress=False)
for tensor in (*model.parameters(), *model.buffers()):
    tensor.flatten()[::512].any()
tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
print(json.dumps([held("VmHWM") - before, sum(tensors.values()) >> 20]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_is_in_memory(tmp_path: Path) -> None:
    """AWQ's words become rows of codes; the file's pages are not held beside them. Sizes are in MiB."""
    width, layers = 2048, 8
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "dtype": "float16"}
    config |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "tie_word_embeddings": True}
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    linears = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    linears |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], (width, 2 * width)) | {
        "mlp.down_proj": (2 * width, width)
    }
    tensors = {"model.embed_tokens.weight": torch.ones(64, width).half(), "model.norm.weight": torch.ones(width).half()}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        tensors |= {
            f"{place}.{name}_layernorm.weight": torch.ones(width).half() for name in ("input", "post_attention")
        }
        for name, (columns, rows) in linears.items():
            tensors[f"{place}.{name}.qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
            tensors[f"{place}.{name}.qzeros"] = torch.zeros(columns // 128, rows // 8, dtype=torch.int32)
            tensors[f"{place}.{name}.scales"] = torch.ones(columns // 128, rows).half()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    peak, resident = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 140 < resident < 200
    assert peak < resident + 120, "loading held the file's pages too"
