"""gguf: llama.cpp's own files; every architecture that is read, beside transformers' model."""

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcompile
from qcompile import models
from qcompile.errors import CheckpointError, LoadError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats._gguf_blocks import SIZES
from qcompile.formats.gguf import _weight
from qcompile.storage import packed_parameters, packed_tensor

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
Q8_0, F32 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 30, 20]])


@pytest.mark.parametrize(
    "name",
    [
        *("gguf-f16", "gguf-q4_0", "gguf-q5_0", "gguf-q8_0", "gguf-iq4_nl", "gguf-q2_k", "gguf-q4_k", "gguf-q5_k"),
        "gguf-mix-q4_k_m",
    ],
)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name)


def test_compiled(check_compiled: Callable) -> None:
    check_compiled("gguf-mix-q4_k_m")


# Architectures: a tiny model of transformers', written as llama.cpp's converter writes it.

SIZES_OF_TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GLOBAL = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0}
FACTORS = {"long_factor": [1.5 + i / 8 for i in range(12)], "short_factor": [1.0 + i / 16 for i in range(12)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 5000.0, "attention_factor": 1.25, "partial_rotary_factor": 0.75}

# name: architecture, transformers' configuration, further metadata
TINY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {"rope.freq_base": 10000.0}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"rope.freq_base": 10000.0}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "llama-more-kv-heads": ("llama", {"num_key_value_heads": 2}, {"rope.freq_base": 10000.0}),
    "mistral": (
        "mistral",
        {"sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"attention.sliding_window": 4},
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "head_dim": 32}, {"rope.freq_base": 10000.0}),
    "qwen2-yarn": (
        "qwen2",
        {"head_dim": 32, "rope_parameters": YARN},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}, {"rope.freq_base": 10000.0}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 64,
        }
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"attention.sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3",
        {"sliding_window": 4, "num_hidden_layers": 6, "query_pre_attn_scalar": 64}
        | {
            "rope_parameters": {
                "full_attention": GLOBAL,
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            }
        },
        {
            "attention.sliding_window": 4,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "rope.freq_base": 3000.0,
        },
    ),
    "phi3": (
        "phi3",
        {"head_dim": 32, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"attention.sliding_window": 0, "rope.dimension_count": 32},
    ),
    "phi3-longrope": (
        "phi3",
        {
            "head_dim": 32,
            "original_max_position_embeddings": 4,
            "sliding_window": 6,
            "rope_parameters": LONGROPE | FACTORS,
        },
        {
            "attention.sliding_window": 6,
            "rope.dimension_count": 24,
            "rope.scaling.attn_factor": 1.25,
            "rope.scaling.original_context_length": 4,
        },
    ),
}


