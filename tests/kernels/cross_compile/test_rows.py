"""Kernels that make rows of others: norms, activations, rope, codes, and the choice of a token."""

from collections.abc import Callable

import pytest

from qcompile.kernels import (
    append,
    draw,
    gated_act,
    gated_codes,
    likeliest_cuda,
    norm,
    rope,
    rope_into_cache,
    scale_sums,
)


@pytest.mark.parametrize("early", [True, False])
def test_norm(compiled: Callable, assert_fits: Callable, early: bool) -> None:
    assert_fits(compiled(norm._rms_norm, 8, OFFSET=0.0, EARLY=early, BLOCK_M=1, BLOCK_N=4096))
    assert_fits(compiled(norm._layer_norm, 8, EARLY=early, BLOCK_M=1, BLOCK_N=4096))


def test_gated_act(compiled: Callable, assert_fits: Callable) -> None:
    assert_fits(compiled(gated_act._gated_act, 4, ACTIVATION="silu", BLOCK_M=1, BLOCK_N=1024))


@pytest.mark.parametrize("element", ["*i8", "*u8"])
def test_gated_codes(gpu: int, compiled: Callable, assert_fits: Callable, element: str) -> None:
    if element == "*u8" and gpu < 89:
        pytest.skip("has no fp8")
    types = {"codes_ptr": element, "step_ptr": "*fp32"}
    assert_fits(compiled(gated_codes._gated_codes, 16, types=types, ACTIVATION="silu", BLOCK=16384))


@pytest.mark.parametrize("parts", ["*i32", "*fp32", "*i8", "*fp8e4nv"])
def test_scale_sums(gpu: int, compiled: Callable, assert_fits: Callable, parts: str) -> None:
    """Sums of products, and codes that are to be floats."""
    if parts == "*fp8e4nv" and gpu < 89:
        pytest.skip("has no fp8")
    types = {"parts_ptr": parts, "step_ptr": "*fp32"}
    codes = parts in ("*i8", "*fp8e4nv")
    around = {"PARTS": 1, "ACTIVATION": None} if codes else {"PARTS": 2, "ACTIVATION": "silu"}
    absent, kernel = ("scale_ptr", "bias_ptr") if codes else (), scale_sums._scale_sums
    assert_fits(compiled(kernel, 4, absent=absent, types=types, BLOCK=scale_sums.BLOCK, **around))


def test_rope(compiled: Callable, assert_fits: Callable) -> None:
    assert_fits(compiled(rope._rope, 4, HALF=64, BLOCK_M=8, BLOCK_N=64))


@pytest.mark.parametrize("codes", [None, "*i8", "*u8"])
def test_rope_into_cache(gpu: int, compiled: Callable, assert_fits: Callable, codes: str | None) -> None:
    if codes == "*u8" and gpu < 89:
        pytest.skip("has no fp8")
    absent = () if codes else ("key_scales_ptr", "value_scales_ptr")
    types = {"keys_ptr": codes, "values_ptr": codes} if codes else {}
    sizes = {"HALF": 64, "WIDTH": 128, "BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_V": 128}
    assert_fits(compiled(rope_into_cache._rope_into_cache, 4, absent=absent, types=types, **sizes))


LENGTHS = {"banned_ptr": "*i1", "least_ptr": "*i64", "at_ptr": "*i64"}


@pytest.mark.parametrize("scores", ["*fp32", "*fp16"])
def test_draw(compiled: Callable, assert_fits: Callable, scores: str) -> None:
    int32 = dict.fromkeys(("largest_ptr", "places_ptr"), "*i32")
    types = {"scores_ptr": scores, "noise_ptr": "*fp32", "held_ptr": "*fp32", "tokens_ptr": "*i64", "best_ptr": "*fp32"}
    low_bits = 0 if scores == "*fp32" else 13
    read = {"types": types | int32 | LENGTHS, "GROUP": draw.GROUP, "BANS": 1, "LOW_BITS": low_bits}
    assert_fits(compiled(draw._largest_of_groups, 4, GROUPS=draw.GROUPS, **read))
    assert_fits(compiled(draw._draw, 8, ALL=draw.MOST // 2, ROOM=draw.MOST // 2 // draw.GROUP, **read))
    if scores == "*fp32":
        assert_fits(compiled(draw._draw, 8, ALL=draw.MOST, ROOM=draw.MOST // draw.GROUP, **read), stack=128)
    read["GROUP"] = 2 * draw.GROUP  # of more scores than MOST such groups have
    assert_fits(compiled(draw._largest_of_groups, 4, GROUPS=draw.GROUPS, **read))
    assert_fits(compiled(draw._draw, 8, ALL=draw.MOST, ROOM=draw.MOST // 2 // draw.GROUP, **read), stack=128)


def test_likeliest(compiled: Callable, assert_fits: Callable) -> None:
    types = {"scores_ptr": "*fp16", "best_ptr": "*i64", **LENGTHS}
    assert_fits(compiled(likeliest_cuda._best_of_part, 4, types=types, PART=likeliest_cuda.PART, BANS=1))
    assert_fits(compiled(likeliest_cuda._best_of_row, 1, types=types, BLOCK=64))
    assert_fits(compiled(likeliest_cuda._best_of_row, 1, types=types, BLOCK=likeliest_cuda.MOST), stack=512)


def test_append(compiled: Callable, assert_fits: Callable) -> None:
    numbers = dict.fromkeys(("text_ptr", "at_ptr", "token_ptr", "pad_ptr", "ends_ptr"), "*i64")
    flags = dict.fromkeys(("unfinished_ptr", "broken_ptr"), "*i1")
    for batch in (16, append.MOST):
        assert_fits(compiled(append._append, 1, types={**numbers, **flags, "quotients_ptr": "*fp32"}, BLOCK=batch))
