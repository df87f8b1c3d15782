"""QuantizedStaticLayer, and generate() over caches of such layers."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qcompile
from qcompile.ops.row_codes import CODES, dequantize_rows, quantize_rows, quantize_rows_by
from qcompile.quantized_layer import QuantizedStaticLayer

each_code = pytest.mark.parametrize("element", CODES)


@each_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update(element: str, dtype: torch.dtype) -> None:
    layer = QuantizedStaticLayer(12, CODES[element])
    seen = []
    for length in (5, 1, 1):
        k, v = torch.randn(2, 3, length, 16).to(dtype), torch.randn(2, 3, length, 8).to(dtype)
        seen.append((k, v))
        keys, values = layer.update(k, v)
        assert keys.dtype == values.dtype == dtype and keys.shape[2] == 12
    assert layer.get_seq_length() == 7 and layer.keys is not None and layer.keys.dtype == CODES[element]
    for got, parts in zip((keys, values), zip(*seen)):
        want = dequantize_rows(*quantize_rows(torch.cat(parts, 2), CODES[element]), dtype)
        assert torch.equal(got[:, :, :7], want) and not got[:, :, 7:].any()


@each_code
@pytest.mark.parametrize("shape", [(1,), (3, 1, 1)])
def test_static_scales(element: str, shape: tuple[int, ...]) -> None:
    scales = torch.rand(shape) + 0.01, torch.rand(shape) + 0.01
    layer = QuantizedStaticLayer(12, CODES[element], scales)
    for _ in "ab":
        given = [torch.randn(2, 3, 5, width) * 300 for width in (16, 8)]
        for got, x, scale in zip(layer.update(*given), given, scales):
            scale = scale.reshape(1, -1, 1).expand(2, 3, 5)
            want = dequantize_rows(quantize_rows_by(x, scale, CODES[element]), scale, x.dtype)
            assert torch.equal(got[:, :, :5], want) and not got[:, :, 5:].any()
        layer.reset()


def test_reset_forgets_what_was_no_number() -> None:
    layer = QuantizedStaticLayer(4, torch.int8)
    keys, _ = layer.update(torch.full((1, 1, 2, 8), math.nan), torch.ones(1, 1, 2, 8))
    assert keys.isnan().any()
    layer.reset()
    keys, values = layer.update(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
    assert layer.get_seq_length() == 1 and torch.equal(keys[:, :, 0], values[:, :, 0]) and not keys[:, :, 1:].any()


@each_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(element: str, dtype: torch.dtype, tiny_llama: Callable[..., Any], interpreted: None) -> None:
    """Logits of each step against those over a cache of the same codes in float64."""
    from transformers.cache_utils import Cache

    reference = tiny_llama(vocab_size=100).to(dtype)
    model: Any = qcompile.optimize(copy.deepcopy(reference), kv_cache=element, progress=False)
    x = torch.randint(3, 100, (2, 6))
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    arguments |= dict(return_dict_in_generate=True, output_logits=True, attention_mask=torch.ones_like(x))
    out = model.generate(x, **arguments)
    assert not model.forward.eager
    layers = out.past_key_values.layers
    assert all(type(layer) is QuantizedStaticLayer and layer.keys.dtype == CODES[element] for layer in layers)
    cache = Cache(layers=[QuantizedStaticLayer(32, CODES[element]) for _ in layers])
    with torch.no_grad():
        want = reference.double()(out.sequences, past_key_values=cache).logits[:, 5:-1]
        plain = reference(out.sequences).logits[:, 5:-1]
    got = torch.stack(out.logits, 1)
    # Codes of numbers that are not quite the same differ by a step now and then.
    close = {("i8", torch.float32): 2e-3, ("fp8_e4m3", torch.float32): 2e-2}.get((element, dtype), 4e-2)
    assert (got - want).norm() <= close * want.norm()
    assert 0 < (want - plain).norm() <= {"i8": 2e-2, "fp8_e4m3": 0.1}[element] * plain.norm()
    for outcome in model.forward.outcomes():
        done = {result.name: len(result.rewrites) for result in outcome.passes}
        assert done["fuse_attention_codes"] == done["fuse_rope_cache"] == len(layers)


def test_caches_of_another_kind_are_not_taken(tiny_llama: Callable[..., Any], interpreted: None) -> None:
    """A model's own static cache stays what it is, and codes are kept for the next call."""
    from transformers import StaticCache

    model: Any = qcompile.optimize(tiny_llama(vocab_size=100), kv_cache="i8", progress=False)
    x = torch.randint(3, 100, (1, 6))
    arguments = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(x))
    own = StaticCache(config=model.config, max_cache_len=16)
    model.generate(x, past_key_values=own, **arguments)
    assert own.layers[0].keys.dtype == torch.float32
    model.generate(x, **arguments)
    ((_, kept),) = model.generate.caches.kept
    model.generate(x, **arguments)
    assert [cache for _, cache in model.generate.caches.kept] == [kept] and kept.layers[0].keys.dtype == torch.int8
