"""fingerprint: what changes it, and what does not."""

import copy
import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile import pinned
from qcompile.fingerprint import Unknown, fingerprint

SCALE, TABLE = 2.0, {"act": F.relu}


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


class Model(nn.Module):
    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.layer = Layer(4, 1, 8)
        self.options = {"eps": 1e-5, "names": ["a", "b"]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(TABLE["act"](helper(self.fc(x))))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.depth

    def sideways(self, x: torch.Tensor) -> torch.Tensor:
        """Which is called by a name that is made as it runs, if at all."""
        return x


class Layer(nn.TransformerEncoderLayer):
    """Its parent, which is torch's, calls what it defines."""

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        return x


def of(model: nn.Module) -> str:
    return fingerprint(model, model.forward)


def test_equal_models_are_alike() -> None:
    one, other = Model(), Model()
    assert of(one) == of(other) == of(copy.deepcopy(one))
    other.fc.weight.data.mul_(2)
    assert of(one) == of(other), "values of weights are inputs"


def _attribute(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.options["names"].append("c")  # type: ignore[attr-defined]


def _method(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Model, "inner", lambda self, x: x - self.depth)


def _method_by_any_name(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Model, "sideways", lambda self, x: -x)


def _method_that_a_parent_calls(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Layer, "_ff_block", lambda self, x: -x)


def _class_attribute(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Model, "depth", 4)


def _global(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "SCALE", 3.0)


def _table(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, "act", F.gelu)


def _helper(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "helper", lambda x: x)


def _forward(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.forward = lambda x: x  # type: ignore[method-assign]


def _wrapped(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.forward = functools.partial(Model.forward, model)  # type: ignore[method-assign]


def _hook(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.fc.register_forward_hook(lambda module, args, y: -y)


def _dtype(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.half()


def _shape(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.fc.bias = nn.Parameter(torch.zeros(1))


def _tie(model: Model, patch: pytest.MonkeyPatch) -> None:
    model.other = nn.Parameter(model.fc.weight)


def _of_torch(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "linear", lambda x, weight, bias=None: x)


def _module_of_torch(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.Linear, "forward", lambda self, x: x)


def _of_transformers(model: Model, patch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    patch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: None)


def _one_of_torchs_own_for_another(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "silu", F.gelu)


def _method_of_torchs_own(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.Linear, "reset_parameters", nn.Linear.extra_repr)


def _constant_of_torchs_own(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules["torch.nn.modules.linear"], "WIDE", True, raising=False)


def _entry_of_a_registry(model: Model, patch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", repeat_kv)


def _registry(model: Model, patch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "mine", lambda *args: None)


def _threads(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 77)


def _default_device(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_default_device", lambda: torch.device("meta"))


def _processor(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("qcompile.pinned.processor_features", lambda: frozenset({"avx2"}))


def _default_dtype(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_default_dtype", lambda: torch.float64)


CHANGES = [
    _attribute, _method, _method_by_any_name, _method_that_a_parent_calls, _class_attribute, _global, _table, _helper,
    _forward, _wrapped, _hook, _dtype, _shape, _tie, _of_torch, _module_of_torch, _of_transformers, _registry, _threads,
    _default_dtype, _default_device, _processor, _one_of_torchs_own_for_another, _method_of_torchs_own,
    _constant_of_torchs_own, _entry_of_a_registry,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_changes_it(change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401

    model = Model()
    before = of(model)
    change(model, monkeypatch)
    assert of(model) != before


def test_a_module_named_like_one_of_pythons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not one that changes with a version."""
    found = []
    for number in range(2):
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "this", raising=False)
        (tmp_path / "this.py").write_text(f"class Act:\n    def __call__(self, x):\n        return x * {number}\n")
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        model = Model()
        model.act = importlib.import_module("this").Act()
        found.append(of(model))
    assert found[0] != found[1]


def test_what_transformers_imported_is_no_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchvision installed, transformers.image_utils has functions of it, which no fingerprint could read."""
    from transformers import activations

    source = "from torch import Generator\nstate = Generator()\ndef decode(x):\n    return state\n"
    (tmp_path / "imaginary_vision.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    vision = importlib.import_module("imaginary_vision")
    monkeypatch.setattr(activations, "decode", vision.decode, raising=False)
    with pytest.raises(Unknown, match="Generator"):
        of(Model())
    monkeypatch.setattr(pinned, "_requires", lambda package: ['imaginary_vision>=1; extra == "vision"'])
    for cached in (pinned._needed, pinned._optional):
        monkeypatch.setattr(pinned, cached.__name__, cached.__wrapped__)
    of(Model())


def _imports(x: torch.Tensor) -> Any:
    from tests_of_nothing import act  # type: ignore[import-not-found]

    return act(x)


def _looks_up(x: torch.Tensor) -> Any:
    return globals()["helper"](x)


def _asks_the_environment(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if os.getenv("TWICE") else x


def _looks_into_a_module(x: torch.Tensor) -> Any:
    return getattr(pytest, "mark")(x)  # noqa: B009


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_imports, "an import of tests_of_nothing inside of _imports"),
        (_looks_up, "code that calls globals: _looks_up"),
        (_asks_the_environment, "code that calls getenv: _asks_the_environment"),
        (_looks_into_a_module, "code that may look up names in the module pytest"),
    ],
)
def test_code_that_reaches_for_more_than_it_names(function: Any, why: str) -> None:
    model = Model()
    model.forward = function  # type: ignore[method-assign]
    with pytest.raises(Unknown, match=why):
        of(model)


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.Generator(), {object}, iter([1])], ids=lambda x: type(x).__name__
)
def test_what_is_unknown(value: Any) -> None:
    model = Model()
    model.extra = value
    with pytest.raises(Unknown):
        of(model)


def test_another_process_gives_the_same(tmp_path: Any) -> None:
    text = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from qcompile.fingerprint import fingerprint\n"
        "config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)\n"
        "model = LlamaForCausalLM(config)\n"
        "print(fingerprint(model, model.forward))"
    )
    found = {subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(found) == 1 and len(found.pop().strip()) == 64
