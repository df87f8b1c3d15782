"""Models with weights of any spec, and the way of every writer's test: write, read back, write again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile import algorithms
from qcompile.load import load
from qcompile.quant.spec import QSpec
from qcompile.storage import Parameter, put
from qcompile.writers import Contents, Weight

INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 60, 70]])


@pytest.fixture
def packed(tiny_llama: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`packed("u4/g32/asym_int", down_proj="i8/row/sym")`: a Llama in float16 whose linears are rounded to the spec, or
    to that given for their name; None leaves them dense. Further fields are the configuration's."""

    def make(spec: str, dtype: torch.dtype = torch.float16, **others: object) -> nn.Module:
        fields = {key: value for key, value in others.items() if not key.endswith(("_proj", "head", "tokens"))}
        model = tiny_llama(**fields).to(dtype).requires_grad_(False)
        for path, module in list(model.named_modules()):
            name = path.rpartition(".")[2]
            chosen = others.get(name, spec if name.endswith("_proj") else None)
            if chosen is not None:
                weight = module.weight.detach()
                tensor = algorithms.quantize(weight, QSpec.parse(str(chosen)), "rtn")
                put(model, [Parameter((f"{path}.weight",), tuple(weight.shape), weight.dtype)], [tensor])
        return model

    return make


@pytest.fixture
def resaved(tmp_path: Path) -> Callable[..., nn.Module]:
    """`resaved(model, "awq")`: the model written and read back. The weights are the same, exactly, and written again
    they are the same bytes."""

    def run(model: nn.Module, format: str) -> nn.Module:
        dtype = next(iter(model.parameters())).dtype
        qcompile.save(model, tmp_path / "one", format=format)
        loaded = load(str(tmp_path / "one"), dtype=dtype, progress=False)
        same(model, loaded)
        qcompile.save(loaded, tmp_path / "two", format=format)
        one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
        assert one == two
        return loaded

    return run


def same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = qcompile.dequantize(one), qcompile.dequantize(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture
def weight() -> Callable[..., Weight]:
    """`weight("u4/g32/asym_int", 32, 64)`: a weight of random numbers, rounded to the spec."""

    def make(spec: str, rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.float16, **fields: object):
        tensor = algorithms.quantize(torch.randn(rows, columns).to(dtype), QSpec.parse(spec), "rtn")
        return Weight("model.layers.0.mlp.up_proj.weight", tensor, dtype, **fields)

    return make


@pytest.fixture
def tensors_of(tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """`tensors_of(writer, weight)`: the tensors that a writer makes of a weight, by the end of their names."""
    from safetensors.torch import load_file

    def run(writer: object, weight: Weight) -> dict[str, torch.Tensor]:
        writer.write(Contents({"model_type": "llama"}, [weight]), tmp_path, 1 << 30)
        return {name.rpartition(".")[2]: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}

    return run
