"""Write a model as a checkpoint, in its own format or in another library's, exactly or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qcompile import algorithms, storage, writers
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.files.write import replacing
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.storage import (
    INPUT_ROUNDING,
    OUTPUT_ROUNDING,
    Parameter,
    packed_in,
    packed_parameters,
    packed_tensor,
    roundings,
)
from qcompile.stores import CACHE_SCALES, CacheScales, ScaledActivation
from qcompile.writers import ActivationRounding, CacheCodes, Contents, Weight, Writer

LARGEST_SHARD = 2 << 30


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = "qcompile",
    requantize: bool = False,
    tokenizer: Any = None,
    largest_shard: int = LARGEST_SHARD,
    progress: bool = True,
) -> dict[str, float]:
    """Write a Transformers model with packed weights into a folder.

    format         "qcompile", which holds every spec, "compressed-tensors", "gptq", "awq", "hqq", "gguf", or "float",
                   which is float32
    requantize     whether weights that the format cannot hold exactly are quantized again, to the nearest spec that it
                   can, and lose what it cannot say of their activations; otherwise they are an UnsupportedError that
                   lists them, and nothing is written
    tokenizer      written beside the model or, for gguf, in its file, which else takes that of the folder that the
                   model was loaded from
    largest_shard  bytes of a file

    Returns the relative error of each weight that was quantized again, by parameter. The folder is replaced in one
    step: whenever the process dies, it is the old or the new checkpoint, whole. Raises ConfigError for an unknown
    format, or a model without a configuration, and UnsupportedError for a model that the format does not know.
    """
    writer = writers.find(format)
    contents = _contents(model)
    writer.check(contents)
    if contents.caches and not writer.cache_scales:
        why = f"{writer.name} cannot say how keys and values are cached, and leaves out the scales of the checkpoint"
        warnings.warn(f"qcompile: {why}", stacklevel=2)
    _check_modules(model, writer)
    if writer.in_a_file:
        contents = replace(contents, tokenizer=tokenizer or _tokenizer(model.config))
    refused = {weight.path: reason for weight in contents.weights if (reason := writer.refuses(weight))}
    if refused and not requantize:
        raise UnsupportedError(_refusal(writer, contents.weights, refused))
    errors: dict[str, float] = {}
    if refused:
        weights, dense, linears = [], dict(contents.dense), list(contents.dense_linears)
        for weight in tqdm(contents.weights, desc="requantize", disable=not progress, leave=False):
            made = weight
            if weight.path in refused:
                made, errors[weight.path] = _requantized(weight, writer)
            if isinstance(made, Weight):
                weights.append(made)
            else:
                dense[weight.path] = made
                linears += [weight.module] if weight.kind in ("linear", "head") else []
        contents = replace(contents, weights=weights, dense=dense, dense_linears=linears)
    with replacing(Path(folder)) as fresh:
        writer.write(contents, fresh, largest_shard)
        if writer.in_a_file:
            return errors
        if generation := getattr(model, "generation_config", None):
            generation.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return errors


def _check_modules(model: nn.Module, writer: Writer) -> None:
    """Raises UnsupportedError for what load() put into the model, and no other reader of the format would."""
    for path, module in model.named_modules():
        if isinstance(module, ScaledActivation) and not writer.scaled_activations:
            raise UnsupportedError(f"{path} divides by scales, as AWQ leaves it, which {writer.name} cannot say")
        own, usual = getattr(module, "inv_freq", None), getattr(module, "original_inv_freq", None)
        if own is None or usual is None or getattr(module, "rope_type", None) != "default":
            continue
        if not torch.allclose(own.float(), usual.to(own.device).float(), rtol=1e-2):
            raise UnsupportedError(
                f"{path} has frequencies that its configuration does not give, and none can be saved"
            )


def _contents(model: nn.Module) -> Contents:
    if (config := getattr(model, "config", None)) is None:
        raise ConfigError(
            f"{type(model).__name__} has no config, which a checkpoint needs; save its state_dict instead"
        )
    weights, taken = [], set()
    for packed in packed_in(model):
        path, *_ = packed.parameter.paths
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        own = roundings(module)
        sides = (_rounding(own.get(key)) for key in (INPUT_ROUNDING, OUTPUT_ROUNDING))
        tensor, parameter = packed_tensor(module, name), packed.parameter
        kind = _kind(model, parameter)
        weights.append(Weight(path, tensor, parameter.dtype, parameter.transposed, *sides, kind=kind))
    for prefix, module in model.named_modules(remove_duplicate=False):
        slots = [name for name, slot in packed_parameters(module).items() if not slot.bias]
        taken.update(f"{prefix}.{name}." if prefix else f"{name}." for name in slots)
        taken.update(f"{prefix}.{name}." for name in roundings(module))
        taken.update([f"{prefix}.{CACHE_SCALES}."] if CACHE_SCALES in module._modules else [])
    dense: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(tuple(taken)):
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            dense[name] = tensor.detach()
            seen.add(place)
    said = config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # how and from where it was loaded
        said.pop(key, None)
    said["architectures"] = said.get("architectures") or [type(model).__name__]
    dtype = weights[0].dtype if weights else next(iter(model.parameters())).dtype
    said["dtype"] = str(dtype).removeprefix("torch.")
    packed_modules = {weight.module for weight in weights}
    linears = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and path not in packed_modules
    ]
    if said.get("tie_word_embeddings") and _heads(model) and _untied(model):
        said["tie_word_embeddings"] = False
    scales = ((path.rpartition(".")[0], module) for path, module in model.named_modules())
    caches = [
        CacheCodes(owner, module.element, module.key, module.value)
        for owner, module in scales
        if isinstance(module, CacheScales)
    ]
    return Contents(said, weights, dense, linears, caches)


def _rounding(given: storage.ActivationRounding | None) -> ActivationRounding | None:
    return None if given is None else ActivationRounding(given.spec, given.scale, given.zero)


def _kind(model: nn.Module, parameter: Parameter) -> str:
    """What a packed weight belongs to, in the words of Weight."""
    owners = [path.rpartition(".") for path in parameter.paths]
    modules = [model.get_submodule(owner) for owner, _, name in owners if name == "weight"]
    if any(isinstance(module, nn.Embedding) for module in modules):
        return "embedding"
    if any(owner in _heads(model) for owner, _, _ in owners):
        return "head"
    return "linear" if modules and (parameter.transposed or isinstance(modules[0], nn.Linear)) else "other"


def _heads(model: nn.Module) -> set[str]:
    """The names of the linear behind the last layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {path for path, module in model.named_modules() if module is head and head is not None}


