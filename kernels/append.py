"""A token appended to every text on a GPU, in one launch: State.put of decode_state.py."""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._tiles import (
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    refuses_place,
    tl,
)

# Sequences that one warp holds in registers.
MOST = 512


def refuses(text: Tensor) -> str | None:
    """Why `append` does not take such texts, or None."""
    if reason := refuses_place(text, "the text"):
        return reason
    return None if len(text) <= MOST else f"handles {MOST} sequences, not {len(text)}"


def append(
    tokens: Tensor, quotients: Tensor | None, text: Tensor, at: Tensor, token: Tensor, unfinished: Tensor,
    broken: Tensor, pad: Tensor | None, ends: Tensor | None,
) -> None:  # fmt: skip
    """What decode_state.State.put does with these tensors of a state."""
    pdl = dependent_launch(text)
    launch(
        _append, (1,), tokens, quotients, text, at, token, unfinished, broken, pad, ends, len(text), text.stride(0),
        0 if ends is None else len(ends), BLOCK=power_of_two(len(text)), PDL=pdl, num_warps=1,
    )  # fmt: skip


@launched
def _append(
    tokens_ptr, quotients_ptr, text_ptr, at_ptr, token_ptr, unfinished_ptr, broken_ptr, pad_ptr, ends_ptr,
    batch, room, end_count, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK)
    inside = row < batch
    tokens = tl.load(tokens_ptr + row, mask=inside, other=0)
    going = tl.load(unfinished_ptr + row, mask=inside, other=0) != 0
    if pad_ptr is not None:
        tokens = tl.where(going, tokens, tl.load(pad_ptr))
    at = tl.load(at_ptr)
    tl.store(token_ptr + row, tokens, mask=inside)
    place = at + tl.zeros((BLOCK,), tl.int64)
    tl.store(text_ptr + row.to(tl.int64) * room + place, tokens, mask=inside & (place < room))
    tl.store(at_ptr, at + 1)  # read above by this warp, and there is no other
    if ends_ptr is not None:
        for i in range(end_count):
            going = going & (tokens != tl.load(ends_ptr + i))
        tl.store(unfinished_ptr + row, going, mask=inside)
    if quotients_ptr is not None:
        quotient = tl.load(quotients_ptr + row, mask=inside, other=0.0)
        before = tl.load(broken_ptr + row, mask=inside, other=0) != 0
        tl.store(broken_ptr + batch + row, before, mask=inside)
        tl.store(broken_ptr + row, before | (quotient != quotient), mask=inside)