def make(architecture: str, values: Mapping[str, Any]) -> nn.Module:
    """A random model of transformers', with norms that are not all ones."""
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SIZES_OF_TINY, **values}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.2))
        if name.endswith("norm.weight"):
            parameter.data.add_(0.0 if architecture.startswith("gemma") else 1.0)
    return model.requires_grad_(False)


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    architecture: str,
    model: nn.Module,
    more: Mapping[str, Any],
    tensors: Mapping[str, Any] = {},
    kinds: Mapping[str, str] = {},
    split: int = 0,
) -> None:
    """As llama.cpp's converter and quantizer do. Matrices are made Q8_0, or blocks of any bytes of what `kinds` says,
    and `model` becomes what is written. Keys of `more` are below the architecture, or begin with a slash."""
    c: Any = model.config
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    metadata = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": getattr(c, "head_dim", c.hidden_size // c.num_attention_heads),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "/tokenizer.ggml.bos_token_id": 1,
        "/tokenizer.ggml.eos_token_id": 2,
        "/tokenizer.ggml.padding_token_id": 0,
        **more,
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key[1:] if key[0] == "/" else f"{architecture}.{key}", value)
    known = gguf.MODEL_ARCH[{"mistral": "LLAMA"}.get(architecture, architecture.upper())]
    names = gguf.get_tensor_name_map(known, c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        stored, array = f"{names.get_name(module)}.{suffix}", parameter.data.numpy()
        kind = GGMLQuantizationType[kinds.get(stored, "Q8_0")] if array.ndim == 2 else F32
        if kind != F32:
            array[:] = gguf.dequantize(blocks(array, kind), kind)
        if architecture in ("llama", "mistral") and module.rpartition(".")[2] in heads:
            array = pairs(array, heads[module.rpartition(".")[2]])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        writer.add_tensor(stored, array.copy() if kind == F32 else blocks(array, kind), raw_dtype=kind)
    for name, array in tensors.items():
        writer.add_tensor(name, np.array(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == Q8_0:
        return gguf.quants.quantize(array, kind)
    elements, size = SIZES[kind.name]
    return np.random.default_rng(0).integers(0, 64, (len(array), array.shape[1] // elements * size), np.uint8)


def load(path: Path, **options: Any) -> Any:
    return qcompile.load(str(path), dtype=torch.float32, progress=False, **options)


@pytest.mark.parametrize("case", TINY)
def test_architectures(tmp_path: Path, case: str) -> None:
    architecture, values, more = TINY[case]
    model, path = make(architecture, values), tmp_path / "m.gguf"
    factors = {f"rope_factors_{side}.weight": FACTORS[f"{side}_factor"] for side in ("long", "short")}
    write(path, architecture, model, more, factors if case == "phi3-longrope" else {})
    loaded = load(path)
    assert type(loaded) is type(model)
    assert packed_parameters(loaded.get_input_embeddings()).keys() == {"weight"}
    for name, weight in qcompile.dequantize(loaded).items():
        # Norms of Gemma were stored as 1 + weight in float32.
        assert torch.allclose(weight, model.state_dict()[name], rtol=0, atol=1e-7), name
    assert torch.allclose(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits, rtol=1e-4, atol=1e-4)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (1, 2, 0)


def test_tied_embedding_is_packed_once(tmp_path: Path) -> None:
    model, path = make("llama", {"tie_word_embeddings": True}), tmp_path / "m.gguf"
    write(path, "llama", model, {})
    loaded = load(path)
    assert loaded.lm_head.packed_weight is loaded.model.embed_tokens.packed_weight
    assert str(packed_tensor(loaded.lm_head, "weight").spec) == "i8/g32/sym"


def test_vocabulary_is_that_of_the_embedding(tmp_path: Path) -> None:
    """Embeddings may be padded: their rows count, not the tokens or what the metadata says."""
    model, path = make("llama", {}), tmp_path / "m.gguf"
    write(path, "llama", model, {"vocab_size": 60})
    assert load(path).config.vocab_size == 64


def test_end_of_turn_ends_too(tmp_path: Path) -> None:
    model, path = make("llama", {}), tmp_path / "m.gguf"
    write(path, "llama", model, {"/tokenizer.ggml.eot_token_id": 7})
    assert load(path).generation_config.eos_token_id == [2, 7]


# Rotary embeddings


def llama3(**values: Any) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    return {**scaling, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, **values}


@pytest.mark.parametrize("values", [{}, {"factor": 32.0}, {"original_max_position_embeddings": 64}], ids=str)
def test_llama3(tmp_path: Path, values: dict[str, Any]) -> None:
    """The scaling is stored as one tensor of divisors, for published parameters and for others."""
    model, path = make("llama", {"rope_parameters": llama3(**values)}), tmp_path / "m.gguf"
    scaled = model.get_submodule("model.rotary_emb").get_buffer("inv_freq")
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    write(path, "llama", model, {}, {"rope_freqs.weight": (plain / scaled).tolist()})
    loaded = load(path)
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, scaled, rtol=1e-6, atol=0)
    assert torch.allclose(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits, rtol=1e-4, atol=1e-4)
    published = "original_max_position_embeddings" not in values
    assert loaded.config.rope_parameters["rope_type"] == ("llama3" if published else "default")


def test_two_scalings_of_the_rotary_embedding(tmp_path: Path) -> None:
    more = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    wrong(tmp_path, "both scale the rotary embedding", more, {"rope_freqs.weight": [3.0] * 32})


def test_nvfp4_of_two_levels(tmp_path: Path) -> None:
    model, path = make("llama", {}), tmp_path / "m.gguf"
    write(path, "llama", model, {}, {"blk.1.ffn_up.scale": [0.25]}, {"blk.1.ffn_up.weight": "NVFP4"})
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(qcompile.dequantize(load(path))[name], model.state_dict()[name] * 0.25)


# What is wrong is named


def wrong(
    folder: Path,
    message: str,
    more: Mapping[str, Any] = {},
    tensors: Mapping[str, Any] = {},
    kinds: Mapping[str, str] = {},
) -> None:
    write(folder / "m.gguf", "llama", make("llama", {}), more, tensors, kinds)
    with pytest.raises(CheckpointError, match=message):
        load(folder / "m.gguf")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"block_count": 3}, "block_count is 3, and 2 layers have tensors"),
        ({"block_count": None}, "block_count is None, not a positive integer"),
        ({"block_count": "2"}, "block_count is '2', not a positive integer"),
        ({"context_length": 0}, "context_length is 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan, not a positive number"),
        ({"embedding_length": 2**31 - 1}, r"token_embd\.weight is \(64, 64\), the file's metadata makes it"),
        ({"attention.key_length": 2**31 - 1}, r"blk\.0\.attn_q\.weight is"),
        ({"attention.head_count": 2**31 - 1}, r"blk\.0\.attn_q\.weight is"),
        ({"attention.head_count_kv": [1, 2]}, "head_count_kv differs from layer to layer"),
        ({"feed_forward_length": 2**31 - 1}, r"blk\.0\.ffn_down\.weight is"),
        ({"rope.dimension_count": 32}, r"rope\.dimension_count is 32, a head has 64"),
        ({"rope.scaling.type": "su", "rope.scaling.factor": 2.0}, r"rope\.scaling\.type is 'su'"),
        ({"expert_count": 8}, "experts are not read yet"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_metadata(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    wrong(tmp_path, message, more)


def test_same_number_for_each_layer(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", make("llama", {}), {"attention.head_count_kv": [1, 1]})
    assert load(tmp_path / "m.gguf").config.num_key_value_heads == 1


def test_unknown_architecture() -> None:
    with pytest.raises(CheckpointError, match=r"architecture 'blocks'; qcompile reads llama, .*float original"):
        load(CHECKPOINTS / "gguf-blocks" / "model.gguf")


def test_codebooks_are_not_read() -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "gguf-blocks" / "model.gguf")
    with pytest.raises(CheckpointError, match=r"iq3_s is of type IQ3_S, whose codebook .*Q4_K_M"):
        _weight(checkpoint, "iq3_s", "model.layers.0.mlp.up_proj.weight", lambda rows: rows)


def test_unknown_tensor(tmp_path: Path) -> None:
    wrong(
        tmp_path, r"nothing reads 1 of its tensors: blk\.0\.attn_extra\.weight", {}, {"blk.0.attn_extra.weight": [1.0]}
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(24, 1100), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_metadata(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    """Whatever is overwritten, a model loads or an error of ours says why it does not."""
    data = bytearray((CHECKPOINTS / "gguf-q4_0" / "model.gguf").read_bytes())
    for place, value in flips:
        data[place] = value
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError, LoadError):
        load(path)


def test_split_into_several_files(tmp_path: Path) -> None:
    model = make("llama", {})
    write(tmp_path / "m.gguf", "llama", model, {}, split=5)
    assert len(list(tmp_path.iterdir())) > 2
    assert torch.allclose(load(tmp_path)(INPUT_IDS).logits, model(INPUT_IDS).logits, rtol=1e-4, atol=1e-4)


# A real model


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(models.DEMO_PACKAGE) is None, reason=f"needs {models.DEMO_INSTALL}")
def test_smollm2() -> None:
    """Packed and compiled, it writes what transformers' float model writes, whose weights are the same in every bit."""
    source = models.find_demo()
    tokenizer, dense = models.load_tokenizer(source), models.load(source, "float32")
    packed = qcompile.load(str(source), dtype=torch.float32, progress=False)
    expected, weights = dense.state_dict(), qcompile.dequantize(packed)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": 64, "do_sample": False}
    text = qcompile.optimize(packed, progress=False).generate(**inputs, **options)
    assert torch.equal(text, dense.generate(**inputs, **options))
