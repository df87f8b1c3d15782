"""_guards: what was assumed of some inputs, asked of others."""

import gc
import pickle
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qcompile._guards import same_form, shape_guards


def fakes_of(tensors: Sequence[Tensor], dynamic: Sequence[set[int]]) -> list[Tensor]:
    """Fakes whose sizes are symbols in the dimensions `dynamic`; equal sizes are one symbol."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    kinds = [
        [DimDynamic.DUCK if dim in dims else DimDynamic.STATIC for dim in range(x.dim())]
        for x, dims in zip(tensors, dynamic)
    ]
    return [mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes)) for x, sizes in zip(tensors, kinds)]


@pytest.mark.parametrize(
    ("others", "taken"),
    [
        ([torch.ones(5, 8), torch.ones(5)], True),
        ([torch.ones(9, 8), torch.ones(9)], True),
        ([torch.ones(5, 7), torch.ones(5)], False),
        ([torch.ones(5, 8), torch.ones(6)], False),
        ([torch.ones(8, 5).t(), torch.ones(5)], False),
        ([torch.ones(1, 8), torch.ones(1)], False),  # torch specializes on one
    ],
)
def test_sizes_and_strides(others: list[Tensor], taken: bool) -> None:
    accepts = shape_guards(fakes_of([torch.ones(5, 8), torch.ones(5)], [{0}, {0}]))
    assert accepts(others) is taken
    assert pickle.loads(pickle.dumps(accepts))(others) is taken


def test_what_was_assumed_on_the_way() -> None:
    (fake,) = fakes = fakes_of([torch.ones(6, 8)], [{0}])
    assert fake.shape[0] % 3 == 0 and fake.shape[0] < 20  # a branch of the program
    accepts = shape_guards([*fakes, 7])
    assert [rows for rows in range(2, 30) if accepts([torch.ones(rows, 8), 7])] == [3, 6, 9, 12, 15, 18]


def test_static_sizes() -> None:
    accepts = shape_guards(fakes_of([torch.ones(1, 4)], [set()]))
    assert accepts([torch.ones(1, 4)])
    assert not accepts([torch.ones(2, 4)])
    assert accepts([torch.ones(1, 8)[:, :4]])  # over one row any stride is the same


A, B = torch.ones(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda: [A, B], True),
        (lambda: [A.clone(), B.clone()], True),
        (lambda: [A], False),
        (lambda: [A, B.double()], False),
        (lambda: [A, torch.ones(2, 4)], False),
        (lambda: [A, torch.ones(3, 2).t()], False),
        (lambda: [A, torch.nn.Parameter(B)], False),
        (lambda: [A, B.to("meta")], False),
    ],
)
def test_form(change: Callable[[], list[Tensor]], same: bool) -> None:
    assert same_form([A, B])(change()) is same


def test_one_tensor_twice() -> None:
    check = same_form([A, B, A])
    other = A.clone()
    assert check([other, B, other])
    assert not check([other, B, A])


def test_no_tensor_is_kept_alive() -> None:
    tensor = torch.ones(2)
    check, gone = same_form([tensor]), weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None and check([torch.ones(2)])
