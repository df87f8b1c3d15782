"""chain_cpu's chains that are bound to their tensors, against chains that are not."""

import gc
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qcompile.decode_state import State
from qcompile.kernels import chain_cpu
from qcompile.kernels.chain_cpu import bind_chain, chain_anyhow
from qcompile.kernels.lengths_cpu import bind_lengths
from qcompile.kernels.likeliest_cpu import bind_likeliest

# Where there is a compiler, sources that do not compile are no reason to skip.
if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)

Layers = Callable[..., Any]  # see DecodeLayer in conftest.py


def test_no_streams() -> None:
    # They read zeros, or crash, where the compiler links a static libstdc++ (g++ -static-libstdc++).
    headers = ("iostream", "sstream", "fstream", "locale", "iomanip")
    for path in (Path(chain_cpu.__file__).parent / "cpu").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not [header for header in headers if f"#include <{header}>" in text], path.name


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
    assert bound is not None
    bound(tensors[at])  # a process's first call of its kind is Python's
    want = bound(tensors[at])
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            bound(tensors[at] + layer.CAPACITY)
        assert torch.equal(bound(tensors[at]), want)


def test_bound_to_all_of_its_tensors(decode_layer: Layers) -> None:
    layer = decode_layer(torch.bfloat16)
    tensors, caches, text = layer.arguments
    _, twins, _ = layer.arguments
    mine = [tensor.clone() for tensor in tensors]
    bound = bind_chain(mine, caches, text)
    assert bound is not None
    for _ in range(3):  # the memory is read, not what was in it
        mine[0].normal_()
        mine[layer.positions.index].add_(1)
        want = chain_anyhow(mine, twins, text)
        got = bound()
        assert (got - want).norm() <= 0.02 * want.norm()
        assert all(torch.equal(cache, twin) for cache, twin in zip(caches, twins))


def test_what_follows_each_call(decode_layer: Layers) -> None:
    tensors, caches, text = decode_layer(torch.bfloat16).arguments
    bound, length = bind_chain([None, *tensors[1:]], caches, text), torch.tensor(3)
    assert bound is not None and not bound.let_follow(lambda: None)
    batch = len(tensors[0])
    state, other = (State(torch.zeros(batch, 2, dtype=torch.int64), 9, None, None) for _ in range(2))
    none = torch.empty(0, dtype=torch.int64)
    assert bound.let_follow(bind_lengths([length], 2))
    assert bound.let_follow(bind_likeliest(none, none, state.text, state.at, state.token, state.unfinished, None, None))
    for step in range(3):
        gc.collect()  # nobody else has what follows
        other.put(bound(torch.randn_like(tensors[0])).flatten(1).argmax(-1))
        assert int(length) == 5 + 2 * step and torch.equal(state.text, other.text)


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
