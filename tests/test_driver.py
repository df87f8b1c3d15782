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
    monkeypatch: pytest.MonkeyPatch,
    bind: Callable[..., Any],
    pays: bool = True,
    by_name: bool = False,
    model: nn.Module | None = None,
) -> tuple[Parts, list[Any]]:
    compiled: list[Any] = []
    monkeypatch.setattr(_torch, "inductor", lambda gm, fakes, patches=None: compiled.append(gm) or gm)
    monkeypatch.setitem(registry._BINDERS, aten.stack.default, registry.Binder(bind, pays))
    found = capture.export(model or Model(), tuple(inputs()))
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
    assert None not in made[0].tensors  # what is compiled before the call is bound, too
    view, tensor = made[0].tensors[1], made[0].tensors[3]
    assert view is not None and view.data_ptr() == mine[1][4:].data_ptr()
    assert tensor is not None and tensor.data_ptr() == mine[0].data_ptr()
    assert step.makers == [None, None]
    for _ in range(2):
        for side in (mine, theirs):  # the memory is read, not what was in it
            side[0].mul_(2)
            side[1].add_(1)
        torch.testing.assert_close(step(), Model()(*theirs))
        torch.testing.assert_close(mine, theirs)


class Before(nn.Module):
    """What comes before a call of stack: nobody else sees it, the caller does, or it writes to what it reads."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, length = tensors
        if self.kind == "writes":
            length.add_(1)
        made = x.sin() + length
        total = torch.stack([made, x])
        return (total, made) if self.kind == "seen" else (total,)


@pytest.mark.parametrize("kind", ["hidden", "seen", "writes"])
def test_which_regions_are_bound(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made: list[Bound] = []
    _, bind = parts(monkeypatch, lambda *args: made.append(Bound(*args)) or made[-1], model=Before(kind))[0].compile()
    assert bind is not None
    mine, theirs = (values := inputs()), [each.clone() for each in values]
    step = bind(*mine)
    assert [each is None for each in made[0].tensors] == [kind != "hidden", False]
    assert step.makers[0] is made[0]
    for _ in range(2):
        for side in (mine, theirs):
            side[0].mul_(2)
        torch.testing.assert_close(step(), Before(kind)(*theirs))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("does", [True, False])
def test_a_call_right_behind_another(monkeypatch: pytest.MonkeyPatch, does: bool) -> None:
    """Nothing is left of it where the other one does it, too."""
    bound: list[Any] = []

    class First(Bound):
        def let_follow(self, other: Any) -> bool:
            bound.append(other)
            return does

    monkeypatch.setitem(
        registry._BINDERS,
        aten._foreach_add_.Scalar,
        registry.Binder(lambda *args: lambda: aten._foreach_add_.Scalar(*args), False),
    )
    _, bind = parts(monkeypatch, First, model=Behind())[0].compile()
    assert bind is not None
    step = bind(*(values := inputs()))
    torch.testing.assert_close(step()[0], torch.stack([values[0], values[0]]))
    assert len(bound) == 1 and int(values[2]) == (3 if does else 4)
    bound[0]()
    assert int(values[2]) == (4 if does else 5)


class Behind(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, length = tensors
        total = torch.stack([x, x])
        aten._foreach_add_.Scalar([length], 1)
        return (total,)


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
