"""_packed_cpu: the libraries that are compiled for the codes of an element."""

from collections.abc import Callable

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


def test_who_uses_matrix_instructions(compile_cpu_code: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    element = QSpec.parse("u4/g64/asym").element
    if packed.missing(element) or not packed.Reader.of("u4/g64/asym", 64).many_codes:
        pytest.skip("no AVX512-VNNI here, beside which these instructions are")
    said = []
    for features, text in ((set(), ""), ({"amx_bf16"}, "#define EMULATE_TILES"), ({"amx_bf16"}, "#undef __AMX_TILE__")):
        monkeypatch.setattr(packed, "processor_features", lambda features=features: features)
        compile_cpu_code(text)
        said.append(packed.matrix_instructions(element))
    assert said[0] is None and "AMX multiplies" in said[1] and "torch alone" in said[2]
