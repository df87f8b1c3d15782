"""rope_into_cache against its meaning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import rope_into_cache
from qcompile.ops.rope import rope
from qcompile.ops.rope import rope_into_cache as op
from qcompile.ops.row_codes import CODES, SCALE

# batch, heads, kv_heads, length, n, width of the values, capacity
SHAPES = {
    "one token": (1, 4, 2, 1, 16, 16, 9),
    "batch": (3, 2, 2, 1, 8, 8, 5),
    "prompt": (2, 6, 2, 37, 64, 64, 50),
    "odd widths": (2, 3, 1, 5, 10, 7, 6),
    "wide": (1, 2, 1, 3, 256, 192, 4),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def arguments(random_tensor: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(b: int, h: int, kv: int, length: int, n: int, width: int, capacity: int) -> list[Tensor]:
        """q, k and v as cut from one projection."""
        qkv = random_tensor(b, length, (h + kv) * n + kv * width)
        cuts = qkv.split([h * n, kv * n, kv * width], dim=-1)
        q, k, v = (x.view(b, length, heads, -1).transpose(1, 2) for x, heads in zip(cuts, (h, kv, kv)))
        cos, sin = random_tensor(1, 1, length, n), random_tensor(1, 1, length, n)
        keys, values = random_tensor(b, kv, capacity, n), random_tensor(b, kv, capacity, width)
        return [q, k, v, cos, sin, keys, values, torch.randperm(capacity)[:length].to(q.device)]

    return make


def check(args: list[Tensor], assert_close: Callable) -> None:
    q, k, v, cos, sin, keys, values, positions = args
    old_keys, old_values = keys.clone(), values.clone()
    angles = cos.double(), sin.double()
    assert_close(rope_into_cache.rope_into_cache_cuda(*args), rope.meaning(q.double(), *angles))
    assert torch.equal(values, old_values.index_copy(2, positions.long(), v))
    assert_close(keys, old_keys.double().index_copy(2, positions.long(), rope.meaning(k.double(), *angles)))


@each_shape
def test_meaning(shape: Any, arguments: Callable, assert_close: Callable) -> None:
    check(arguments(*shape), assert_close)


def test_layouts(arguments: Callable, random_tensor: Callable, assert_close: Callable) -> None:
    """A part of each head, columns with gaps, angles of each sequence or in float32, a part of a cache, int32."""
    q, k, v, cos, sin, keys, values, positions = arguments(2, 4, 2, 3, 16, 16, 9)
    check([q[..., :8], k[..., 8:], v, cos[..., :8], sin[..., 8:], keys[..., :8], values, positions], assert_close)
    check([q[..., ::2], k[..., ::2], v[..., ::2], cos[..., ::2], sin[..., :8], *(x[..., :8] for x in (keys, values)),
           positions], assert_close)  # fmt: skip
    check([q, k, v, cos.expand(2, 1, 3, 16) * 2, random_tensor(2, 1, 3, 16), keys, values, positions], assert_close)
    check([q, k, v, cos[0, 0].float(), sin[0].float(), keys, values, positions], assert_close)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    check([q, k, v, cos, sin, *turned, positions], assert_close)
    wide = random_tensor(2, 2, 20, 16)
    check([q, k, v, cos, sin, wide[:, :, :9], wide[:, :, 10:19], positions], assert_close)
    check([q, k, v, cos, sin, keys, values, positions.int()], assert_close)


@each_shape
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_codes(shape: Any, codes: torch.dtype, arguments: Callable, device: str) -> None:
    """Those of the meaning: scales may be off by their rounding, and codes by one."""
    if codes == torch.uint8 and device == "cpu":
        pytest.skip("the interpreter rounds fp8 wrong")
    args = [*arguments(*shape)]
    for i in (5, 6):
        args.append(torch.zeros(args[i].shape[:3], dtype=SCALE, device=device))
        args[i] = torch.zeros(args[i].shape, dtype=codes, device=device)
    twins = [x.clone() for x in args]
    assert rope_into_cache.refuses(*args) is None if shape[3] <= 8 else True
    rope_into_cache.rope_into_cache_cuda(*args)
    op.meaning(*twins)
    for mine, other in zip(args[5:7], twins[5:7]):
        assert (mine.int() - other.int()).abs().max() <= 1 and (mine != other).double().mean() < 0.01
    for mine, other in zip(args[8:], twins[8:]):
        torch.testing.assert_close(mine, other, rtol=2**-10, atol=0)


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_what_is_no_number_shows_in_codes(codes: torch.dtype, arguments: Callable, device: str) -> None:
    for bad in (float("nan"), float("inf")):
        args = arguments(1, 2, 1, 1, 8, 8, 4)
        args[1][0, 0, 0, 5] = bad
        args[2][0, 0, 0, 3] = bad
        scales = [torch.zeros(1, 1, 4, dtype=SCALE, device=device) for _ in "kv"]
        args[5:7] = (torch.zeros(x.shape, dtype=codes, device=device) for x in args[5:7])
        rope_into_cache.rope_into_cache_cuda(*args, *scales)
        assert all(scale[0, 0, args[7]].isnan().all() for scale in scales)


def test_positions_outside_write_nothing(arguments: Callable) -> None:
    q, k, v, cos, sin, keys, values, positions = arguments(1, 2, 1, 2, 8, 8, 4)
    around = [x.clone() for x in (keys, values)]
    rope_into_cache.rope_into_cache_cuda(q, k, v, cos, sin, keys[:, :, 1:3], values[:, :, 1:3], positions * 0 - 1)
    rope_into_cache.rope_into_cache_cuda(q, k, v, cos, sin, keys[:, :, 1:3], values[:, :, 1:3], positions * 0 + 2)
    assert torch.equal(keys, around[0]) and torch.equal(values, around[1])


def test_empty(arguments: Callable) -> None:
    q, *rest = arguments(1, 2, 1, 1, 8, 8, 4)
    assert rope_into_cache.rope_into_cache_cuda(q[:0], *rest).shape == (0, 2, 1, 8)


def test_the_op_agrees_with_its_implementation(arguments: Callable, assert_close: Callable) -> None:
    args = arguments(1, 4, 2, 1, 16, 16, 9)
    choice = op.choose(*args)
    assert choice.name == "triton"
    mine, other = ([x.clone() for x in args] for _ in range(2))
    assert_close(choice.function(*mine), op.meaning(*other).double(), rounded=True)
    for one, two in zip(mine[:-1], other):
        assert_close(one, two.double(), rounded=True)
    torch.library.opcheck(rope_into_cache.rope_into_cache_cuda, args)


def test_compiled_it_writes_to_the_cache_itself(
    arguments: Callable, assert_close: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to a copy of it that is copied back."""
    seen, launch = [], rope_into_cache.launch

    def spy(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        seen.append([x.data_ptr() for x in args[5:7]])
        launch(kernel, grid, *args, **constants)

    def step(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
    ) -> Any:
        q = rope_into_cache.rope_into_cache_cuda(q + 1, k + 1, v + 1, cos, sin, keys, values, at)
        return q @ keys.repeat_interleave(2, 1).transpose(2, 3) @ values.repeat_interleave(2, 1)

    args = arguments(1, 4, 2, 1, 16, 16, 9)
    twins = [x.clone() for x in args]
    want = step(*twins)
    monkeypatch.setattr(rope_into_cache, "launch", spy)
    assert_close(torch.compile(step, fullgraph=True)(*args), want.double(), rounded=True)
    assert seen == [[x.data_ptr() for x in args[5:7]]]
    for mine, other in zip(args[5:7], twins[5:7]):
        assert_close(mine, other.double(), rounded=True)


def test_refusals(arguments: Callable, device: str) -> None:
    q, k, v, cos, sin, keys, values, positions = arguments(1, 2, 1, 1, 8, 8, 4)
    refuses = rope_into_cache.refuses
    assert refuses(q, k, v, cos, sin, keys, values, positions) is None
    reason = refuses(q.double(), k, v, cos, sin, keys, values, positions)
    assert reason == "handles float32, float16 and bfloat16, not float64"
    assert refuses(q[..., :3], k, v, cos, sin, keys, values, positions) == "the last dimension must be even, not 3"
    assert refuses(q.expand(1, 2, 9, 8), k, v, cos, sin, keys, values, positions) == "handles up to 8 positions, not 9"
    each = cos.expand(1, 2, 1, 8)
    assert refuses(q, k, v, each, sin, keys, values, positions) == "cos and sin differ from head to head"
    apart = "the columns of the cache are not neighbours"
    assert refuses(q, k, v, cos, sin, keys, values[..., ::2], positions) == apart
    assert refuses(q, k, v, cos, sin, keys, values, positions.to("meta")) == "the positions are on meta"
