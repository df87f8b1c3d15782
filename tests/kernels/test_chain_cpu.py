"""chain_cpu against its ops one by one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels import linear_cpu
from qcompile.kernels.chain_cpu import chain_anyhow, chain_packed
from qcompile.ops.chain import Cache, Given, Step, chain
from qcompile.ops.registry import MEANING
from qcompile.ops.row_codes import CODES, dequantize_rows

# Where there is a compiler, sources that do not compile are no reason to skip.
if not any(map(shutil.which, ("g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)

ROUNDING = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOATS = tuple(ROUNDING)
Layers = Callable[..., Any]  # see DecodeLayer in conftest.py


def check(layer: Any) -> None:
    choice = chain.choose(*layer.arguments)
    assert (choice.name, choice.refusals) == ("cpu", ())
    tensors, caches, text = layer.arguments
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    exact = [cache.double() for cache in caches]
    want = chain.meaning(wide, exact, text)
    plain = chain.meaning(tensors, caches, text)
    chain_packed(*layer.arguments)  # from the second call on without Python
    for run in (choice.function, chain_anyhow):
        _, wrote, _ = given = layer.arguments
        got = run(*given)
        assert (got.shape, got.dtype) == (want.shape, layer.dtype)
        assert (got - want).norm() <= 2 * (plain - want).norm() + ROUNDING[layer.dtype] * want.norm()
        for cache, exactly, before in zip(wrote, exact, layer.caches):
            assert (cache - exactly).norm() <= 2 * ROUNDING[layer.dtype] * exactly.norm()
            assert torch.equal(cache[:, :, :17], before[:, :, :17]) and not torch.equal(cache, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", ["u4/g32/asym", "i8/row/sym"])
def test_a_layer(decode_layer: Layers, dtype: torch.dtype, spec: str) -> None:
    check(decode_layer(dtype, spec=spec))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding(decode_layer: Layers, dtype: torch.dtype) -> None:
    """A number between two codes goes to another one now and then."""
    layer = decode_layer(dtype, batch=2, rounding=("i8/token/dynamic",))
    assert chain.choose(*layer.arguments).name == "cpu"
    wide = [t.double() if t.is_floating_point() else t for t in layer.tensors]
    want = chain.meaning(wide, [cache.double() for cache in layer.caches], layer.arguments[2])
    chain_packed(*layer.arguments)
    plain = chain_packed(*layer.arguments[:2], layer.arguments[2].replace(" i8/token/dynamic", ""))
    for run in (chain_packed, chain_anyhow):
        got = run(*layer.arguments)
        assert (got - want).norm() <= (1e-2 + 2 * ROUNDING[dtype]) * want.norm()
        assert (plain - want).norm() > (got - want).norm()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_other_sizes(decode_layer: Layers, dtype: torch.dtype) -> None:
    check(decode_layer(dtype, batch=3, angles=4))
    check(decode_layer(dtype, length=4))
    check(decode_layer(dtype, batch=2, length=2, heads=3, kv=1, width=48, mask=(2, 3), angles=4))
    check(decode_layer(dtype, heads=9, kv=3, width=64, mask=None, angles=2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed"])
def test_a_quantized_cache(decode_layer: Layers, dtype: torch.dtype, codes: torch.dtype, fixed: bool) -> None:
    """Codes of numbers that are not quite the same differ by one now and then."""
    for sizes in ({}, dict(batch=2, length=2, heads=3, kv=1, width=48, angles=4), dict(heads=9, kv=3, width=64)):
        layer = decode_layer(dtype, codes=codes, fixed=fixed, **sizes)
        choice = chain.choose(*layer.arguments)
        assert (choice.name, choice.refusals) == ("cpu", ())
        exact = layer.arguments
        wide = [t.double() if t.is_floating_point() else t for t in layer.tensors]
        want = chain.meaning(wide, *exact[1:])
        chain_packed(*layer.arguments)
        for run in (choice.function, chain_anyhow):
            given = layer.arguments
            got = run(*given)
            step = {torch.int8: 2e-2, torch.uint8: 5e-2}[codes]
            assert got.dtype == dtype and (got - want).norm() <= (step + 2 * ROUNDING[dtype]) * want.norm()
            for i in (0, 1):
                mine, theirs = (dequantize_rows(side[1][i], side[1][i + 2], torch.float64) for side in (given, exact))
                assert (mine - theirs).norm() <= (step / 10 + ROUNDING[dtype]) * theirs.norm()
            for i in (2, 3):
                torch.testing.assert_close(given[1][i], exact[1][i], rtol=4 * ROUNDING[dtype] + 1e-6, atol=0)
                assert torch.equal(given[1][i], layer.caches[i]) == fixed


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed"])
def test_codes(codes: torch.dtype, fixed: bool) -> None:
    """Those of the op, bit by bit: of all sizes, ties, zeros, and what is no number."""
    q, k, cos, sin = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 4, 32), torch.ones(4, 32), torch.zeros(4, 32)
    v = torch.randn(1, 2, 4, 80) * 10.0 ** torch.randint(-9, 4, (1, 2, 4, 80))
    v[0, 0, 0] = torch.arange(80) * 1.5 - 60
    v[0, 0, 1] = 0
    v[0, 1, 0, 5], v[0, 1, 1, 3], v[0, 1, 2, 70] = torch.nan, torch.inf, -torch.inf
    caches, sides = (Cache(0), Cache(1)), (Cache(2), Cache(3))
    steps = [
        Step("rope_into_cache", (*map(Given, range(5)), *caches, Given(5), *sides, fixed)),
        Step("attention", (Given(0), *caches, None, False, 0.2, None, *sides)),
    ]
    tensors = [q, k, v, cos, sin, torch.tensor([7, 2, 0, 3])]
    cache = [torch.zeros(1, 2, 8, width, dtype=codes) for width in (32, 80)]
    scales = [torch.full((1, 2, 8), 1 / 3) for _ in "kv"]
    given, other = ([x.clone() for x in (*cache, *scales)] for _ in "ab")
    text = "\n".join(map(str, steps))
    for _ in range(2):
        chain_packed(tensors, given, text)
    chain.meaning(tensors, other, text)
    mine, theirs = (dequantize_rows(side[1], side[3], torch.float32) for side in (given, other))
    assert torch.equal(given[3], other[3]) or not fixed
    scaled = other[3].isfinite()
    assert torch.equal(given[3][scaled], other[3][scaled]) and torch.equal(given[3].isfinite(), scaled)
    number = v.isfinite().all(-1) if not fixed else v.isfinite()
    at = tensors[5]
    assert torch.equal(given[1][:, :, at][number], other[1][:, :, at][number])
    if not fixed or codes == torch.uint8:
        assert torch.equal(mine[:, :, at].isnan(), theirs[:, :, at].isnan()) and theirs.isnan().any()
    assert not given[1][:, :, [1, 4, 5, 6]].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(decode_layer: Layers, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(decode_layer(torch.bfloat16, heads=16, kv=8, width=64))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}], ids=str
)
def test_fewer_threads_than_asked(limit: dict[str, str]) -> None:
    check_alone("torch.set_num_threads(3)", limit)


def test_decimal_commas(tmp_path: Path) -> None:
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True).returncode > 1:
        pytest.skip("cannot make a locale")
    check_alone("import locale; locale.setlocale(locale.LC_ALL, 'de_DE.UTF-8')", {"LOCPATH": str(tmp_path)})


def check_wide_layer(decode_layer: Layers) -> None:
    """Not held against torch's attention, which is NaN where OpenMP gives fewer threads than torch has."""
    layer = decode_layer(torch.bfloat16, heads=16, kv=8, width=64)
    tensors, caches, text = layer.arguments
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    for _ in range(2):
        got = chain_packed(*layer.arguments)
        want = chain.meaning(wide, [cache.double() for cache in caches], text)
        assert (got - want).norm() <= 0.02 * want.norm()


