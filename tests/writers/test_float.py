"""float."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import qcompile


def test_transformers_reads_it(packed: Callable, tmp_path: Path) -> None:
    model = packed("u4/g32/asym_int", embed_tokens="u8/row/asym", lm_head="nf4/g32/sym", dtype=torch.bfloat16)
    qcompile.save(model, tmp_path, format="float")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    want, got = qcompile.dequantize(model), theirs.state_dict()
    assert theirs.dtype == torch.float32 and want.keys() == got.keys()
    assert not [path for path in want if not torch.equal(want[path], got[path])]


def test_a_transposed_weight(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_head=2, n_layer=1))
    model = qcompile.optimize(model, "i4/g32/sym", progress=False)
    qcompile.save(model, tmp_path, format="float")
    want, got = qcompile.dequantize(model), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert not [path for path in got if not torch.equal(want[path], got[path])]
