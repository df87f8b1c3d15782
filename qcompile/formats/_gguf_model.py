"""What a GGUF file says about its model: the architecture, its configuration, and the names of its tensors.

Keys and names are llama.cpp's (https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py), their meanings those
of its converter, convert_hf_to_gguf.py, and of its model files, src/models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._gguf_blocks import SIZES

LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp's, in transformers' terms.

    permuted  rows of q and k lie in pairs, as llama.cpp's rotary embedding reads them, not in halves
    offset    norms are stored as 1 + weight
    names     where the tensors of a layer have another name than in most
    """

    model: str
    kind: str
    permuted: bool = False
    offset: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    def path(self, tensor: str) -> str | None:
        """The parameter that a tensor is, None for one that is not known."""
        module, _, suffix = tensor.rpartition(".")
        if suffix not in ("weight", "bias"):
            return None
        if module in _TOP:
            return f"{_TOP[module]}.{suffix}"
        if not (layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", module)):
            return None
        name = self.names.get(layer[2]) or _LAYER.get(layer[2])
        return f"model.layers.{layer[1]}.{name}.{suffix}" if name else None


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FOUR_NORMS = {"ffn_norm": "pre_feedforward_layernorm"}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "mistral": Architecture("mistral", "MistralForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma": Architecture("gemma", "GemmaForCausalLM", offset=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", offset=True, names=_FOUR_NORMS),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", offset=True, names=_FOUR_NORMS),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", names={"ffn_up": "mlp.gate_up_proj"}),
}


class Metadata:
    """The metadata of a checkpoint, typed and checked. Keys are those after the architecture's name.

    Raises CheckpointError, naming the key, for what is missing or of another type.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.name = str(checkpoint.metadata.get("general.architecture"))
        if self.name not in ARCHITECTURES:
            raise CheckpointError(
                f"the GGUF file is of architecture {self.name!r}; qcompile reads {', '.join(ARCHITECTURES)}. "
                "Take the model's float original and quantize it with qcompile.optimize"
            )
        self.architecture = ARCHITECTURES[self.name]
        if self.get("expert_count", 0):
            raise CheckpointError(f"{self.name}.expert_count is {self.get('expert_count')}; experts are not read yet")
        self.heads = self.integer("attention.head_count")
        self.kv_heads = self.integer("attention.head_count_kv", self.heads)
        self.hidden = self.integer("embedding_length")
        self.head_dim = self.integer("attention.key_length", self.hidden // self.heads)
        self.rope_base = self.number("rope.freq_base", 10000.0)

    def get(self, key: str, default: Any = None) -> Any:
        """As it is; a number that is given layer by layer must be the same for all."""
        value = self.checkpoint.metadata.get(f"{self.name}.{key}", default)
        if not isinstance(value, np.ndarray):
            return value
        if len(value) == 0 or (value != value[0]).any():
            raise CheckpointError(f"{self.name}.{key} differs from layer to layer, which is not read yet")
        return value[0].item()

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= LARGEST:
            raise CheckpointError(f"{self.name}.{key} is {value!r}, not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.name}.{key} is {value!r}, not a positive number")
        return float(value)

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.checkpoint.metadata


def shape(checkpoint: Checkpoint, tensor: str) -> tuple[int, ...]:
    """The shape of a tensor in elements."""
    info = checkpoint.need(tensor)
    if not info.blocks:
        return info.shape
    elements, size = SIZES[info.blocks]
    return (*info.shape[:-1], info.shape[-1] // size * elements)


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration as in a config.json of transformers'. Sizes are held against the tensors, so that a model made
    from it is not larger than the file."""
    m = Metadata(checkpoint)
    layers = {layer[1] for name in checkpoint.tensors if (layer := re.match(r"blk\.(\d+)\.", name))}
    if m.integer("block_count") != len(layers):
        raise CheckpointError(
            f"{m.name}.block_count is {m.integer('block_count')}, and {len(layers)} layers have tensors"
        )
    intermediate = m.integer("feed_forward_length")
    vocabulary = shape(checkpoint, "token_embd.weight")[0]
    expected = {"token_embd": (vocabulary, m.hidden), "blk.0.ffn_down": (m.hidden, intermediate)}
    if m.name == "phi3":
        expected["blk.0.attn_qkv"] = ((m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden)
    else:
        expected["blk.0.attn_q"] = (m.heads * m.head_dim, m.hidden)
        expected["blk.0.attn_k"] = (m.kv_heads * m.head_dim, m.hidden)
    for name, needs in expected.items():
        if (found := shape(checkpoint, f"{name}.weight")) != needs:
            raise CheckpointError(f"{name}.weight is {found}, the file's metadata makes it {needs}")
    values: dict[str, Any] = {
        "model_type": m.architecture.model,
        "architectures": [m.architecture.kind],
        "vocab_size": vocabulary,
        "hidden_size": m.hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": len(layers),
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in checkpoint.tensors,
        "rope_parameters": _rope(m),
        **_special_tokens(checkpoint, vocabulary),
    }
    if "blk.0.attn_output.bias" in checkpoint.tensors:
        values["attention_bias"] = True
    if "blk.0.ffn_up.bias" in checkpoint.tensors:
        values["mlp_bias"] = True
    more = {"mistral": _mistral, "gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3}.get(m.name)
    return values | more(m) if more else values


def _mistral(m: Metadata) -> dict[str, Any]:
    return {"sliding_window": m.get("attention.sliding_window")}


def _gemma2(m: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": m.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": m.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale(m, 46),
    }


def _gemma3(m: Metadata) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": m.number("rope.freq_base_swa", 10000.0)}
    pattern = m.checkpoint.metadata.get("gemma3.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        layers = {"layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern]}
    else:
        layers = {"sliding_window_pattern": m.integer("attention.sliding_window_pattern", 6)}
    return {
        **layers,
        "sliding_window": m.integer("attention.sliding_window"),
        "final_logit_softcapping": m.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scale(m, 62),
        "rope_parameters": {"full_attention": _rope(m), "sliding_attention": local},
    }


def _query_scale(m: Metadata, layers_of_27b: int) -> int:
    """Not in the metadata: llama.cpp knows the 27B models, which divide by the mean width of a head, by their depth."""
    return m.hidden // m.heads if m.integer("block_count") == layers_of_27b else m.head_dim


def _phi3(m: Metadata) -> dict[str, Any]:
    rope = _rope(m)
    rope["partial_rotary_factor"] = m.integer("rope.dimension_count", m.head_dim) / m.head_dim
    context = m.integer("rope.scaling.original_context_length", m.integer("context_length"))
    tensors = m.checkpoint.tensors
    if "rope_factors_long.weight" in tensors:
        rope["rope_type"] = "longrope"
        for length in ("long", "short"):
            name = f"rope_factors_{length}.weight"
            m.checkpoint.need(name, (m.integer("rope.dimension_count", m.head_dim) // 2,))
            rope[f"{length}_factor"] = m.checkpoint.read(name).double().tolist()
        if m.has("rope.scaling.attn_factor"):
            rope["attention_factor"] = m.number("rope.scaling.attn_factor")
        rope["original_max_position_embeddings"] = context
    window = m.get("attention.sliding_window")
    return {"rope_parameters": rope, "original_max_position_embeddings": context, "sliding_window": window or None}


def _rope(m: Metadata) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": m.rope_base}
    if m.name != "phi3" and (width := m.integer("rope.dimension_count", m.head_dim)) != m.head_dim:
        raise CheckpointError(f"{m.name}.rope.dimension_count is {width}, a head has {m.head_dim}")
    kind = m.get("rope.scaling.type", "linear" if m.has("rope.scaling.factor") else "none")
    if kind in ("none", "longrope"):  # longrope's numbers are tensors, as are Llama 3's
        return rope | (llama3(m) or {})
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{m.name}.rope.scaling.type is {kind!r}; none, linear, yarn and longrope are read")
    rope.update(rope_type=kind, factor=m.number("rope.scaling.factor"))
    if kind == "yarn":
        rope["original_max_position_embeddings"] = m.integer("rope.scaling.original_context_length")
        for side in ("fast", "slow"):
            if m.has(f"rope.scaling.yarn_beta_{side}"):
                rope[f"beta_{side}"] = m.number(f"rope.scaling.yarn_beta_{side}")
    return rope


def llama3(m: Metadata) -> dict[str, Any] | None:
    """Llama 3's scaling of the rotary embedding, of which the file has only the divisors of the frequencies; None where
    they are others than those of the models that Meta published."""
    if "rope_freqs.weight" not in m.checkpoint.tensors:
        return None
    m.checkpoint.need("rope_freqs.weight", (m.head_dim // 2,), torch.float32)
    stored = m.checkpoint.read("rope_freqs.weight").double()
    factor, low, high, context = float(stored.max()), 1.0, 4.0, 8192
    frequencies = m.rope_base ** -(torch.arange(0, m.head_dim, 2).double() / m.head_dim)
    smooth = ((context * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5):
        return None
    names = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {**names, "original_max_position_embeddings": context}


def _special_tokens(checkpoint: Checkpoint, vocabulary: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("pad", "padding")):
        token = checkpoint.metadata.get(f"tokenizer.ggml.{key}_token_id")
        found[f"{name}_token_id"] = token if type(token) is int and 0 <= token < vocabulary else None
    # Chat models end their turns with a token of its own.
    if (turn := found.pop("eot_token_id")) is not None and turn != found["eos_token_id"]:
        found["eos_token_id"] = turn if found["eos_token_id"] is None else [found["eos_token_id"], turn]
    return found