def check_alone(before: str, environment: dict[str, str]) -> None:
    code = (
        f"import torch; from tests.kernels import conftest, test_chain_cpu; {before}; "
        "test_chain_cpu.check_wide_layer(conftest.DecodeLayer)"
    )
    folder = Path(__file__).parents[2]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr


def test_what_goes_through_python_is_the_same(decode_layer: Layers) -> None:
    layer = decode_layer(torch.bfloat16)
    chain_packed(*layer.arguments)
    want = chain_packed(*layer.arguments)
    layer.tensors[0] = layer.tensors[0].new_zeros(1, 1, 2 * layer.HIDDEN)[..., ::2].copy_(layer.tensors[0])
    assert torch.equal(chain_packed(*layer.arguments), want)
    layer.tensors[0] = layer.tensors[0].contiguous()
    layer.tensors[-2] = layer.tensors[-2].t().contiguous().t()  # found out while steps before it run
    assert torch.equal(chain_packed(*layer.arguments), want)


@pytest.mark.parametrize("position", [-1, 40])
def test_positions_outside_of_the_cache(decode_layer: Layers, position: int) -> None:
    layer = decode_layer(torch.bfloat16)
    layer.tensors[layer.positions.index].fill_(position)
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            chain_packed(*layer.arguments)


def test_numbers_that_are_none(decode_layer: Layers) -> None:
    layer = decode_layer(torch.bfloat16, batch=2)
    layer.tensors[0][0, 0, 5] = torch.nan
    for _ in range(2):
        y = chain_packed(*layer.arguments)
        assert y[0].isnan().all() and y[1].isfinite().all()


