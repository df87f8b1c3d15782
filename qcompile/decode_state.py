"""What changes from token to token of a text that grows, beside its cache, in tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from qcompile.kernels import append


class State:
    """The memory of a decoding step: its operations read and write these tensors and allocate none that lasts.

    text        i64[batch, room], the tokens so far
    at          i64[1], how many there are
    token       i64[batch, 1], the last ones
    unfinished  bool[batch]
    broken      bool[2, batch], whether there was nothing to choose from at some step; the same before the last step
    position    the positions of `token`, if the model is told
    mask        the attention mask, if some of the text is hidden
    ends, pad   i64[…], the tokens that end a sequence, and the one that follows them
    banned      bool[processors, vocabulary], tokens that may not come before there are `least` i64[processors] tokens
    ignored     i64[batch], how many tokens at the beginning count as no repetition
    """

    def __init__(self, input_ids: Tensor, room: int, position: Tensor | None, mask: Tensor | None):
        batch, length = input_ids.shape
        with torch.inference_mode(False):  # else no call outside of that mode could write to them
            self.text = input_ids.new_zeros(batch, max(room, length))
            self.text[:, :length] = input_ids
            self.at = torch.full((1,), length, device=input_ids.device)
            self.token = input_ids[:, -1:].clone()
            self.unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
            self.broken = torch.zeros(2, batch, dtype=torch.bool, device=input_ids.device)
            self.position = None if position is None else position.clone()
            self.mask = None if mask is None else mask.clone()
        self.ends: Tensor | None = None
        self.pad: Tensor | None = None
        self.banned: Tensor | None = None
        self.least: Tensor | None = None
        self.ignored: Tensor | None = None

    @property
    def form(self) -> Hashable:
        """What two states have in common where one can lie in the other's memory."""
        return tuple((name, x if x is None else (x.dtype, x.device, x.shape)) for name, x in vars(self).items())

    def move_to(self, other: State) -> None:
        """From now on this state is in the memory of the other one, which is of the same form."""
        for name, memory in vars(other).items():
            if memory is not None:
                setattr(self, name, memory.copy_(getattr(self, name)))

    def make_room(self, length: int) -> None:
        if length > self.text.shape[1]:
            self.text = torch.cat([self.text, self.text.new_zeros(len(self.text), length)], dim=1)

    def put(self, tokens: Tensor, quotients: Tensor | None = None) -> None:
        """Append i64[batch]; sequences that have ended get `pad`, and those that get one of `ends` have ended. Where
        f32[batch] `quotients`, by which they were drawn, are NaN, there was nothing to choose from."""
        if append.refuses(self.text) is None:
            own = self.text, self.at, self.token, self.unfinished, self.broken, self.pad, self.ends
            return append.append(tokens, quotients, *own)
        if quotients is not None:
            self.broken[1].copy_(self.broken[0])
            self.broken[0].logical_or_(quotients.isnan())
        if self.pad is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad)
        self.token.copy_(tokens[:, None])
        self.text.index_copy_(1, self.at, self.token)
        self.at.add_(1)
        if self.ends is not None:
            # torch.isin waits for the GPU where it is given many.
            self.unfinished.logical_and_((tokens[:, None] != self.ends).all(1))
