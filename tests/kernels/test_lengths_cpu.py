"""lengths_cpu against _foreach_add_."""

import torch

from qcompile.kernels.lengths_cpu import bind_lengths


def test_lengths_grow() -> None:
    lengths = [torch.tensor(number) for number in (0, 7, 1 << 40)]
    add = bind_lengths(lengths, 2)
    assert add is not None
    for _ in range(2):
        add()
    assert [int(length) for length in lengths] == [4, 11, (1 << 40) + 4]


def test_memory_that_was_given_up_is_kept() -> None:
    length = torch.tensor(1)
    add = bind_lengths([length], 1)
    assert add is not None
    length.data = torch.tensor(5)
    add()
    assert int(length) == 5


def test_what_is_not_bound() -> None:
    number = torch.tensor(1)
    for others in (torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, device="meta"), None):
        assert bind_lengths([number, others], 1) is None
