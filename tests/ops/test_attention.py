"""attention: what it means, on every kind of input, and that it is torch's attention on repeated heads."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qcompile.ops.attention import attention
from qcompile.ops.row_codes import CODES, dequantize_rows, quantize_rows


def heads(query=4, kv=2, rows=3, keys=7, width=16, dtype=torch.float32, batch=2) -> Any:
    q = torch.randn(batch, query, rows, width)
    k, v = torch.randn(2, batch, kv, keys, width)
    return [t.to(dtype) for t in (q, k, v)]


INPUTS: dict[str, Any] = {
    "grouped": lambda: heads(),
    "one row": lambda: heads(rows=1),
    "one row, bf16": lambda: heads(rows=1, dtype=torch.bfloat16),
    "bf16": lambda: heads(dtype=torch.bfloat16),
    "f16": lambda: heads(dtype=torch.float16),
    "f64": lambda: heads(dtype=torch.float64),
    "as many keys as queries": lambda: heads(query=3, kv=3),
    "one key head": lambda: heads(query=6, kv=1),
    "transposed": lambda: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in heads()],
    "one row, transposed": lambda: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in heads(rows=1)],
    "cut from a longer cache": lambda: [heads()[0], *(t[:, :, 1:6] for t in heads()[1:])],
    "no sequence": lambda: heads(batch=0),
    "values of another width": lambda: [*heads()[:2], torch.randn(2, 2, 7, 24)],
    "one row, values of another width": lambda: [*heads(rows=1)[:2], torch.randn(2, 2, 7, 24)],
}
each_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
# Probabilities below 1 are rounded before the product with the values.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def exact(q, k, v, mask, is_causal, scale, softcap=None):
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = q.double() @ k.transpose(2, 3) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    # A row that may attend to nothing gives zeros.
    return torch.softmax(logits, -1).nan_to_num(0.0) @ v


def check(*args):
    y, q = attention(*args), args[0]
    assert y.dtype == q.dtype
    torch.testing.assert_close(y.double(), exact(*args), rtol=0, atol=ATOL[q.dtype])


@each_input
def test_opcheck(make):
    q, k, v = make()
    # One row takes another way than many.
    mask = torch.rand(q.shape[0], 1, 1, k.shape[2]) < 0.7 if q.shape[2] == 1 else None
    torch.library.opcheck(attention.overload, (q, k, v, mask, False, 0.3))
    torch.library.opcheck(attention.overload, (q, k, v, mask, False, 0.3, 2.0))


@each_input
def test_without_mask(make):
    q, k, v = make()
    check(q, k, v, None, False, 0.3)
    check(q, k, v, None, False, 2.0, 1.5)


@each_input
def test_causal(make):
    q, k, v = make()
    check(q, k, v, None, True, 0.25)
    check(q, k, v, None, True, 2.0, 1.5)


MASKS = {
    "by sequence": lambda batch, heads, rows, keys: torch.rand(batch, 1, rows, keys) < 0.7,
    "by head": lambda batch, heads, rows, keys: torch.rand(batch, heads, rows, keys) < 0.7,
    "for all": lambda batch, heads, rows, keys: torch.rand(rows, keys) < 0.7,
    "by head, for all sequences": lambda batch, heads, rows, keys: torch.rand(heads, rows, keys) < 0.7,
    "nothing allowed": lambda batch, heads, rows, keys: torch.zeros(batch, 1, rows, keys, dtype=torch.bool),
}


@each_input
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks(make, mask, additive):
    q, k, v = make()
    allowed = mask(*q.shape[:3], k.shape[2])
    bias = torch.randn(allowed.shape).to(q.dtype).masked_fill(~allowed, -math.inf)
    check(q, k, v, bias if additive else allowed, False, 0.25)
    check(q, k, v, bias if additive else allowed, False, 2.0, 1.5)


@each_input
@pytest.mark.parametrize("padding", ["bool", "lowest number"])
def test_it_is_what_torch_gives_on_repeated_heads(make, padding):
    """Also where left padding masks whole rows: zeros for a boolean mask, the mean value for an additive one."""
    q, k, v = make()
    mask = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    mask[:1] = False
    if padding != "bool":
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    k_each, v_each = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    want = F.scaled_dot_product_attention(q, k_each, v_each, mask)
    got = attention(q, k, v, mask, False, 1 / math.sqrt(q.shape[-1]))
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL[q.dtype])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_symbolic_sizes(symbolic, rows, softcap):
    small, large = heads(rows=rows, batch=2), heads(rows=rows, batch=5)
    masks = [torch.rand(len(t), 1, rows, 7) < 0.7 for t in (small[0], large[0])]
    symbolic(lambda q, k, v, m: attention(q, k, v, m, False, 0.25, softcap), (*small, masks[0]), (*large, masks[1]))


@each_input
@pytest.mark.parametrize("dtype", CODES.values(), ids=CODES)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_codes(make, dtype, softcap):
    q, *rows = make()
    (k, k_scale), (v, v_scale) = (quantize_rows(x, dtype) for x in rows)
    mask = torch.rand(q.shape[0], 1, 1, k.shape[2]) < 0.7
    y = attention(q, k, v, mask, False, 0.3, softcap, k_scale, v_scale)
    k, v = (dequantize_rows(*pair, torch.float64) for pair in ((k, k_scale), (v, v_scale)))
    torch.testing.assert_close(y.double(), exact(q, k, v, mask, False, 0.3, softcap), rtol=0, atol=ATOL[q.dtype])


def test_opcheck_of_codes():
    q, *rows = heads()
    (k, k_scale), (v, v_scale) = (quantize_rows(x, torch.int8) for x in rows)
    torch.library.opcheck(attention.overload, (q, k, v, None, False, 0.3, None, k_scale, v_scale))
