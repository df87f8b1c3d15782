"""fuse_rope: rotate_half and its products become one op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.norm import rms_norm
from qcompile.ops.rope import rope
from qcompile.passes.fuse_norm import FuseNorm
from qcompile.passes.fuse_rope import FuseRope
from qcompile.passes.recognize_norm import RecognizeNorm


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def llama(x, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (x * cos) + (rotate_half(x) * sin)


def gpt_neox(x, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    return torch.cat([(turned * cos) + (rotate_half(turned) * sin), rest], dim=-1)


def chunked(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return rotated(x, torch.cat((-x2, x1), -1), cos, sin)


def split(x, cos, sin):
    x1, x2 = torch.split(x, x.shape[-1] // 2, dim=-1)
    return rotated(x, torch.cat((x2.neg(), x1), 3), cos, sin)


def rotated(x, turned, cos, sin):
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


SPELLINGS = {
    "llama": llama,
    "sin first": lambda x, cos, sin: sin.unsqueeze(1) * rotate_half(x) + cos.unsqueeze(1) * x,
    "olmo2": lambda x, cos, sin: llama(x, cos.float(), sin.float()).to(x.dtype),
    "qwen2_vl": lambda x, cos, sin: llama(x.float(), cos.float(), sin.float()).to(x.dtype),
    "esm": lambda x, cos, sin: rotated(x.float(), rotate_half(x.float()), cos, sin).to(x.dtype),
    "casts behind the cut": lambda x, cos, sin: rotated(x.float(), rotate_half(x).float(), cos, sin).type_as(x),
    "gpt_neox": lambda x, cos, sin: gpt_neox(x, cos[..., :4], sin[..., :4]),
    "chunk": chunked,
    "split": split,
    "heads last but one": lambda x, cos, sin: (
        (h := x.transpose(1, 2)) * cos.unsqueeze(2) + rotate_half(h) * sin.unsqueeze(2)
    ),
    "scaled angles": lambda x, cos, sin: llama(x, cos * 1.2, sin * 1.2),
    "expanded angles": lambda x, cos, sin: rotated(
        x, rotate_half(x), cos.expand(len(x), -1, -1), sin.expand(len(x), -1, -1)
    ),
}
each_spelling = pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)


class Attention(nn.Module):
    """`function(heads, cos, sin)` on heads of 8 columns, cut from a projection as in any attention."""

    def __init__(self, function, width=8):
        super().__init__()
        self.function = function
        self.width = width

    def forward(self, x, cos, sin):
        # Sizes are written down: columns of a projection are no symbols.
        return self.function(x.view(*x.shape[:2], 4, self.width).transpose(1, 2), cos, sin)


def inputs(dtype=torch.float32, width=8):
    x, angle = torch.randn(2, 5, 4 * width), torch.rand(1, 5, 4).repeat(1, 1, 2) * 6
    return x.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.fixture
def fused(graph):
    def run(function, *tensors, width=8, before=(), **tolerance):
        g = graph(Attention(function, width), *(tensors or inputs()))
        g.prepare(*normalizing_passes(), *before)
        return g, g.apply(FuseRope(), **tolerance)

    return run


def test_text(graph, golden):
    g = graph(Attention(SPELLINGS["gpt_neox"]), *inputs(torch.bfloat16)).prepare(*normalizing_passes())
    before = g.text()
    g.apply(FuseRope(), rtol=2**-5, atol=2**-5)
    golden("passes/fuse_rope", f"{before}\nbecomes\n\n{g.text()}")


@each_spelling
def test_spellings(fused, function):
    g, result = fused(function)
    assert len(result.rewrites) == g.count(rope.overload) == 1 and not result.misses
    assert "neg" not in g.ops()


@each_spelling
def test_bf16_rounds_once(fused, function):
    tensors = inputs(torch.bfloat16)
    g, _ = fused(function, *tensors, rtol=2**-5, atol=2**-5)
    got, want = g.run()[0], Attention(function)(*(t.double() for t in tensors))
    assert g.count(rope.overload) == 1 and got.dtype == torch.bfloat16
    # Angles that the model scales are rounded once more.
    error = 2**-7 if function is SPELLINGS["scaled angles"] else 2**-8
    torch.testing.assert_close(got.double(), want, rtol=error, atol=error)


def test_queries_and_keys(fused):
    g, result = fused(lambda x, cos, sin: (llama(x[:, :2], cos, sin), llama(x[:, 2:], cos, sin)), *inputs())
    assert len(result.rewrites) == g.count(rope.overload) == 2


def test_halves_of_a_cut_of_a_wider_projection(fused):
    """Phi-3: q is a part of one projection, and its rotary part the front of that."""

    def phi3(qkv, cos, sin):
        return gpt_neox(qkv[..., 8:16], cos[..., :4], sin[..., :4])

    g, result = fused(phi3, *inputs(width=24), width=24)
    assert len(result.rewrites) == 1 and "neg" not in g.ops()


def test_the_norm_of_the_head_comes_first(fused):
    """Qwen3: what is rotated is the normalized head, not the projection."""

    def qwen3(x, cos, sin):
        return llama(F.rms_norm(x, (8,), None, 1e-6), cos, sin)

    g, _ = fused(qwen3, before=[RecognizeNorm()])
    (turned,) = [node for node in g.gm.graph.nodes if node.target is rope.overload]
    assert turned.args[0].target is rms_norm.overload


def test_a_norm_behind_it_reads_the_rotated_head(fused):
    """HunYuan: a rotation is a sum as well, and not the norm's."""

    def hunyuan(x, cos, sin):
        return F.rms_norm(llama(x, cos, sin), (8,), None, 1e-6)

    g, _ = fused(hunyuan, before=[RecognizeNorm()])
    assert not g.apply(FuseNorm()).rewrites and g.ops()[-2:] == ["rope", "rms_norm"]


