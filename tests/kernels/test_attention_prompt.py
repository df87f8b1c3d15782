"""attention_prompt against the op's meaning."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_prompt
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import quantize_rows

TILES = [AttentionTile(1, 32, 16, 4, 2), AttentionTile(4, 16, 32, 4, 1)]
# batch, heads, kv_heads, length, keys, width, value width
SHAPES = {
    "one row": (1, 1, 1, 1, 1, 16, 16),
    "grouped": (2, 6, 2, 33, 37, 16, 16),
    "one key head": (1, 5, 1, 20, 70, 24, 24),
    "whole blocks": (1, 2, 2, 64, 96, 32, 32),
    "odd widths": (2, 4, 2, 17, 40, 19, 7),
    "wide": (1, 2, 1, 40, 70, 256, 192),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)


@pytest.fixture
def heads(random_tensor: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(batch: int, heads: int, kv: int, length: int, keys: int, width: int, value_width: int) -> Any:
        return (
            random_tensor(batch, heads, length, width),
            random_tensor(batch, kv, keys, width),
            random_tensor(batch, kv, keys, value_width),
        )

    return make


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tile: AttentionTile, softcap: float | None = None) -> Any:
    return attention_prompt.attend(q, k, v, mask, 0.2, softcap, tile)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None = None) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return attention.meaning(q.double(), k.double(), v.double(), mask, False, 0.2, softcap)


def causal(length: int, keys: int, before: int = 0) -> Tensor:
    return torch.arange(keys) <= torch.arange(length)[:, None] + before


@each_shape
@each_tile
def test_causal(shape: Any, tile: AttentionTile, heads: Callable[..., Any], assert_close: Callable) -> None:
    """A prompt in an empty cache, and one behind others."""
    q, k, v = heads(*shape)
    length, keys = q.shape[2], k.shape[2]
    for before in (0, keys - length):
        mask = causal(length, keys, before)[None, None].to(q.device)
        assert_close(run(q, k, v, mask, tile), exact(q, k, v, mask))


@each_tile
def test_windows_and_padding(tile: AttentionTile, heads: Callable[..., Any], assert_close: Callable) -> None:
    """What is seen begins in the middle, and differs by sequence."""
    q, k, v = heads(2, 2, 1, 90, 200, 16, 16)
    mask = causal(90, 200, 100) & ~causal(90, 200, 30)
    mask = mask[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :95] = False
    mask = mask.to(q.device)
    assert_close(run(q, k, v, mask, tile), exact(q, k, v, mask))


MASKS = {
    "for all": lambda b, h, q, n: (q, n),
    "keys only": lambda b, h, q, n: (1, n),
    "by sequence": lambda b, h, q, n: (b, 1, 1, n),
    "by head": lambda b, h, q, n: (h, q, n),
    "by head and sequence": lambda b, h, q, n: (b, h, q, n),
    "one for all keys": lambda b, h, q, n: (b, h, q, 1),
}


@each_tile
@pytest.mark.parametrize("mask_shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks(tile: AttentionTile, mask_shape: Any, additive: bool, heads: Callable, assert_close: Callable) -> None:
    """Whole blocks in the middle, others with holes."""
    q, k, v = heads(2, 2, 1, 40, 130, 16, 16)
    size = mask_shape(*q.shape[:3], k.shape[2])
    mask = torch.rand(size) < 0.6
    mask[..., 0] = True
    mask[..., 32:96] = True
    if additive:
        mask = torch.randn(size).to(q.dtype).masked_fill(~mask, -math.inf)
        mask[..., 32:64] = 0
    mask = mask.to(q.device)
    assert_close(run(q, k, v, mask, tile), exact(q, k, v, mask))


@each_tile
def test_keys_that_nobody_attends_to_are_not_read(tile: AttentionTile, heads: Callable, assert_close: Callable) -> None:
    """A cache that is partly filled: elsewhere is NaN, which would show."""
    q, k, v = heads(1, 2, 1, 50, 320, 16, 16)
    mask = causal(50, 320, 64).to(q.device)
    want = exact(q, k, v, mask)
    for x in (k, v):
        x[:, :, 128:] = math.nan
    assert_close(run(q, k, v, mask, tile), want)


@each_tile
@pytest.mark.parametrize("lowest", ["bool", "-inf", "lowest number"])
def test_rows_that_attend_to_nothing(tile: AttentionTile, lowest: str, heads: Callable, assert_close: Callable) -> None:
    """Zeros, but for an additive mask of a number: the mean of the values. As in torch; left padding has such rows."""
    q, k, v = heads(2, 2, 1, 70, 100, 16, 16)
    mask = causal(70, 100, 30).repeat(2, 1, 1, 1).to(q.device)
    mask[0, :, :40] = False
    if lowest != "bool":
        number = -math.inf if lowest == "-inf" else torch.finfo(q.dtype).min
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, number)
    got = run(q, k, v, mask, tile)
    assert_close(got, exact(q, k, v, mask))
    if lowest != "lowest number":
        assert (got[0, :, :40] == 0).all()
    elif q.dtype != torch.float16:  # whose lowest number is not so low that the logits are lost in it
        assert_close(got[0, :, :40], v[0].double().mean(1, keepdim=True).expand(2, 40, 16))


@each_tile
def test_large_logits(tile: AttentionTile, heads: Callable, assert_close: Callable) -> None:
    q, k, v = heads(1, 2, 1, 40, 90, 16, 16)
    mask = causal(40, 90, 10).to(q.device)
    assert_close(run(q * 50, k, v, mask, tile), exact(q * 50, k, v, mask))


@each_shape
@each_tile
def test_soft_capping(shape: Any, tile: AttentionTile, heads: Callable[..., Any], assert_close: Callable) -> None:
    q, k, v = heads(*shape)
    mask = causal(q.shape[2], k.shape[2]).to(q.device)
    for cap, seen in ((0.5, mask), (50.0, None)):
        assert_close(run(q, k, v, seen, tile, cap), exact(q, k, v, seen, cap))


@each_tile
def test_layouts_of_a_cache(tile: AttentionTile, heads: Callable, random_tensor: Callable, assert_close: Callable):
    """Heads last but one, columns apart, a stretch of a longer cache, an expanded batch; q cut from a projection."""
    _, k, v = heads(2, 4, 2, 1, 40, 16, 16)
    q = random_tensor(2, 20, 96).narrow(2, 16, 64).view(2, 20, 4, 16).transpose(1, 2)
    layouts = (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)],
        [k.transpose(2, 3).contiguous().transpose(2, 3), v[..., ::2]],
        [k[:, :, 3:30], v[:, :, 3:30]],
        [k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1)],
    )
    for k, v in layouts:
        mask = torch.rand(2, 1, 20, 2 * k.shape[2]).to(q.device)[..., ::2] < 0.7
        assert_close(run(q, k, v, mask, tile), exact(q, k, v, mask))


def test_empty(heads: Callable) -> None:
    q, k, v = heads(2, 4, 2, 20, 40, 16, 8)
    mask = torch.ones(20, 40, dtype=torch.bool, device=q.device)
    assert run(q[:0], k[:0], v[:0], mask, TILES[0]).shape == (0, 4, 20, 8)
    assert (run(q, k[:, :, :0], v[:, :, :0], mask[:, :0], TILES[0]) == 0).all()


def test_the_op_agrees_with_its_implementation(heads: Callable, assert_close: Callable) -> None:
    """With a number of splits of its own choice; few rows go the way of decoding, codes are turned into numbers."""
    q, k, v = heads(1, 2, 2, 20, 100, 16, 16)
    mask = causal(20, 100, 7).to(q.device)
    args = (q, k, v, mask, False, 0.2)
    choice = attention.choose(*args)
    if q.itemsize > 2:
        assert "has no tile for torch.float32" in dict(choice.refusals)["triton_prompt"]
        return
    assert choice.name == "triton_prompt"
    assert_close(choice.function(*args), exact(q, k, v, mask))
    assert_close(choice.function(*args, 0.5), exact(q, k, v, mask, 0.5))
    got = torch.ops.qcompile_kernels.attention_prompt_cuda(q[:, :, :3], k, v, mask[:3], 0.2)
    assert_close(got, exact(q[:, :, :3], k, v, mask[:3]))
    torch.library.opcheck(attention_prompt.attention_prompt_cuda, (q, k, v, mask, 0.2))
    (k, k_scale), (v, v_scale) = quantize_rows(k, torch.int8), quantize_rows(v, torch.int8)
    coded = (q, k, v, mask, False, 0.2, None, k_scale, v_scale)
    choice = attention.choose(*coded)
    assert choice.name == "triton_prompt"
    want = attention.meaning(q.double(), k, v, mask, False, 0.2, None, k_scale, v_scale)
    assert_close(choice.function(*coded), want)


def test_refusals(device: str) -> None:
    q, k = (torch.ones(1, heads, 40, 16, dtype=torch.float16, device=device) for heads in (2, 1))
    mask = torch.ones(40, 40, dtype=torch.bool, device=device)

    def reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False, *rest: Any) -> str | None:
        return attention_prompt.refuses(q, k, v, mask, is_causal, 1.0, *rest)

    assert reason(q, k, k, mask) is None and reason(q, k, k, None, False, 30.0) is None
    assert reason(q, k, k, None) == "leaves attention without a mask to torch"
    assert reason(q, k, k, mask, True) == "handles a mask, not is_causal"
    assert attention_prompt.refuses(q, k, k, mask, False, -1.0) == "handles a positive scale, not -1.0"
    assert reason(q, k, k.float(), mask) == "query, key and value differ in dtype"
    assert reason(q.double(), k, k, mask) == "handles float32, float16 and bfloat16, not float64"
    wide = torch.ones(1, 1, 40, 4096, dtype=torch.float16, device=device)
    assert reason(wide, wide, wide, mask) == "has no tile for torch.float16 heads of 4096 and 4096 columns on this GPU"


@pytest.mark.parametrize("shared", [64, 99, 163, 227])
@pytest.mark.parametrize("columns", [16, 64, 128, 256, 512])
def test_tiles(shared: int, columns: int) -> None:
    """Powers of two that fit; the keys are split where there are few programs."""
    assert _attention_tiles.prompt_tile(columns, 2, _tuning.Device(7)) is None
    assert _attention_tiles.prompt_tile(columns, 4, _tuning.Device()) is None
    tile = _attention_tiles.prompt_tile(columns, 2, _tuning.Device(8, shared << 10))
    assert (tile is None) == (columns * 128 >= shared << 10)
    if tile is None:
        return
    assert (tile.rows + 2 * tile.stages * tile.keys) * columns * 2 < shared << 10
    assert all(n & (n - 1) == 0 for n in (tile.rows, tile.keys))
    assert [_attention_tiles.prompt_splits(programs, 64, _tuning.Device()) for programs in (1, 32, 512)] == [16, 4, 1]
