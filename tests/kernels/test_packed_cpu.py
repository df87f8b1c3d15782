"""_packed_cpu: the libraries that are compiled for the codes of an element."""

import pytest
import torch

from qcompile.algorithms import quantize
from qcompile.kernels import _packed_cpu as packed
from qcompile.ops.linear import linear
from qcompile.ops.registry import MEANING
from qcompile.quant.spec import QSpec


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    q, tried = quantize(torch.randn(16, 128), QSpec.parse("u4/g64/asym"), "rtn"), []

    def fails(source: str) -> None:
        tried.append(source)
        raise RuntimeError("g++ is not found")

    monkeypatch.setattr(packed, "load_cpp", fails)
    packed.library.cache_clear()
    packed.missing.cache_clear()
    try:
        for _ in range(2):
            choice = linear.choose(torch.randn(2, 128), q.data, q.scale, q.zero, None, "u4/g64/asym", None)
            assert dict(choice.refusals)["cpu"] == "C++ does not compile here: g++ is not found"
            assert choice.name == MEANING
        assert len(tried) == 1
    finally:
        packed.missing.cache_clear()
