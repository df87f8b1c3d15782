"""bound_region: what is compiled, on the same inputs each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile import _torch
from qcompile.bound_region import bind_region


def compiled(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
    return _torch.inductor(_torch.trace(function, fakes), fakes)


def one(x: Tensor, index: Tensor) -> list[Tensor]:
    return [x[index].sin().to(torch.bfloat16).unsqueeze(0), (x * 2).sum(-1)]


def another_library(x: Tensor, index: Tensor) -> list[Tensor]:
    return [x @ x.t(), x + index]


def an_input(x: Tensor, index: Tensor) -> list[Tensor]:
    return [x.view(-1), x + index]


@pytest.mark.parametrize(("function", "is_one_call"), [(one, True), (another_library, False), (an_input, False)])
def test_what_is_in_the_inputs_is_read_at_each_call(function: Callable[..., Any], is_one_call: bool) -> None:
    x, index = torch.randn(8, 4), torch.tensor([3])
    region = compiled(function, x, index)
    assert (_torch.kernel_call(region, (x, index)) is not None) == is_one_call
    run, results = bind_region(region, x, index)
    places = [result.data_ptr() for result in results]
    for step in range(3):
        x.normal_()
        index.fill_(step)
        run()
        for result, want in zip(results, function(x, index), strict=True):
            torch.testing.assert_close(result, want)
    assert [result.data_ptr() for result in results] == places


def test_what_is_not_inductors() -> None:
    x = torch.ones(3)
    run, (result,) = bind_region(lambda x: [x + 1], x)
    x.fill_(5)
    run()
    assert torch.equal(result, x + 1)
