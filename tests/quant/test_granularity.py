import re

import pytest
import torch

from qcompile.errors import SpecError
from qcompile.quant.granularity import parse_granularity


@pytest.mark.parametrize("tag", ["tensor", "row", "g1", "g64", "o64", "g4096", "b128x128", "b1x32"])
def test_tag_parses_back(tag: str) -> None:
    assert str(parse_granularity(tag)) == tag


@pytest.mark.parametrize(
    ("tag", "rows", "columns", "shape"),
    [
        ("tensor", 8, 128, (1, 1)),
        ("row", 8, 128, (8, 1)),
        ("g64", 8, 128, (8, 2)),
        ("g1", 2, 3, (2, 3)),
        ("g64", 4, 96, (1, 6)),  # groups run on over row ends
        ("g128", 2, 64, (1, 1)),
        ("o64", 8, 128, (1, 16)),
        ("o8", 8, 3, (1, 3)),
        ("b4x64", 8, 128, (2, 2)),
        ("b128x128", 160, 576, (2, 5)),  # the last tiles are cut off
    ],
)
def test_scale_shape(tag: str, rows: int, columns: int, shape: tuple[int, int]) -> None:
    assert parse_granularity(tag).scale_shape(rows, columns) == shape


@pytest.mark.parametrize("tag", ["g64", "o64"])
def test_groups_that_do_not_divide_the_weight(tag: str) -> None:
    with pytest.raises(SpecError, match=re.escape("group size 64 does not divide a weight of (3, 100)")):
        parse_granularity(tag).scale_shape(3, 100)


def test_who_shares_a_scale() -> None:
    def scales(tag: str) -> list[list[int]]:
        granularity = parse_granularity(tag)
        rows, columns = granularity.scale_shape(4, 4)
        scale = torch.arange(rows * columns).reshape(rows, columns)
        return granularity.spread(scale, 4, 4).expand(4, 4).tolist()

    assert scales("tensor") == [[0] * 4] * 4
    assert scales("row") == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
    assert scales("g2") == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5], [6, 6, 7, 7]]
    assert scales("g8") == [[0] * 4] * 2 + [[1] * 4] * 2
    # Four parts of one row each: element n belongs to group n mod 4. Two parts of two rows: n mod 8.
    assert scales("o4") == [[0, 1, 2, 3]] * 4
    assert scales("b2x3") == [[0, 0, 0, 1]] * 2 + [[2, 2, 2, 3]] * 2
    assert scales("b3x4") == [[0] * 4] * 3 + [[1] * 4]
    assert scales("o2") == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize("shape", [(8, 192), (3, 320), (6, 64), (2, 96)])
@pytest.mark.parametrize("tag", ["tensor", "row", "g1", "g8", "g64", "g192", "o2", "o32"])
def test_fold_gathers_what_spread_hands_out(tag: str, shape: tuple[int, int]) -> None:
    granularity = parse_granularity(tag)
    rows, columns = granularity.scale_shape(*shape)
    numbers = torch.arange(rows * columns).reshape(rows, columns)
    view, axis = granularity.fold(granularity.spread(numbers, *shape).expand(shape))
    low, high = view.aminmax(dim=axis)
    assert torch.equal(low, numbers.flatten())
    assert torch.equal(high, numbers.flatten())


@pytest.mark.parametrize(
    "tag",
    ["", "g", "g0", "g064", "g-1", "o6.4", "group64", "rows", "64", "g6x", "g" + "9" * 5000, "b8", "b0x8", "b8x٣"],
)
def test_unknown_granularity(tag: str) -> None:
    with pytest.raises(SpecError, match=f"unknown granularity '{tag}'; known: tensor, row, g<inputs>"):
        parse_granularity(tag)


@pytest.mark.parametrize("tag", ["b2x64", "b4x96", "b128x128", "b1x32"])
def test_fold_of_tiles_that_are_cut_off(tag: str) -> None:
    granularity = parse_granularity(tag)
    rows, columns = granularity.scale_shape(6, 160)
    numbers = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    view, axis = granularity.fold(granularity.spread(numbers, 6, 160))
    assert torch.equal(view.amin(axis), numbers.flatten())
    assert torch.equal(view.amax(axis), numbers.flatten())