def test_opcheck(decode_layer: Layers) -> None:
    torch.library.opcheck(chain_packed, decode_layer(torch.bfloat16).arguments)
    torch.library.opcheck(chain_anyhow, decode_layer(torch.bfloat16).arguments)


def test_refusals(decode_layer: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(*given: Any) -> str:
        choice = chain.choose(*given)
        assert choice.name == MEANING
        return dict(choice.refusals)["cpu"]

    tensors, caches, text = decode_layer(torch.bfloat16).arguments
    on_meta = [tensor.to("meta") for tensor in tensors]
    assert "needs cpu, got meta" in why(on_meta, caches, text)
    assert "handles queries, keys and values of one of" in why(tensors, [caches[0].float(), caches[1]], text)
    assert "multiples of 16 columns" in why(*decode_layer(torch.bfloat16, width=8).arguments)
    assert "no step linear" in why(tensors, caches, "linear %0")
    assert "argument 7 of fused_linear is what another step makes" in why(
        tensors, caches, text.replace("none none u4/g32/asym", "#0@0:1:1 none u4/g32/asym")
    )
    monkeypatch.setattr(linear_cpu, "most_few_rows", lambda dtype, reader: 16)  # whatever this processor's are
    assert "up to 8 query rows" in why(*decode_layer(torch.bfloat16, length=9).arguments)


def test_what_is_kept_of_a_call_is_that_of_these_tensors(decode_layer: Layers) -> None:
    layer = decode_layer(torch.bfloat16)
    first, second, text = layer.arguments

    def same(tensors: list[Tensor], caches: list[Tensor]) -> None:
        twins = [cache.clone() for cache in caches]
        want = chain_anyhow(tensors, twins, text)
        got = chain_packed(tensors, caches, text)
        assert (got - want).norm() <= 0.02 * want.norm()
        assert all(torch.equal(cache, twin) for cache, twin in zip(caches, twins))

    for _ in range(3):
        same(first, second)
    for index in range(len(first)):  # elsewhere, one after the other, and what was there is another tensor's now
        tensors = list(first)
        tensors[index] = first[index].clone()
        same(tensors, second)
        if first[index].is_floating_point():
            first[index].mul_(0.5)
        same(first, second)
    # The same memory of another shape: a cache of fewer places, keys that lie apart.
    memory = [torch.randn(1, 2, layer.CAPACITY, 64).bfloat16() for _ in range(2)]
    same(first, [m[..., :32] for m in memory])
    same(first, [m.view(1, 2, 2 * layer.CAPACITY, 32)[:, :, : layer.CAPACITY] for m in memory])
    same(first, [m.view(1, 4, layer.CAPACITY, 32)[:, :2] for m in memory])
    # A position that is not in the cache, where the tensor stays where it is.
    positions = first[layer.positions.index]
    positions.fill_(layer.CAPACITY)
    with pytest.raises((RuntimeError, IndexError)):
        chain_packed(first, second, text)
    positions.fill_(3)
    same(first, second)
