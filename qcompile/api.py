"""What a user calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qcompile import _torch
from qcompile.algorithms import quantize
from qcompile.caches import cache_codes
from qcompile.config import Config
from qcompile.errors import ConfigError, WeightError
from qcompile.explain import Report
from qcompile.generate import Generate
from qcompile.kernels import _packed_cpu, attention_cpu, linear_cpu
from qcompile.kernels._cpp import compile_ahead
from qcompile.kernels._pages import use_large_pages
from qcompile.load import load
from qcompile.plan import Entry, Plan, example_inputs, make_plan
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.runtime import Runner, runner_of
from qcompile.save import save
from qcompile.save_pretrained import attach
from qcompile.storage import Parameter, packed_parameters, packed_tensor, put
from qcompile.stores import ActivationRounding, CacheScales
from qcompile.tune import linears_of
from qcompile.tuned import account


def plan(model: nn.Module, config: Any = None, example: Mapping[str, Any] | None = None, **options: Any) -> Plan:
    """What optimize() would do: each parameter's spec or the reason why it stays dense, siblings, bytes.

    Computes nothing; the model may be on the meta device. Arguments are those of optimize().
    """
    return make_plan(model, Config.of(config, **options), example)


def optimize(
    model: nn.Module,
    config: Any = None,
    example: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """Quantize a model in place and compile its calls; returns the same object, with the same class and API.

    config      a spec such as "u4/g64/asym", a Config, a dict of its fields, or a transformers HqqConfig;
                None quantizes nothing and only fuses and compiles
    example     keyword arguments of a forward call, needed to find sibling layers in models that are not Transformers
    progress    whether to show a progress bar
    options     fields of Config, on top of `config`

    Weights are quantized one after the other, and each float weight is freed before the next. Programs are compiled at
    the first call of each kind. Parameters lose requires_grad and the model is set to eval().

    Raises ConfigError, WeightError (NaN or inf, or no data, by name) or StrictError before anything is changed.
    """
    config = Config.of(config, **options)
    if runner_of(model) is not None:
        raise ConfigError("the model is optimized already; optimize a freshly loaded one")
    on_cpu = all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
    if on_cpu:
        compile_ahead([_torch.know_processor])
    plan = make_plan(model, config, example)
    _check(model, plan, config)
    if on_cpu:
        compile_ahead(_needed_cpp(model, plan))
    packed = plan.groups
    bar = tqdm(total=sum(len(group) for group in packed), desc="quantize", disable=not progress, leave=False)
    with bar, torch.no_grad():
        for group in packed:
            _pack(model, group, config, bar)
    model.requires_grad_(False)
    model.eval()
    use_large_pages([*model.parameters(), *model.buffers()])
    # Past nn.Module.__setattr__, which is for parameters and submodules.
    model.__dict__["forward"] = Runner(model, config, plan, example)
    if hasattr(type(model), "generate"):
        model.__dict__["generate"] = Generate(model)
    attach(model)
    return model


def explain(model: nn.Module, reference: nn.Module | None = None, inputs: Mapping[str, Any] | None = None) -> Report:
    """The report on an optimized model.

    With the float `reference` it also says how far the numbers moved: SQNR per parameter, and the KL divergence of the
    logits on `inputs` (keyword arguments of both forwards) if given. Raises ConfigError for a model that is not ours.
    """
    runner = _runner(model)
    numerics = None if reference is None else _numerics(model, reference, inputs)
    device = next(iter([*model.parameters(), *model.buffers()])).device
    outcomes, config = runner.outcomes(), runner.config.to_dict()
    cached = cache_codes(model, runner.config.kv_cache) if hasattr(type(model), "generate") else None
    return Report(
        type(model).__name__, config, str(device), runner.plan, outcomes, runner.eager, numerics, runner.recalled,
        None if cached is None else str(cached), account(device, linears_of(runner.plan)),
        runner.unkept,
    )  # fmt: skip


def dump(model: nn.Module) -> str:
    """The graphs of an optimized model as text, as they were before kernels were chosen."""
    return "\n".join(f"== {outcome.inputs}\n{outcome.text}" for outcome in _runner(model).outcomes())


def dequantize(model: nn.Module | str) -> dict[str, Tensor]:
    """The float32 state dict under the model's own parameter names; integer buffers keep their dtype.

    `model` is a model with packed weights, or the checkpoint of one as load() takes it.
    """
    if isinstance(model, str):
        model = load(model, dtype=torch.float32, quantize_inputs=False)
    packed, apart = {}, set()
    for prefix, module in model.named_modules(remove_duplicate=False):  # siblings may share a rounding
        if isinstance(module, ActivationRounding | CacheScales):
            apart.update(f"{prefix}.{name}" for name in module.state_dict())
        for name, slot in packed_parameters(module).items():
            path = f"{prefix}.{name}" if prefix else name
            if slot.bias:
                packed[path] = getattr(module, name).float()
            else:
                weight = packed_tensor(module, name).dequantize()
                packed[path] = weight.transpose(-1, -2).contiguous() if slot.transposed else weight
    state = {}
    for key, tensor in model.state_dict().items():
        owner = next((path for path in packed if key == path or key.startswith(f"{path}.")), None)
        if key in apart:
            continue
        if owner is None:
            state[key] = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        else:
            state[owner] = packed[owner]
    return state


def _runner(model: nn.Module) -> Runner:
    if (runner := runner_of(model)) is None:
        raise ConfigError(f"this {type(model).__name__} is not optimized; call qcompile.optimize(model, …) first")
    return runner


def _check(model: nn.Module, plan: Plan, config: Config) -> None:
    """Everything that can go wrong, before anything is changed."""
    if not plan.entries:
        raise ConfigError(f"{type(model).__name__} has no parameters")
    asked = config.weights is not None or any(config.specs.values())
    if asked and not plan.groups and not config.strict:
        reasons = "\n".join(f"  {entry.path} {entry.shape}: {entry.reason}" for entry in plan.entries[:20])
        raise ConfigError(f"{type(model).__name__}: nothing to quantize; every parameter stays dense:\n{reasons}")
    if config.strict:
        plan.insist()
    for entry in plan.entries:
        if entry.spec is None or entry.packed:
            continue
        weight = model.get_parameter(entry.path)
        if weight.is_meta:
            raise WeightError(f"{entry.path} is on the meta device; load its weights first, or use qcompile.plan()")
        if not (finite := torch.isfinite(weight)).all():
            bad = weight[~finite]
            raise WeightError(f"{entry.path} has {bad.isnan().sum()} NaN and {bad.isinf().sum()} infinite values")


def _needed_cpp(model: nn.Module, plan: Plan) -> list[Callable[[], object]]:
    """What loads the C++ that calls on a CPU need, the first ones first. It is compiled once for a machine."""
    elements = {entry.spec.element for entry in plan.entries if isinstance(entry.spec, QSpec)}
    linears = [*(functools.partial(_packed_cpu.missing, each) for each in elements), linear_cpu.without_python]
    attention = [attention_cpu.missing] if hasattr(type(model), "generate") else []
    return [*(linears if elements else ()), *attention]


def _pack(model: nn.Module, group: tuple[Entry, ...], config: Config, bar: Any) -> None:
    """Quantize one weight, or siblings into one store, and put them into their modules. Weights that are packed already
    are stored side by side as they are."""
    if len(group) == 1 and group[0].packed:
        bar.update()
        return
    parts: list[QTensor] = []
    biases: list[Tensor] = []
    for entry in group:
        bar.set_postfix_str(entry.path, refresh=False)
        if entry.packed:
            parts.append(packed_tensor(model.get_submodule(entry.module), entry.path.rpartition(".")[2]))
        else:
            weight = model.get_parameter(entry.path).detach()
            assert isinstance(entry.spec, QSpec)
            parts.append(quantize(weight.t() if entry.transposed else weight, entry.spec, config.algorithm))
        bias = getattr(model.get_submodule(entry.module), "bias", None)
        if len(group) > 1 and bias is not None:
            biases.append(bias.detach())
        bar.update()
    parameters = [
        Parameter((entry.path, *entry.aliases), entry.shape, entry.dtype, entry.transposed) for entry in group
    ]
    put(model, parameters, parts, biases)


def _numerics(model: nn.Module, reference: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    ours, sqnr = dequantize(model), {}
    theirs = reference.state_dict()
    runner = _runner(model)
    for entry in runner.plan.entries:
        if entry.spec is not None and entry.path in theirs:
            signal = theirs[entry.path].float()
            noise = (ours[entry.path].to(signal.device) - signal).square().sum()
            sqnr[entry.path] = float(10 * torch.log10(signal.square().sum() / noise))
    if inputs is None:
        return {"sqnr_db": sqnr, "kl": None}
    with torch.no_grad():
        p, q = (m(**inputs).logits.float().log_softmax(-1) for m in (reference, model))
    return {"sqnr_db": sqnr, "kl": float((p.exp() * (p - q)).sum(-1).mean())}


__all__ = ["dequantize", "dump", "example_inputs", "explain", "load", "optimize", "plan", "save"]
