"""_scores: a Choice whose kernels change the scores where they read them, against one that processes them before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from qcompile.choice import Choice
from qcompile.decode_state import State
from qcompile.kernels._scores import Changes, readable

VOCABULARY = 16384
ENDS = torch.tensor([3, 9000])
MINIMUM = [theirs.MinLengthLogitsProcessor(7, ENDS), theirs.MinNewTokensLengthLogitsProcessor(5, 4, ENDS[:1])]
WARPERS = [theirs.TemperatureLogitsWarper(0.5), theirs.TopKLogitsWarper(30), theirs.TopPLogitsWarper(0.9)]


@pytest.mark.parametrize(
    ("processors", "sample"), [([], False), (MINIMUM, False), (WARPERS, True), (MINIMUM + WARPERS, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_tokens(processors: list[Any], sample: bool, dtype: torch.dtype, device: str) -> None:
    ids = torch.randint(0, 50, (3, 5), device=device)
    made = []
    for given in (processors, [theirs.InfNanRemoveLogitsProcessor(), *processors]):  # of these kernels know nothing
        made.append(Choice(given, sample, State(ids, 16, None, None), VOCABULARY, False, True))
    fused, other = made
    assert fused.direct and not other.direct and fused.key != other.key
    for step in range(4):
        logits = (2 * torch.randn(3, VOCABULARY, device=device)).to(dtype)
        logits[0, 3] = logits[1, 9000] = 30
        for choose in made:
            torch.manual_seed(step)
            choose(logits[:, None] if choose.direct else logits.float(), choose.state.text)
        assert torch.equal(fused.state.text, other.state.text) and torch.equal(fused.state.token, other.state.token)
    early = [MINIMUM[0] not in processors] * 2
    assert (fused.state.text[1, 5:9] == 9000).tolist() == [*early, True, True]


def test_what_else_is_read_as_float32(device: str) -> None:
    scores = torch.randn(2, 3, 8, dtype=torch.float64, device=device)[:, -1]
    assert readable(scores).dtype == torch.float32 and readable(scores).is_contiguous()
    half = scores.half().contiguous()
    assert readable(half) is half


def test_scores_are_multiplied_by_what_torch_divides_by() -> None:
    factor = (torch.ones(()) / 0.7).item()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Changes(temperature=0.7).factor == factor
    finally:
        torch.set_default_dtype(torch.float32)
    assert Changes().bans == 0 and Changes().factor == 1
