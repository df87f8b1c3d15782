"""attention_decode against the op's meaning."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_decode
from qcompile.kernels._attention import mask_strides
from qcompile.kernels._attention_tiles import AttentionTile
from qcompile.kernels._clusters import MOST, has_clusters
from qcompile.ops.attention import attention

CLUSTERS = torch.cuda.is_available() and has_clusters(_tuning.Device.of(torch.device("cuda", 0)))
TILES = [AttentionTile(1, 16, 16, 4, 2), AttentionTile(4, 2, 32, 4, 1), AttentionTile(2, 16, 64, 4, 2, beside=4)]
TILES += [AttentionTile(4, 16, 32, 4, 2, cluster=True), AttentionTile(8, 16, 16, 2, 1, cluster=True)] * CLUSTERS
# batch, heads, kv_heads, length, keys, width, value width
SHAPES = {
    "one key": (1, 1, 1, 1, 1, 8, 8),
    "grouped": (2, 6, 2, 1, 37, 16, 16),
    "one key head": (1, 20, 1, 1, 50, 24, 24),
    "as many keys as queries": (2, 3, 3, 1, 65, 80, 80),
    "few queries": (1, 4, 2, 5, 33, 32, 32),
    "odd widths": (2, 4, 2, 1, 40, 19, 7),
    "wide": (1, 2, 1, 1, 70, 256, 192),
    "more rows than a tile": (1, 3, 1, 8, 20, 160, 160),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def heads(random_tensor: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(batch: int, heads: int, kv: int, length: int, keys: int, width: int, value_width: int) -> Any:
        return (
            random_tensor(batch, heads, length, width),
            random_tensor(batch, kv, keys, width),
            random_tensor(batch, kv, keys, value_width),
        )

    return make


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return attention.meaning(q.double(), k.double(), v.double(), mask, False, scale, softcap)


@each_shape
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_without_mask(
    shape: Any, tile: AttentionTile, heads: Callable[..., Any], assert_close: Callable, chosen_for: Callable
) -> None:
    q, k, v = heads(*shape)
    chosen_for(tile, q, v)
    assert_close(attention_decode.attend(q, k, v, None, 0.2, tile), exact(q, k, v, None, 0.2))


MASKS = {
    "for all": lambda b, h, q, n: (q, n),
    "keys only": lambda b, h, q, n: (1, n),
    "by sequence": lambda b, h, q, n: (b, 1, 1, n),
    "by query": lambda b, h, q, n: (b, 1, q, n),
    "by head": lambda b, h, q, n: (h, q, n),
    "by head and sequence": lambda b, h, q, n: (b, h, q, n),
    "one for all keys": lambda b, h, q, n: (b, h, q, 1),
}


@pytest.mark.parametrize(
    ("shape", "tile"), list(zip((SHAPES["grouped"], *[SHAPES["few queries"]] * 4), TILES)), ids=str
)
@pytest.mark.parametrize("mask_shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_masks(
    shape: Any, tile: AttentionTile, mask_shape: Any, additive: bool, heads: Callable, assert_close: Callable
) -> None:
    q, k, v = heads(*shape)
    size = mask_shape(*q.shape[:3], k.shape[2])
    mask = torch.rand(size) < 0.6
    mask[..., 0] = True
    if additive:
        mask = torch.randn(size).to(q.dtype).masked_fill(~mask, -math.inf)
    mask = mask.to(q.device)
    assert_close(attention_decode.attend(q, k, v, mask, 0.2, tile), exact(q, k, v, mask, 0.2))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_keys_that_nobody_attends_to_are_not_read(tile: AttentionTile, heads: Callable, assert_close: Callable) -> None:
    """A cache that is partly filled, and a window in it: elsewhere is NaN, which would show."""
    q, k, v = heads(2, 4, 2, 1, 300, 16, 16)
    for lo, hi in ((0, 129), (192, 256), (299, 300)):
        mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool, device=q.device)
        mask[..., lo:hi] = True
        first = lo // tile.keys * tile.keys
        holey = [torch.full_like(x, math.nan) for x in (k, v)]
        for x, full in zip(holey, (k, v)):
            x[:, :, first:hi] = full[:, :, first:hi]
        want = exact(q, k[:, :, lo:hi], v[:, :, lo:hi], None, 0.2)
        assert_close(attention_decode.attend(q, *holey, mask, 0.2, tile), want)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("lowest", ["bool", "-inf", "lowest number"])
def test_rows_that_attend_to_nothing(tile: AttentionTile, lowest: str, heads: Callable, assert_close: Callable) -> None:
    """Zeros, but for an additive mask of a number: the mean of the values. As in torch; left padding has such rows."""
    q, k, v = heads(2, 4, 2, 1, 100, 16, 16)
    mask = torch.ones(2, 1, 1, 100, dtype=torch.bool, device=q.device)
    mask[0] = False
    if lowest != "bool":
        number = -math.inf if lowest == "-inf" else torch.finfo(q.dtype).min
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, number)
    got = attention_decode.attend(q, k, v, mask, 0.2, tile)
    assert_close(got, exact(q, k, v, mask, 0.2))
    if lowest != "lowest number":
        assert (got[0] == 0).all()
    elif q.dtype != torch.float16:  # whose lowest number is not so low that the logits are lost in it
        assert_close(got[0, :2], v[0, :1].double().mean(1, keepdim=True).expand(2, 1, 16))


def test_large_logits(heads: Callable, assert_close: Callable) -> None:
    q, k, v = heads(1, 2, 1, 1, 90, 16, 16)
    got = attention_decode.attend(q * 50, k, v, None, 1.0, TILES[1])
    assert_close(got, exact(q * 50, k, v, None, 1.0))


@each_shape
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_soft_capping(
    shape: Any, tile: AttentionTile, heads: Callable[..., Any], assert_close: Callable, chosen_for: Callable
) -> None:
    """Of logits far below the cap, and far above it; with keys that a mask hides."""
    q, k, v = heads(*shape)
    chosen_for(tile, q, v)
    mask = (torch.rand(k.shape[2]) < 0.6).index_fill(0, torch.tensor([0]), True).to(q.device)
    for cap, seen in ((0.5, mask), (50.0, None)):
        got = attention_decode.attend(q, k, v, seen, 0.3, tile, cap)
        assert_close(got, exact(q, k, v, seen, 0.3, cap))


def test_layouts_of_a_cache(heads: Callable, random_tensor: Callable, assert_close: Callable) -> None:
    """Heads last but one, keys turned, a stretch of a longer cache, an expanded batch; q cut from a projection."""
    _, k, v = heads(2, 4, 2, 1, 40, 16, 16)
    q = random_tensor(2, 1, 96).narrow(2, 16, 64).view(2, 1, 4, 16).transpose(1, 2)
    layouts = (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)],
        [k.transpose(2, 3).contiguous().transpose(2, 3), v[..., ::2]],
        [k[:, :, 3:30], v[:, :, 3:30]],
        [k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1)],
    )
    for k, v in layouts:
        mask = torch.rand(2, 1, 1, 2 * k.shape[2]).to(q.device)[..., ::2] < 0.7
        for tile in TILES:
            assert_close(attention_decode.attend(q, k, v, mask, 0.2, tile), exact(q, k, v, mask, 0.2))
    turned = random_tensor(2, 4, 16, 1).transpose(2, 3)
    assert_close(attention_decode.attend(turned, k, v, None, 0.2), exact(turned, k, v, None, 0.2))


def test_a_mask_in_float32(heads: Callable, assert_close: Callable) -> None:
    q, k, v = heads(2, 4, 2, 1, 40, 16, 16)
    mask = torch.randn(4, 1, 40).to(q.device)
    assert_close(attention_decode.attend(q, k, v, mask, 0.2), exact(q, k, v, mask, 0.2))


def test_empty(heads: Callable) -> None:
    q, k, v = heads(2, 4, 2, 1, 40, 16, 8)
    assert attention_decode.attend(q[:0], k[:0], v[:0], None, 0.2).shape == (0, 4, 1, 8)
    assert (attention_decode.attend(q, k[:, :, :0], v[:, :, :0], None, 0.2) == 0).all()


def test_the_op_agrees_with_its_implementation(heads: Callable, assert_close: Callable) -> None:
    q, k, v = heads(1, 2, 2, 1, 100, 16, 16)
    mask = torch.arange(100, device=q.device)[None] < 70
    args = (q, k, v, mask, False, 0.25)
    choice = attention.choose(*args)
    assert choice.name == "triton_decode"
    assert_close(choice.function(*args), exact(q, k, v, mask, 0.25))
    got = torch.ops.qcompile_kernels.attention_decode_cuda(q, k, v, mask, 0.25)
    assert torch.equal(got, choice.function(*args))
    torch.library.opcheck(attention_decode.attention_decode_cuda, (q, k, v, mask, 0.25))
    assert_close(choice.function(*args, 0.5), exact(q, k, v, mask, 0.25, 0.5))


def test_refusals(device: str) -> None:
    def reason(q: Any, k: Any, v: Any, is_causal: bool = False) -> str | None:
        q, k, v = (x if isinstance(x, Tensor) else torch.ones(x, device=device) for x in (q, k, v))
        return attention_decode.refuses(q, k, v, None, is_causal, 1.0)

    q, k = (1, 2, 1, 4), (1, 1, 6, 4)
    assert reason(q, k, k) is None
    assert reason(q, k, torch.ones(k, device=device).half()) == "query, key and value differ in dtype"
    assert reason(torch.ones(q).double().to(device), k, k) == "handles float32, float16 and bfloat16, not float64"
    assert reason((1, 2, 9, 4), k, k) == "handles up to 8 query rows, not 9"
    assert reason(q, k, (1, 1, 6, 257)) == "handles heads of up to 256 columns, not 4 and 257"
    assert reason(q, k, k, is_causal=True) == "handles a mask, not is_causal"


def test_a_mask_of_one_row_is_shared() -> None:
    """Whatever the stride of the axis that has one place."""
    mask = torch.ones(2, 1, 1, 40)
    assert mask_strides(mask, 2, 4, 1, 40) == [40, 0, 0, 1]
    assert mask_strides(mask[:1], 2, 4, 3, 40) == [0, 0, 0, 1]
    assert mask_strides(torch.ones(1, 1, 3, 40), 2, 4, 3, 40) == [0, 0, 40, 1]
    assert mask_strides(None, 2, 4, 3, 40) == [0, 0, 0, 0]


@pytest.mark.parametrize("major", [7, 8])
@pytest.mark.parametrize("shared", [64, 99, 163, 227])
@pytest.mark.parametrize("pairs", [1, 8, 128, 5000])
@pytest.mark.parametrize("keys", [1, 40, 1024, 32768])
def test_tiles(major: int, shared: int, pairs: int, keys: int) -> None:
    """Powers of two that fit; no split without a block of its own."""
    device = _tuning.Device(major, shared << 10)
    for rows, columns, itemsize in ((1, 16, 2), (4, 128, 2), (71, 64, 2), (1, 256, 2), (4, 256, 4)):
        tile = _attention_tiles.attention_tile(pairs, rows, keys, columns, itemsize, device)
        for number in (tile.splits, tile.rows, tile.keys):
            assert number & (number - 1) == 0
        assert 1 <= tile.splits <= math.ceil(keys / tile.keys)
        assert tile.stages == 1 or (tile.stages - 1) * tile.keys * 2 * columns * itemsize < shared << 10
        assert tile.beside == 1 or tile.beside == tile.warps <= tile.keys // 16
        assert not tile.cluster or 1 < tile.splits <= MOST
        assert (tile.rows >= 16) == (major == 8 and itemsize == 2)
