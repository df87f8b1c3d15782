"""Prompts as calls of a few lengths on a GPU, where the recording of one call serves all others of its length.

A prompt is made longer by tokens behind it. No token attends to a later one, and what these write into the cache is
hidden until the text comes there and writes over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.quant.activation import ActivationSpec
from qcompile.runtime import runner_of
from qcompile.stores import ActivationRounding

# More tokens, of all sequences together, keep the GPU busier than Python takes to launch: 0.9 ms a layer on an H100's
# host, of Llama-3-8B's shape in u4/g64.
MOST = 1024
# Linears of many rows are compiled for multiples of sixteen, and again for other numbers.
SHORTEST = 16


def refuses(model: Any, config: Any, input_ids: Tensor, given: Mapping[str, Any]) -> str | None:
    """Why a first call over an empty cache, with transformers' arguments for it, is not made longer; None if it may."""
    mask, text_config = given.get("attention_mask"), model.config.get_text_config()
    if input_ids.shape[1] == 1:
        return "one token is what steps take"
    if config.prefill_chunk_size is not None:
        return "the prompt comes in chunks"
    if mask is None or mask.shape != input_ids.shape:
        return "the mask covers other tokens"
    if given.get("logits_to_keep") != 1:
        return "the model gives the logits of all tokens"
    if model._forward_hooks or model._forward_pre_hooks:
        return "hooks see the model's arguments"
    if getattr(text_config, "max_position_embeddings", None) is None:
        return "nobody says how many positions the model has"
    if not getattr(text_config, "is_causal", True):
        return "tokens attend to later ones"
    runner = runner_of(model)
    specs = {module.spec for module in model.modules() if isinstance(module, ActivationRounding)}
    if runner is not None and runner.config.activations is not None:
        specs.add(str(runner.config.activations))
    if any(_is_of_all_tokens(ActivationSpec.parse(spec)) for spec in specs):
        return "activations of all tokens are rounded together"
    return None


def length_of(model: Any, input_ids: Tensor, room: int) -> int:
    """The length of the call: a multiple of an eighth of the next power of two, of sixteen for long prompts, as far as
    cache and positions reach."""
    batch, length = input_ids.shape
    step = max(SHORTEST, (1 << (length - 1).bit_length()) // 8) if length <= MOST else SHORTEST
    longer = min(-(-length // step) * step, room, model.config.get_text_config().max_position_embeddings)
    return longer if length < longer and (batch * longer <= MOST or length > MOST) else length


def lengthened(input_ids: Tensor, given: Mapping[str, Any], length: int) -> tuple[Tensor, dict[str, Any]]:
    """The call with so many tokens in all, which still gives the logits of the last of `input_ids`."""
    more = length - input_ids.shape[1]
    longer = {**given, "logits_to_keep": torch.full((1,), input_ids.shape[1] - 1, device=input_ids.device)}
    longer["attention_mask"] = with_ones(given["attention_mask"], length)
    if (position := given.get("position_ids")) is not None:
        behind = torch.arange(1, more + 1, device=position.device, dtype=position.dtype)
        longer["position_ids"] = torch.cat([position, position[..., -1:] + behind], -1)
    return torch.cat([input_ids, input_ids[:, -1:].expand(-1, more)], 1), longer


def with_ones(mask: Tensor, length: int) -> Tensor:
    """A mask [batch, tokens] for more tokens, which it does not hide."""
    return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], dim=1)


def _is_of_all_tokens(spec: ActivationSpec) -> bool:
    """Whether what becomes of a token depends on others: an outlier among them keeps its whole column as it is."""
    return spec.outliers is not None or (spec.granularity == "tensor" and not spec.static)
