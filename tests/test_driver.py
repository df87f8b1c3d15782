"""driver: functions that call the regions of a graph, and calls in it that are bound to their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile import _torch
from qcompile.graph import capture
from qcompile.ops import registry
from qcompile.regions import Parts, cut

aten = torch.ops.aten


class Model(nn.Module):
    """A call of stack over what it makes, a view of an input and an input; what it reads is written behind it."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, length = tensors
        rows = torch.stack([x.sin() + length, weight.view(2, 4)[1], x + 1, x[:4]])
        total = torch.addmm(x[:1, None].expand(1, 4), rows[:1], rows.t())
        length.add_(1)
        return total, rows * 2


class Bound:
    """stack of tensors in a list that is None where each call brings one."""

    def __init__(self, tensors: Sequence[Tensor | None], dim: int = 0):
        self.tensors = list(tensors)

    def __call__(self, *moving: Tensor) -> Tensor:
        given = iter(moving)
        return torch.stack([next(given) if each is None else each for each in self.tensors])


def inputs() -> list[Tensor]:
    return [torch.randn(4), torch.randn(8), torch.tensor(3)]


def parts(
    monkeypatch: pytest.MonkeyPatch, bind: Callable[..., Any], pays: bool = True, by_name: bool = False
) -> tuple[Parts, list[Any]]:
    compiled: list[Any] = []
    monkeypatch.setattr(_torch, "inductor", lambda gm, fakes, patches=None: compiled.append(gm) or gm)
    monkeypatch.setitem(registry._BINDERS, aten.stack.default, registry.Binder(bind, pays))
    found = capture.export(Model(), tuple(inputs()))
    for node in found.gm.graph.find_nodes(op="call_function", target=aten.stack.default) if by_name else ():
        node.args, node.kwargs = (), {"tensors": node.args[0], "dim": 0}
    return cut(found.gm, found.fakes), compiled


def test_what_lies_around_a_call_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Bound] = []
    run, bind = parts(monkeypatch, lambda *args: made.append(Bound(*args)) or made[-1])[0].compile()
    assert bind is not None
    mine, theirs = (values := inputs()), [each.clone() for each in values]
    for _ in range(2):
        torch.testing.assert_close(run(*mine), Model()(*theirs))
    step = bind(*mine)
    assert [each is None for each in made[0].tensors] == [True, False, True, False]
    view, tensor = made[0].tensors[1], made[0].tensors[3]
    assert view is not None and view.data_ptr() == mine[1][4:].data_ptr()
    assert tensor is not None and tensor.data_ptr() == mine[0].data_ptr()
    for _ in range(2):
        for side in (mine, theirs):  # the memory is read, not what was in it
            side[0].mul_(2)
            side[1].add_(1)
        torch.testing.assert_close(step(), Model()(*theirs))
        torch.testing.assert_close(mine, theirs)


def test_a_call_that_is_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    run, bind = parts(monkeypatch, lambda *args: None)[0].compile()
    assert bind is not None and bind(*inputs()) is None


@pytest.mark.parametrize("given", [{"pays": False}, {"by_name": True}], ids=["does not pay", "keyword arguments"])
def test_a_call_for_which_no_graph_is_cut(monkeypatch: pytest.MonkeyPatch, given: dict[str, bool]) -> None:
    found, compiled = parts(monkeypatch, Bound, **given)
    run, bind = found.compile()
    assert bind is None and len(compiled) == 1
    values = inputs()
    torch.testing.assert_close(run(*(each.clone() for each in values)), Model()(*values))
