"""optimize() and its neighbours: the right result, or a clear error that leaves the model whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import ConfigError, SpecError, StrictError, WeightError
from qcompile.kernels._packed_cpu import matrix_instructions
from qcompile.quant.spec import QSpec

Make = Callable[..., nn.Module]


def test_same_object_same_class(tiny_llama: Make) -> None:
    model = tiny_llama()
    cls = type(model)
    assert qcompile.optimize(model, "u4/g32/asym", progress=False) is model
    assert type(model) is cls


def test_the_cpp_of_a_model_is_compiled_ahead(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[Callable[[], object]] = []
    monkeypatch.setattr("qcompile.api.compile_ahead", work.extend)
    qcompile.optimize(tiny_llama(), "u4/g32/asym", specs={"down_proj": "nf4/g32/sym"}, progress=False)
    assert len(work) == 5 and not any(each() for each in work[:3]), "processor, two elements; then linears, attention"
    work.clear()
    qcompile.optimize(nn.Linear(64, 64), "u4/g32/asym", progress=False)
    assert len(work) == 3, "it does not generate"


def test_dequantize_has_the_models_own_names(tiny_llama: Make) -> None:
    model = tiny_llama()
    names = set(model.state_dict())
    state = qcompile.dequantize(qcompile.optimize(model, "u4/g32/asym", progress=False))
    assert set(state) == names
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    tiny_llama().load_state_dict(state)


def test_same_bytes_whatever_the_number_of_threads(tiny_llama: Make) -> None:
    states = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        states.append(qcompile.optimize(tiny_llama(), "u3/g32/asym", progress=False).state_dict())
    torch.set_num_threads(before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_hqq_config_means_what_it_means_there(tiny_llama: Make) -> None:
    from transformers import HqqConfig

    config = HqqConfig(nbits=4, group_size=32, axis=1)
    model = qcompile.optimize(tiny_llama(), config, progress=False)
    specs = {entry.module: entry.spec for entry in qcompile.explain(model).plan.entries}
    assert str(specs["model.layers.0.self_attn.q_proj"]) == "u4/g32/asym"
    assert specs["lm_head"] is None


def test_float32_model_equals_hqq_layer_by_layer(tiny_llama: Make) -> None:
    from hqq.core.quantize import Quantizer

    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    state = qcompile.dequantize(qcompile.optimize(model, "u4/g32/asym", progress=False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codes, meta = Quantizer.quantize(weight, nbits=4, group_size=32, axis=1, round_zero=True, device="cpu")
    torch.set_num_threads(threads)
    assert torch.equal(state["model.layers.1.mlp.up_proj.weight"], Quantizer.dequantize(codes, meta))


class Linear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def poisoned(value: float) -> nn.Module:
    model = Linear()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    return model


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (Linear, "u4/q64/asym", SpecError, "unknown granularity 'q64'"),
        (Linear, "u9/g64/asym", SpecError, "unknown element 'u9'"),
        (Linear, {"wheights": "u4/g64/asym"}, ConfigError, "did you mean 'weights'"),
        (lambda: poisoned(float("nan")), "u4/g64/asym", WeightError, "2.weight has 1 NaN and 0 infinite values"),
        (lambda: poisoned(float("inf")), "u4/g64/asym", WeightError, "2.weight has 0 NaN and 1 infinite values"),
        (lambda: Linear().to("meta"), "u4/g64/asym", WeightError, "0.weight is on the meta device"),
        (nn.Module, "u4/g64/asym", ConfigError, "Module has no parameters"),
        (lambda: nn.LayerNorm(64), "u4/g64/asym", ConfigError, "nothing to quantize"),
    ],
)
def test_bad_input_gives_a_clear_error_and_changes_nothing(
    model: Callable[[], nn.Module], config: object, error: type[Exception], message: str
) -> None:
    victim = model()
    before = {name: tensor.clone() for name, tensor in victim.state_dict().items()}
    with pytest.raises((error, ConfigError), match=message):
        qcompile.optimize(victim, config, progress=False)
    after = victim.state_dict()
    assert list(after) == list(before)
    assert all(after[n].is_meta or torch.equal(after[n].nan_to_num(7), before[n].nan_to_num(7)) for n in before)
    assert "forward" not in victim.__dict__


def test_already_optimized(tiny_llama: Make) -> None:
    model = qcompile.optimize(tiny_llama(), "u4/g32/asym", progress=False)
    with pytest.raises(ConfigError, match="optimized already"):
        qcompile.optimize(model, "u4/g32/asym")


def test_not_optimized() -> None:
    with pytest.raises(ConfigError, match="this Linear is not optimized"):
        qcompile.explain(Linear())


def test_strict_lists_all_that_would_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(85, 33), nn.Linear(33, 50))
    with pytest.raises(StrictError, match="2 parameters would stay dense") as raised:
        qcompile.optimize(model, "u4/g64/asym", strict=True)
    assert "0.weight: u4/g64/asym: " in str(raised.value) and "a weight of (50, 33)" in str(raised.value)
    assert isinstance(model[0].weight, nn.Parameter)


def test_non_contiguous_weight(interpreted: None) -> None:
    model = Linear()
    straight = copy.deepcopy(model)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    a, b = (qcompile.optimize(m, "u4/g64/asym", progress=False) for m in (model, straight))
    x = torch.randn(3, 64)
    assert torch.equal(a(x), b(x))


def test_float64_model(interpreted: None) -> None:
    model = Linear().double()
    reference = copy.deepcopy(model)
    qcompile.optimize(model, "u4/g64/asym", progress=False)
    reference.load_state_dict(qcompile.dequantize(model))
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-6, atol=1e-6)


def test_sizes_that_data_decide(interpreted: None) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = (x[:, 0] > 0).nonzero()[:, 0]
            return x.index_add(0, chosen, self.down(self.up(x[chosen])))

    model, x = Routed(), torch.randn(16, 64)
    exact = copy.deepcopy(model)
    qcompile.optimize(model, "u8/g32/asym", example={"x": x}, algorithm="rtn", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), exact(x), atol=0.02, rtol=0)
    assert not model.forward.eager  # type: ignore[attr-defined]


def test_shared_module_is_packed_once(interpreted: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Twice()
    reference = copy.deepcopy(model)
    qcompile.optimize(model, "u4/g64/asym", progress=False)
    assert model.a is model.b
    reference.load_state_dict(qcompile.dequantize(model), strict=False)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), reference(x))


def test_tied_head_on_request(tiny_llama: Make, interpreted: None) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    reference = copy.deepcopy(model)
    qcompile.optimize(model, "u8/g32/asym", include=["embed_tokens"], progress=False)
    assert model.lm_head.packed_weight is model.model.embed_tokens.packed_weight
    reference.load_state_dict(qcompile.dequantize(model))
    ids = torch.randint(0, 100, (2, 5))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)


def test_report(tiny_llama: Make, interpreted: None) -> None:
    reference = tiny_llama()
    model = qcompile.optimize(tiny_llama(), "u4/g32/asym", progress=False)
    ids = torch.randint(0, 100, (2, 5))
    report = qcompile.explain(model, reference=reference, inputs={"input_ids": ids})
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["plan"]["parameters"]) == len(list(reference.parameters()))
    assert all(row["spec"] or row["reason"] for row in data["plan"]["parameters"])
    assert 0 < data["numerics"]["kl"] < 0.1 and min(data["numerics"]["sqnr_db"].values()) > 15
    assert {op["op"] for op in data["programs"][0]["ops"]} >= {"linear", "attention", "gated_act", "rope"}
    text = str(report)
    sites = {op["module"] for op in data["programs"][0]["ops"]}
    assert sites <= {name for name, _ in reference.named_modules()}
    assert "q_proj+k_proj+v_proj" in text and "kept: lm_head" in text and "fuse_siblings" in text
    # There are none to choose on a CPU, which may have matrix instructions.
    told = matrix_instructions(QSpec.parse("u4/g32/asym").element)
    assert data["tuning"] == told and ("tiles" in text) == (told is not None)
    assert "tiles       measured" in str(replace(report, tuning="measured"))


def test_dumps_are_byte_stable_and_show_every_step(tiny_llama: Make, interpreted: None, tmp_path) -> None:
    texts = []
    for run in ("one", "two"):
        model = qcompile.optimize(tiny_llama(), "u4/g32/asym", dump=tmp_path / run, progress=False)
        model(torch.ones((2, 5), dtype=torch.long))
        texts.append({str(f.relative_to(tmp_path / run)): f.read_text() for f in (tmp_path / run).rglob("*.txt")})
    assert texts[0] == texts[1]
    names = [name.rpartition("/")[2] for name in sorted(texts[0])]
    assert names[0] == "000-captured.txt" and names[-1].endswith("-lower.txt")
    assert any("fuse_siblings" in name for name in names)
    assert "0x" not in "".join(texts[0].values())
    assert qcompile.dump(model).count("qcompile.linear") == 8