def interleaved(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def unequal(x):
    return torch.cat((-x[..., 3:], x[..., :3]), dim=-1)


def backwards(x):
    return torch.cat((x[..., 4:], -x[..., :4]), dim=-1)


def gpt_oss(x, cos, sin):
    (x1, x2), cos, sin = x.chunk(2, -1), cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def deepseek(x, cos, sin):
    x1, x2, cos, sin = x[..., ::2], x[..., 1::2], cos[..., :4].unsqueeze(1), sin[..., :4].unsqueeze(1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


OTHER_PART = "what is multiplied with cos is not what was rotated"
NO_SUM = "rotate_half is not in a sum x * cos + rotate_half(x) * sin"
MISSES = {
    "interleaved rotary layout": lambda x, cos, sin: rotated(x, interleaved(x), cos, sin),
    "the halves are 3 and 5 wide": lambda x, cos, sin: rotated(x, unequal(x), cos, sin),
    "turns the other way: (x2, -x1)": lambda x, cos, sin: rotated(x, backwards(x), cos, sin),
    "the halves are turned one by one": [gpt_oss, deepseek],
    "rotate_half has another user": lambda x, cos, sin: (rotated(x, y := rotate_half(x), cos, sin), y),
    "mul has another user": lambda x, cos, sin: ((y := x * cos[0]) + rotate_half(x) * sin[0], y),
    OTHER_PART: [
        lambda x, cos, sin: rotated(x.exp(), rotate_half(x), cos, sin),
        lambda x, cos, sin: rotated(F.rms_norm(x, (8,)), rotate_half(x), cos, sin),
        lambda x, cos, sin: rotated(x[:, :, :, :4], rotate_half(x[:, :, :, 4:]), cos[..., :4], sin[..., :4]),
        lambda x, cos, sin: x + rotate_half(x) * sin[0],
        lambda x, cos, sin: x * x + rotate_half(x) * sin[0],
    ],
    NO_SUM: [
        lambda x, cos, sin: rotate_half(x).exp(),
        lambda x, cos, sin: rotate_half(x) * sin[0],
        lambda x, cos, sin: x * cos[0] - rotate_half(x) * sin[0],
        lambda x, cos, sin: torch.add(x * cos[0], rotate_half(x) * sin[0], alpha=2),
    ],
    "cos and sin do not broadcast to x": lambda x, cos, sin: (
        x * (cos + x.new_zeros(3, 1, 1, 1, 1)) + rotate_half(x) * sin
    ),
}


@pytest.mark.parametrize(
    ("reason", "function"),
    [(reason, f) for reason, fs in MISSES.items() for f in (fs if isinstance(fs, list) else [fs])],
)
def test_misses(fused, reason, function):
    _, result = fused(function)
    assert not result.rewrites and [miss for miss, _ in result.misses] == [reason]


def test_misses_angles_that_widen_the_result(fused):
    x, cos, sin = inputs()
    _, result = fused(llama, x.bfloat16(), cos, sin)
    assert not result.rewrites and [miss for miss, _ in result.misses] == ["the result is float32, x is bfloat16"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, cos, sin: torch.cat((x[..., 4:], x[..., :4]), -1),
        lambda x, cos, sin: torch.cat((-x[..., 4:], -x[..., :4]), -1),
        lambda x, cos, sin: torch.cat((-x, x), -1),
        lambda x, cos, sin: torch.cat((-x[..., 4:], x.exp()[..., :4]), -1),
        lambda x, cos, sin: torch.cat((-x[..., :4], x[..., 4:]), -1),
        lambda x, cos, sin: torch.cat((-x[..., 4:], x[..., :4]), 2),
        lambda x, cos, sin: torch.cat((-x[:, 2:], x[:, :2]), 1),
        lambda x, cos, sin: torch.stack((-x, x.exp())),
        lambda x, cos, sin: torch.cat((-x[..., 4:], x[..., :4], x), -1),
    ],
)
def test_not_a_rotation(fused, function):
    _, result = fused(function)
    assert not result.rewrites and not result.misses
