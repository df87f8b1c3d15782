"""calls: what a traced call gave, built again from other tensors."""

from __future__ import annotations

import torch
from transformers.modeling_outputs import CausalLMOutput

from qcompile import calls


def test_of_a_result_only_what_is_asked_for() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    build = calls.record(CausalLMOutput(logits=x + 1, hidden_states=(y,)), [y], []).build
    outputs = [torch.full((2,), 3.0)]
    whole = build(outputs, [x], [])
    assert isinstance(whole, CausalLMOutput) and whole.hidden_states is not None and whole.hidden_states[0] is x
    assert build.only("logits", "past_key_values")(outputs, [x], []) == {"logits": outputs[0]}
    row = calls.record((x + 1, y), [y], []).build
    assert row.only("logits")(outputs, [x], []) == (outputs[0], x)
