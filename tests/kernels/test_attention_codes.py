"""attention_codes against the op's meaning."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import attention_codes
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import CODES, quantize_rows

TILES = [AttentionTile(1, 16, 16, 4, 1), AttentionTile(4, 2, 32, 4, 1)]
# batch, heads, kv_heads, length, keys, width, value width
SHAPES = {
    "one key": (1, 1, 1, 1, 1, 16, 16),
    "grouped": (2, 6, 2, 1, 37, 16, 16),
    "one key head": (1, 20, 1, 1, 50, 48, 48),
    "as many keys as queries": (2, 3, 3, 1, 65, 80, 80),
    "few queries": (1, 4, 2, 5, 33, 32, 32),
    "wide": (1, 2, 1, 1, 170, 256, 192),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)
each_code = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)


@pytest.fixture
def heads(random_tensor: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(
        codes: torch.dtype, batch: int, heads: int, kv: int, length: int, keys: int, width: int, value_width: int
    ) -> Any:
        """q, k, v and the scales of codes; tokens differ in size a hundredfold."""
        k, v = random_tensor(batch, kv, keys, width), random_tensor(batch, kv, keys, value_width)
        v *= torch.logspace(-2, 0, keys).to(v)[torch.randperm(keys).to(v.device)][:, None]
        (k, k_scale), (v, v_scale) = quantize_rows(k, codes), quantize_rows(v, codes)
        return random_tensor(batch, heads, length, width), k, v, k_scale, v_scale

    return make


def run(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, mask: Tensor | None, scale: float = 0.2,
        softcap: float | None = None, tile: AttentionTile | None = None) -> Tensor:  # fmt: skip
    return attention_codes.attend(q, k, v, mask, scale, softcap, k_scale, v_scale, tile)


def exact(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, mask: Tensor | None, scale: float = 0.2,
          softcap: float | None = None) -> Tensor:  # fmt: skip
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return attention.meaning(q.double(), k, v, mask, False, scale, softcap, k_scale, v_scale)


@each_shape
@each_code
@each_tile
def test_meaning(
    shape: Any, codes: torch.dtype, tile: AttentionTile, heads: Callable[..., Any], assert_close: Callable
) -> None:
    args = heads(codes, *shape)
    assert_close(run(*args, None, tile=tile), exact(*args, None))


@each_code
@each_tile
@pytest.mark.parametrize("kind", ["boolean", "additive", "by head"])
def test_masks(
    codes: torch.dtype, tile: AttentionTile, kind: str, heads: Callable[..., Any], assert_close: Callable
) -> None:
    for shape in (SHAPES["grouped"], SHAPES["few queries"]):
        args = heads(codes, *shape)
        batch, count, length, keys = *args[0].shape[:3], args[1].shape[2]
        size = (batch, count if kind == "by head" else 1, length, keys)
        mask = torch.rand(size) < 0.6
        mask[..., 0] = True
        if kind == "additive":
            mask = torch.randn(size).to(args[0].dtype).masked_fill(~mask, -math.inf)
        mask = mask.to(args[0].device)
        assert_close(run(*args, mask, tile=tile), exact(*args, mask))


@each_tile
def test_keys_that_nobody_attends_to_are_not_read(tile: AttentionTile, heads: Callable, assert_close: Callable) -> None:
    """A cache that is partly filled, and a window in it: elsewhere are scales of NaN, which would show."""
    q, k, v, *scales = heads(torch.int8, 2, 4, 2, 1, 300, 16, 16)
    for lo, hi in ((0, 129), (192, 256), (299, 300)):
        mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool, device=q.device)
        mask[..., lo:hi] = True
        first, last = lo // tile.keys * tile.keys, math.ceil(hi / tile.keys) * tile.keys
        holey = [torch.full_like(x, math.nan) for x in scales]
        for x, full in zip(holey, scales):
            x[:, :, first:last] = full[:, :, first:last]
        want = exact(q, k[:, :, lo:hi], v[:, :, lo:hi], *(x[:, :, lo:hi] for x in scales), None)
        assert_close(run(q, k, v, *holey, mask, tile=tile), want)


@each_tile
def test_rows_that_attend_to_nothing_are_zeros(tile: AttentionTile, heads: Callable, assert_close: Callable) -> None:
    args = heads(torch.int8, 2, 4, 2, 1, 100, 16, 16)
    mask = torch.ones(2, 1, 1, 100, dtype=torch.bool, device=args[0].device)
    mask[0] = False
    got = run(*args, mask, tile=tile)
    assert_close(got, exact(*args, mask))
    assert (got[0] == 0).all()


@each_code
def test_sizes_of_all_kinds(codes: torch.dtype, heads: Callable, assert_close: Callable) -> None:
    """Large and small queries, small values; a query of zeros."""
    q, k, v, k_scale, v_scale = heads(codes, 1, 2, 1, 1, 90, 32, 32)
    for by in (50.0, 1e-3):
        got = run(q * by, k, v, k_scale, v_scale, None, 1 / by)
        assert_close(got, exact(q * by, k, v, k_scale, v_scale, None, 1 / by))
    small = (v_scale * 1e-2).clamp_min(1e-4)
    assert_close(run(q, k, v, k_scale, small, None), exact(q, k, v, k_scale, small, None))
    assert_close(run(q * 0, k, v, k_scale, v_scale, None), exact(q * 0, k, v, k_scale, v_scale, None))


@each_code
@each_tile
def test_soft_capping(codes: torch.dtype, tile: AttentionTile, heads: Callable, assert_close: Callable) -> None:
    args = heads(codes, *SHAPES["grouped"])
    for cap in (0.5, 50.0):
        assert_close(run(*args, None, 0.3, cap, tile), exact(*args, None, 0.3, cap))


def test_layouts(heads: Callable, assert_close: Callable) -> None:
    """A stretch of a longer cache, and heads last but one; what begins at odd bytes is copied."""
    q, k, v, k_scale, v_scale = heads(torch.int8, 2, 4, 2, 1, 40, 16, 16)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    shifted = [torch.cat([x[..., :3], x], -1)[..., 3:] for x in (k, v)]
    for some in ((k, v), turned, shifted):
        cut = [x[:, :, 3:30] for x in (*some, k_scale, v_scale)]
        for tile in TILES:
            assert_close(run(q, *cut, None, tile=tile), exact(q, *cut, None))


@each_code
def test_what_is_no_number_shows(codes: torch.dtype, heads: Callable) -> None:
    for place in (0, 3, 4):
        args = heads(codes, 1, 2, 1, 1, 40, 16, 16)
        args[place].view(-1)[0] = math.nan
        assert run(*args, None).isnan().any()


def test_empty(heads: Callable) -> None:
    args = heads(torch.int8, 2, 4, 2, 1, 40, 16, 16)
    assert run(args[0][:0], *(x[:0] for x in args[1:]), None).shape == (0, 4, 1, 16)
    assert (run(args[0], *(x[:, :, :0] for x in args[1:]), None) == 0).all()


@each_code
def test_the_op_agrees_with_its_implementation(codes: torch.dtype, heads: Callable, assert_close: Callable) -> None:
    q, k, v, k_scale, v_scale = heads(codes, 1, 2, 2, 1, 100, 16, 16)
    mask = torch.arange(100, device=q.device)[None] < 70
    args = (q, k, v, mask, False, 0.25, None, k_scale, v_scale)
    choice = attention.choose(*args)
    assert choice.name == "triton_codes"
    assert_close(choice.function(*args), exact(q, k, v, k_scale, v_scale, mask, 0.25))
    torch.library.opcheck(
        attention_codes.attention_codes_cuda, (q, k, v, mask, 0.25, None, k_scale, v_scale),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_refusals(heads: Callable, device: str) -> None:
    q, k, v, k_scale, v_scale = heads(torch.int8, 1, 2, 1, 1, 6, 16, 16)

    def reason(q: Tensor, k: Tensor, v: Tensor, *scales: Any, is_causal: bool = False) -> str | None:
        return attention_codes.refuses(q, k, v, None, is_causal, 1.0, None, *scales)

    assert reason(q, k, v, k_scale, v_scale) is None
    assert reason(q, k, v) == "handles codes with scales"
    assert "not torch.int32" in str(reason(q, k.int(), v, k_scale, v_scale))
    assert "not torch.int8 and torch.float16" in str(reason(q, k, v, k_scale, v_scale.half()))
    assert "multiples of 16 columns, not 16 and 8" in str(reason(q, k, v[..., :8], k_scale, v_scale))
    assert "not neighbours" in str(reason(q, k[..., ::2], v, k_scale, v_scale))
    assert reason(q.expand(1, 2, 9, 16), k, v, k_scale, v_scale) == "handles up to 8 query rows, not 9"
    assert reason(q, k, v, k_scale, v_scale, is_causal=True) == "handles a mask, not is_causal"
