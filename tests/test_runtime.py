"""Calls of an optimized model: which run compiled, which do not, and that all are right."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import qcompile
from qcompile.runtime import AUTOGRAD, TRAINING

Make = Callable[..., nn.Module]


@pytest.fixture
def pair(tiny_llama: Make) -> tuple[nn.Module, nn.Module]:
    """An optimized model, and the untouched float model with the same quantized weights."""
    return pair_of(tiny_llama())


def pair_of(reference: nn.Module, **options: object) -> tuple[nn.Module, nn.Module]:
    model = qcompile.optimize(copy.deepcopy(reference), "u4/g32/asym", progress=False, **options)
    reference.load_state_dict(qcompile.dequantize(model))
    return model, reference


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 100, shape)


def programs(model: nn.Module) -> int:
    return sum(map(len, model.forward.programs.values()))


def test_positional_and_named_arguments_are_one_call(pair, interpreted: None) -> None:
    model, reference = pair
    x = ids(2, 5)
    for out in (model(x), model(input_ids=x), model(input_ids=x, attention_mask=None)):
        torch.testing.assert_close(out.logits, reference(x).logits, rtol=1e-4, atol=1e-5)
    assert programs(model) == 1 and not model.forward.eager


def test_training_runs_eagerly_with_gradients(pair, interpreted: None) -> None:
    model, _ = pair
    model.train()
    model.model.norm.weight.requires_grad_(True)
    model(ids(2, 5)).logits.sum().backward()
    assert model.model.norm.weight.grad is not None
    model.eval()
    model(ids(2, 5))
    assert model.forward.eager == {TRAINING: 1, AUTOGRAD: 1}
    with torch.no_grad():
        model(ids(2, 5))
    assert programs(model) == 1


def test_weights_are_never_stale(pair, interpreted: None) -> None:
    model, reference = pair
    x = ids(2, 5)
    model(x)
    for m in (model, reference):
        m.model.norm.weight.data.mul_(2)
        m.lm_head.weight = nn.Parameter(m.lm_head.weight * 0.5, requires_grad=False)
    torch.testing.assert_close(model(x).logits, reference(x).logits, rtol=1e-4, atol=1e-5)
    assert programs(model) == 1


def test_exchanged_module_is_seen(pair, interpreted: None) -> None:
    model, _ = pair
    x = ids(2, 5)
    before = model(x).logits

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model.lm_head = Doubled(model.lm_head)
    torch.testing.assert_close(model(x).logits, 2 * before)


def test_to_dtype_makes_its_own_program(pair, interpreted: None) -> None:
    model, _ = pair
    x = ids(2, 5)
    wide = model(x).logits
    narrow = model.to(torch.bfloat16)(x).logits
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).norm() < 0.02 * wide.norm()


def test_another_layout_of_a_cache_is_another_program(pair, interpreted: None) -> None:
    model, reference = pair

    def cache(transposed: bool) -> DynamicCache:
        made, shape = DynamicCache(), (1, 2, 5, 16)
        for index in range(model.config.num_hidden_layers):
            made.update(torch.ones(shape), torch.ones(shape), index)
            torch.manual_seed(index)
            for name in ("keys", "values"):
                x = torch.randn(shape)
                x = x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
                setattr(made.layers[index], name, x)
        return made

    with torch.no_grad():
        for transposed in (False, True, False, True):
            token = ids(1, 1)
            want = reference(token, past_key_values=cache(transposed)).logits
            torch.testing.assert_close(model(token, past_key_values=cache(transposed)).logits, want)
    assert programs(model) == 2


def test_deepcopy_and_pickle(pair, interpreted: None) -> None:
    model, _ = pair
    x = ids(2, 5)
    want = model(x).logits
    twin = copy.deepcopy(model)
    assert twin.forward.model is twin and twin.generate.model is twin
    assert torch.equal(twin(x).logits, want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.forward.model is loaded
    assert torch.equal(loaded(x).logits, want)


def test_what_cannot_be_captured_runs_and_says_so() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum().item() > 0 else -self.fc(x)

    model = qcompile.optimize(Branch(), "u4/g64/asym", progress=False)
    x = torch.ones(2, 64)
    with pytest.warns(UserWarning, match="this call runs uncompiled: Branch.forward could not be captured"):
        out = model(x)
    assert torch.equal(out, model.fc(x)) and model.forward.eager.total() == 1


def test_compiled_by_inductor_and_called_from_threads(tiny_llama: Make) -> None:
    """The real thing: code generation, no second compile when lengths vary, right answers from eight threads."""
    model, reference = pair_of(tiny_llama())
    inputs = [ids(2, length) for length in (5, 7, 9, 11, 13, 6, 8, 10)]
    wants = [reference(x).logits for x in inputs]
    gots: list[torch.Tensor] = [torch.empty(0)] * len(inputs)

    def call(index: int) -> None:
        for _ in range(5):
            gots[index] = model(inputs[index]).logits

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert programs(model) == 1


def test_arguments_are_bound_as_python_binds_them(pair, interpreted: None) -> None:
    model, _ = pair
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids(2, 5), input_ids=ids(2, 5))


def test_arguments_without_names_run_and_say_so() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, *xs: torch.Tensor) -> torch.Tensor:
            return self.fc(sum(xs))  # type: ignore[arg-type]

    model = qcompile.optimize(Sum(), "u4/g64/asym", progress=False)
    x = torch.ones(2, 64)
    with pytest.warns(UserWarning, match="arguments that have no name"):
        assert torch.equal(model(x, x), model.fc(x + x))


def test_a_model_without_a_plain_cache_says_so(tiny_llama: Make, interpreted: None) -> None:
    model, reference = pair_of(tiny_llama())
    model.forward.original = lambda **kwargs: reference(**{**kwargs, "use_cache": False})
    with pytest.warns(UserWarning, match="generate\\(\\) runs over transformers' own cache: LlamaForCausalLM keeps a"):
        assert model.forward.heads is None
