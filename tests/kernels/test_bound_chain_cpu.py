"""chain_cpu's chains that are bound to their tensors, against chains that are not."""

import gc
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qcompile.kernels.chain_cpu import bind_chain, chain_anyhow

# Where there is a compiler, sources that do not compile are no reason to skip.
if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)

Layers = Callable[..., Any]  # see DecodeLayer in conftest.py


@pytest.mark.parametrize("rounding", [(), ("i8/token/dynamic",)], ids=["", "rounding"])
def test_bound(decode_layer: Layers, rounding: tuple[str, ...]) -> None:
    layer = decode_layer(torch.bfloat16, rounding=rounding)
    tensors, caches, text = layer.arguments
    _, twins, _ = layer.arguments
    moving = [i for i, tensor in enumerate(tensors) if i in (0, layer.positions.index) or tensor.dtype == torch.bool]
    mine = [tensor.clone() for tensor in tensors]
    bound = bind_chain([None if i in moving else tensor for i, tensor in enumerate(mine)], caches, text)
    assert bound is not None
    for step in range(4):
        for i in moving:  # other numbers elsewhere, and in a memory of another order
            given = tensors[i] + step if i else torch.randn_like(tensors[0])
            tensors[i] = given.to(tensors[i].dtype) if step != 2 or i else given.repeat_interleave(2, -1)[..., ::2]
        want = chain_anyhow(tensors, twins, text)
        if step == 3:  # what a tensor was given later is not looked at
            for tensor in mine:
                tensor.data = torch.zeros_like(tensor)
        got = bound(*(tensors[i] for i in moving))
        assert (got - want).norm() <= 0.02 * want.norm()
        assert all(torch.equal(cache, twin) for cache, twin in zip(caches, twins))


def test_bound_steps_that_go_wrong(decode_layer: Layers) -> None:
    layer = decode_layer(torch.bfloat16)
    tensors, caches, text = layer.arguments
    at = layer.positions.index
    bound = bind_chain([None if i == at else tensor for i, tensor in enumerate(tensors)], caches, text)
    assert bound is not None and bind_chain(tensors, caches, text) is None
    want = bound(tensors[at])
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            bound(tensors[at] + layer.CAPACITY)
        assert torch.equal(bound(tensors[at]), want)


def test_bound_in_two_threads(decode_layer: Layers) -> None:
    """Each has what is bound of its own, of the same weights."""
    layer = decode_layer(torch.bfloat16)

    def calls(_: int) -> list[Tensor]:
        tensors, caches, text = layer.arguments
        bound = bind_chain([None, *tensors[1:]], caches, text)
        assert bound is not None
        return [bound(tensors[0] * (1 + step)) for step in range(50)]

    want = calls(0)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(calls, range(2)):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_memory_that_is_bound_lives_as_long_as_what_binds_it(decode_layer: Layers) -> None:
    tensors, caches, text = decode_layer(torch.bfloat16).arguments
    mine = tensors[1].clone()
    memory = StorageWeakRef(mine.untyped_storage())
    bound = bind_chain([None, mine, *tensors[2:]], caches, text)
    assert bound is not None
    del mine
    gc.collect()
    bound(tensors[0])
    assert not memory.expired()
    del bound
    gc.collect()
    assert memory.expired()


def test_what_is_bound_again_is_read_where_it_is_then(decode_layer: Layers) -> None:
    tensors, caches, text = decode_layer(torch.bfloat16).arguments
    for _ in range(2):
        weight = tensors[1] * 2
        bound = bind_chain([None, weight, *tensors[2:]], caches, text)
        assert bound is not None
        bound(tensors[0])
        moved, place = weight.untyped_storage(), weight.data_ptr()
        moved.resize_(1 << 20)
        assert weight.data_ptr() != place
        weight.copy_(tensors[1])
        bound = bind_chain([None, weight, *tensors[2:]], caches, text)
        assert bound is not None
        torch.testing.assert_close(bound(tensors[0]), chain_anyhow(tensors, caches, text), rtol=0.02, atol=0.02)