def _untied(model: nn.Module) -> bool:
    """Whether a head is packed beside a float embedding, which the configuration says are one."""
    ends = [getattr(model, f"get_{side}_embeddings")() for side in ("input", "output")]
    return bool(packed_parameters(ends[1])) != bool(packed_parameters(ends[0]))


def _tokenizer(config: Any) -> Any:
    """The tokenizer where the model was loaded from: a .gguf file, or a folder or a downloaded model that has one."""
    name = getattr(config, "_name_or_path", None) or ""
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    if not name or (Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file()):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):
        return None


def _requantized(weight: Weight, writer: Writer) -> tuple[Weight | Tensor, float]:
    """The weight in the nearest spec that the format holds, or dense where it holds none, without its roundings if they
    are refused; and its relative error in the Euclidean norm."""
    bare = replace(weight, input=None, output=None)
    if writer.refuses(bare) is None:
        return bare, 0.0
    numbers = weight.tensor.dequantize()
    if not isinstance(weight.tensor, QTensor):  # nearest() asks for a spec
        weight = replace(weight, tensor=algorithms.quantize(numbers, QSpec.parse("u4/row/asym_int")))
    spec = writer.nearest(weight)

    def error(made: Tensor) -> float:
        return float((made - numbers).norm() / numbers.norm().clamp_min(torch.finfo(torch.float32).tiny))

    if spec is None:
        dense = numbers.to(weight.dtype)
        return dense.transpose(-1, -2) if weight.transposed else dense, error(dense.float())
    tensor = algorithms.quantize(numbers.to(writer.scales or weight.dtype), spec, "rtn")
    made = replace(weight, tensor=tensor)
    return made if writer.refuses(made) is None else replace(bare, tensor=tensor), error(tensor.dequantize())


def _refusal(writer: Writer, weights: Sequence[Weight], refused: dict[str, str]) -> str:
    lines = []
    for weight in weights:
        if weight.path in refused and len(lines) < 8:
            made, error = _requantized(weight, writer)
            spec = str(made.spec) if isinstance(made, Weight) else f"dense {made.dtype}".replace("torch.", "")
            plain = isinstance(made, Weight) and (weight.input, weight.output) != (made.input, made.output)
            cost = f"as {spec}{' without rounded activations' if plain else ''} it would be off by {error:.2%}"
            lines.append(f"  {weight.path} {weight.spec}: {refused[weight.path]}; {cost}")
    more = f"\n  and {len(refused) - len(lines)} more" if len(refused) > len(lines) else ""
    head = (
        f"{len(refused)} of {len(weights)} weights have no exact form in {writer.name}; requantize=True writes others"
    )
    return head + ":\n" + "\n".join(lines) + more


__all__ = ["save"]
