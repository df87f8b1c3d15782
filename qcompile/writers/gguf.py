"""GGUF: llama.cpp's models in one file, with their configuration and tokenizer. formats/gguf.py has the source.

Written are the architectures that are Llama but for their biases and norms. Rows of q and k of Llama and Mistral go
from halves to pairs, as llama.cpp's rotary embedding reads them; whole rows move, so blocks stay as they are. Dense
matrices keep their dtype, vectors are float32.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.errors import UnsupportedError
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup
from qcompile.quant.spec import QSpec, Zero
from qcompile.writers import _gguf_tokenizer as tokenizer
from qcompile.writers._gguf_blocks import Blocks, blocks
from qcompile.writers._integers import Unwritable, no_codebooks, weights_only
from qcompile.writers.contents import Contents, Weight, Writer, same

# By model_type: the architecture, and whether rows of q and k lie in pairs.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Gguf(Writer):
    name = "gguf"
    scales = torch.float16
    in_a_file = True

    def check(self, contents: Contents) -> None:
        config = contents.config
        if (kind := config.get("model_type")) not in ARCHITECTURES:
            raise UnsupportedError(f"gguf is written for {', '.join(ARCHITECTURES)}, not for {kind}")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"gguf: {kind} models have silu, this one has {config['hidden_act']}")
        if "sliding_attention" in (config.get("layer_types") or ()) or (
            kind == "mistral" and config.get("sliding_window")
        ):
            raise UnsupportedError(
                f"gguf: the architecture {ARCHITECTURES[kind][0]} has no sliding window, this model has"
            )
        _rope(config)
        for path in (*contents.dense, *(weight.path for weight in contents.weights)):
            if _name(path) is None:
                raise UnsupportedError(f"gguf: the architecture {ARCHITECTURES[kind][0]} has no {path}")

    def refuses(self, weight: Weight) -> str | None:
        try:
            _blocks(weight)
        except Unwritable as reason:
            return str(reason)
        return None

    def nearest(self, weight: Weight) -> QSpec | None:
        if weight.tensor.columns % 32 or len(weight.tensor.shape) != 2 or weight.transposed:
            return None
        bits = next(bits for bits in (4, 5, 8) if bits >= weight.spec.element.bits)
        if bits == 8 or (weight.spec.zero is Zero.NONE and not weight.spec.element.is_float):
            return QSpec(Element.parse(f"i{bits}"), PerGroup(32), Zero.NONE)
        return QSpec(Element.parse(f"u{bits}"), PerGroup(32), Zero.SHIFT)

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        import gguf

        config = contents.config
        architecture, pairs = ARCHITECTURES[config["model_type"]]
        writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
        tensors: dict[str, tuple[str, Callable[[], Tensor]]] = {}  # type of blocks, or dtype, and what makes it
        for path, tensor in contents.dense.items():
            made = tensor if tensor.dim() > 1 else tensor.float()
            tensors[path] = (_TYPES[made.dtype], same(made))
        for weight in contents.weights:
            one = _blocks(weight)
            tensors[weight.path] = (one.kind, one.make)
            if (factor := one.factor) is not None:
                tensors[f"{weight.module}.scale"] = ("F32", same(factor))
        for key, value in _metadata(config, {kind for kind, _ in tensors.values()}).items():
            _put(writer, key.replace("{arch}", architecture), value)
        kinds = Counter(kind for kind, _ in tensors.values() if kind not in _TYPES.values())
        writer.add_file_type(_file_type(gguf, kinds))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in tokenizer.metadata(contents.tokenizer, config["vocab_size"]).items():
            _put(writer, key, value)
        if (factors := _rope(config)[1]) is not None:
            tensors["rope_freqs.weight"] = ("F32", same(factors))
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
        shapes = {weight.path: weight.tensor.shape for weight in contents.weights}
        for path, (kind, make) in tensors.items():
            shape = shapes.get(path) or make().shape
            elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            row = [*shape[:-1], shape[-1] // elements * size]
            writer.add_tensor_info(
                _name(path) or path, row, np.dtype(np.uint8), math.prod(row), gguf.GGMLQuantizationType[kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for path, (_, make) in tensors.items():
            rows = _in_pairs(make(), heads.get(path.split(".")[-2])) if pairs else make()
            writer.write_tensor_data(rows.contiguous().cpu().view(torch.uint8).numpy())
        writer.close()


_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _blocks(weight: Weight) -> Blocks:
    no_codebooks(weight)
    if len(weight.tensor.shape) != 2 or weight.transposed or weight.kind == "other":
        raise Unwritable("it holds the weights of linears and embeddings only")
    found = blocks(weight)
    weights_only(weight)
    return found


def _name(path: str) -> str | None:
    """llama.cpp's name of a parameter; None if it has none."""
    module, _, suffix = path.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{suffix}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{layer[1]}.{_LAYER[layer[2]]}.{suffix}" if layer and layer[2] in _LAYER else None


def _in_pairs(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of q and k from halves to pairs."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _metadata(config: Mapping[str, Any], kinds: set[str]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "{arch}.block_count": config["num_hidden_layers"],
        "{arch}.context_length": config["max_position_embeddings"],
        "{arch}.embedding_length": config["hidden_size"],
        "{arch}.feed_forward_length": config["intermediate_size"],
        "{arch}.attention.head_count": heads,
        "{arch}.attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "{arch}.attention.key_length": head_dim,
        "{arch}.attention.value_length": head_dim,
        "{arch}.rope.dimension_count": head_dim,
        "{arch}.vocab_size": config["vocab_size"],
        **{f"{{arch}}.rope.{key}": value for key, value in _rope(config)[0].items()},
    }


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The rotary embedding's metadata, and the divisors of its frequencies, which Llama 3's scaling comes as. Raises
    UnsupportedError for a scaling that the format does not know."""
    rope = config.get("rope_parameters") or {}
    kind, base = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "linear", "yarn", "llama3"):
        raise UnsupportedError(
            f"gguf: a rotary embedding scaled by {rope}; default, linear, yarn and llama3 are written"
        )
    found: dict[str, Any] = {"freq_base": base}
    if kind == "llama3":
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        frequencies = base ** -(torch.arange(0, width, 2).double() / width)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return found, (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
    if kind != "default":
        found |= {"scaling.type": kind, "scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        known = {"original_max_position_embeddings", "beta_fast", "beta_slow", "factor", "rope_type", "rope_theta"}
        if more := {key for key, value in rope.items() if value is not None} - known:
            raise UnsupportedError(f"gguf: yarn with {', '.join(sorted(more))} is not written")
        context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["scaling.original_context_length"] = context
        for side in ("fast", "slow"):
            if rope.get(f"beta_{side}") is not None:
                found[f"scaling.yarn_beta_{side}"] = float(rope[f"beta_{side}"])
    return found, None


def _file_type(gguf: Any, kinds: Counter[str]) -> int:
    """What most weights are; readers go by each tensor's own type."""
    most = kinds.most_common(1)[0][0] if kinds else "F16"
    for name in (f"MOSTLY_{most}", f"MOSTLY_{most}_M", "MOSTLY_F16"):
        if name in gguf.LlamaFileType.__members__:
            return gguf.LlamaFileType[name]
    return gguf.LlamaFileType.ALL_F32


def _put(writer: Any, key: str, value: Any) -> None:
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adds.get(type(value), writer.add_array)(key, value)
