"""Fusion counts as formulas of the number of layers, and outputs equal to the unfused model, architecture by
architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf

import qcompile
from qcompile.plan import example_inputs

SIZES: dict[str, Any] = dict(hidden_size=64, num_attention_heads=4, vocab_size=100)
LLAMA: dict[str, Any] = dict(
    **SIZES, intermediate_size=128, num_key_value_heads=2, max_position_embeddings=256, head_dim=16
)


@dataclass(frozen=True)
class Architecture:
    """How to make a model of n layers, and how many rewrites each pass makes of it: (per layer, besides)."""

    make: Callable[[int], torch.nn.Module]
    linears: tuple[int, int]
    siblings: tuple[int, int]
    norms: tuple[int, int]
    residual_norms: tuple[int, int]
    ropes: int
    mlps: tuple[int, int]
    attentions: int


def causal(config: Any, model: Any, sizes: dict, **more: Any) -> Callable[[int], torch.nn.Module]:
    return lambda layers: model(config(**sizes, num_hidden_layers=layers, **more))


ARCHITECTURES = {
    "llama": Architecture(
        causal(hf.LlamaConfig, hf.LlamaForCausalLM, LLAMA), (7, 0), (2, 0), (2, 1), (2, 0), 2, (1, 0), 1
    ),
    "qwen2": Architecture(
        causal(hf.Qwen2Config, hf.Qwen2ForCausalLM, {k: v for k, v in LLAMA.items() if k != "head_dim"}),
        (7, 0), (2, 0), (2, 1), (2, 0), 2, (1, 0), 1,
    ),
    "qwen3": Architecture(
        # Two more norms a layer: over the heads of Q and K, between the wide linear and the rope.
        causal(hf.Qwen3Config, hf.Qwen3ForCausalLM, LLAMA), (7, 0), (2, 0), (4, 1), (2, 0), 2, (1, 0), 1
    ),
    "mistral": Architecture(
        causal(hf.MistralConfig, hf.MistralForCausalLM, LLAMA, sliding_window=16),
        (7, 0), (2, 0), (2, 1), (2, 0), 2, (1, 0), 1,
    ),
    "gemma2": Architecture(
        # With soft-capped attention scores, and every other layer with a sliding window.
        causal(hf.Gemma2Config, hf.Gemma2ForCausalLM, LLAMA, sliding_window=16),
        (7, 0), (2, 0), (4, 1), (2, 0), 2, (1, 0), 1,
    ),
    "gemma3": Architecture(
        causal(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, LLAMA, sliding_window=16),
        (7, 0), (2, 0), (6, 1), (2, 0), 2, (1, 0), 1,
    ),
    "phi3": Architecture(
        # QKV and gate/up are one linear each already.
        causal(hf.Phi3Config, hf.Phi3ForCausalLM, {k: v for k, v in LLAMA.items() if k != "head_dim"}, pad_token_id=0),
        (4, 0), (0, 0), (2, 1), (2, 0), 2, (1, 0), 1,
    ),
    "gpt2": Architecture(
        lambda n: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=n, n_head=4, vocab_size=100, n_positions=128)),
        (4, 0), (0, 0), (2, 1), (2, 0), 0, (1, 0), 1,
    ),
    "gpt_neox": Architecture(
        # Attention and MLP read the same sum side by side: one residual add a layer.
        causal(hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, SIZES, intermediate_size=128),
        (4, 0), (0, 0), (2, 1), (1, 0), 2, (1, 0), 1,
    ),
    "opt": Architecture(
        lambda n: hf.OPTForCausalLM(
            hf.OPTConfig(**SIZES, num_hidden_layers=n, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128)
        ),
        # The first norm comes after the sum of token and position embeddings.
        (6, 0), (1, 0), (2, 1), (2, 1), 0, (1, 0), 1,
    ),
    "bert": Architecture(
        # The pooler is a linear with tanh; the embeddings have a norm of their own.
        lambda n: hf.BertForSequenceClassification(
            hf.BertConfig(**SIZES, num_hidden_layers=n, intermediate_size=128, max_position_embeddings=64)
        ),
        (6, 1), (1, 0), (2, 1), (2, 0), 0, (1, 1), 1,
    ),
    "vit": Architecture(
        lambda n: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=64, num_hidden_layers=n, num_attention_heads=4, intermediate_size=128, image_size=32,
                patch_size=8,
            )
        ),
        (6, 0), (1, 0), (2, 1), (2, 0), 0, (1, 0), 1,
    ),
}  # fmt: skip


def check_counts(model: torch.nn.Module, arch: Architecture, layers: int) -> None:
    (outcome,) = qcompile.explain(model).outcomes
    found = {result.name: len(result.rewrites) for result in outcome.passes}

    def times(per_layer: tuple[int, int]) -> int:
        return per_layer[0] * layers + per_layer[1]

    assert {key: found[key] for key in found if key.startswith(("quantize", "fuse", "recognize_norm"))} == {
        "recognize_norm": times(arch.norms),
        "quantize_linear": times(arch.linears),
        "quantize_embedding": 0,
        "quantize_activation": 0,
        "fuse_siblings": times(arch.siblings),
        "fuse_norm": times(arch.residual_norms),
        "fuse_rope": arch.ropes * layers,
        "fuse_mlp": times(arch.mlps),
        "fuse_gated_codes": 0,  # without rounded activations
        "fuse_attention": arch.attentions * layers,
        "fuse_attention_codes": 0,  # without a quantized cache
        "fuse_rope_cache": 0,  # without a cache
        "fuse_attention_cache": 0,  # without a cache
        "fuse_linear": 0,  # many rows
        "fuse_chain": 0,
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_in_bfloat16(name: str) -> None:
    """Of one layer, where the other test has two."""
    arch = ARCHITECTURES[name]
    model = arch.make(1).to(torch.bfloat16)
    check_counts(qcompile.optimize(model, "u4/g32/asym", algorithm="rtn", progress=False), arch, layers=1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_and_equal_to_eager(name: str, interpreted: None) -> None:
    """The fused graph against the same quantized weights in the untouched float model, in float64."""
    torch.manual_seed(0)
    float_model = ARCHITECTURES[name].make(2).eval()
    model = qcompile.optimize(copy.deepcopy(float_model), "u4/g32/asym", algorithm="rtn", progress=False)
    float_model.load_state_dict(qcompile.dequantize(model))
    inputs = example_inputs(model)
    assert inputs is not None
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.randint(3, 100, (2, 9))
    else:
        inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    with torch.no_grad():
        got = model(**inputs).logits
        want = float_model.double()(**{name: in_float64(value) for name, value in inputs.items()}).logits
    assert not model.forward.eager
    check_counts(model, ARCHITECTURES[name], layers=2)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def in_float64(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
