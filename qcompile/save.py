"""Write a model as a checkpoint, in its own format or in another library's, exactly or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qcompile import algorithms, writers
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.files.write import replacing
from qcompile.storage import INPUT_ROUNDING, OUTPUT_ROUNDING, packed_in, packed_parameters, packed_tensor, roundings
from qcompile.writers import ActivationRounding, Contents, Weight, Writer

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

    format         "qcompile", which holds every spec, or one of writers.WRITERS
    requantize     whether weights that the format cannot hold exactly are quantized again, to the nearest spec that it
                   can; otherwise they are an UnsupportedError that lists them, and nothing is written
    tokenizer      written beside the model, if given
    largest_shard  bytes of a file

    Returns the relative error of each weight that was quantized again, by parameter. The folder is replaced in one
    step: whenever the process dies, it is the old or the new checkpoint, whole. Raises ConfigError for an unknown
    format, or a model without a configuration.
    """
    writer = writers.find(format)
    contents = _contents(model)
    refused = {weight.path: reason for weight in contents.weights if (reason := writer.refuses(weight))}
    if refused and not requantize:
        raise UnsupportedError(_refusal(writer, contents.weights, refused))
    errors: dict[str, float] = {}
    if refused:
        weights = []
        for weight in tqdm(contents.weights, desc="requantize", disable=not progress, leave=False):
            if weight.path in refused:
                weight, errors[weight.path] = _requantized(weight, writer)
            weights.append(weight)
        contents = replace(contents, weights=weights)
    with replacing(Path(folder)) as fresh:
        writer.write(contents, fresh, largest_shard)
        if generation := getattr(model, "generation_config", None):
            generation.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return errors


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
        sides = [
            ActivationRounding(own[key].spec, own[key].scale, own[key].zero) if key in own else None
            for key in (INPUT_ROUNDING, OUTPUT_ROUNDING)
        ]
        tensor = packed_tensor(module, name)
        weights.append(Weight(path, tensor, packed.parameter.dtype, packed.parameter.transposed, *sides))
    for prefix, module in model.named_modules(remove_duplicate=False):
        slots = [name for name, slot in packed_parameters(module).items() if not slot.bias]
        taken.update(f"{prefix}.{name}." if prefix else f"{name}." for name in slots)
        taken.update(f"{prefix}.{name}." for name in roundings(module))
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
    said["dtype"] = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    return Contents(said, weights, dense)


def _requantized(weight: Weight, writer: Writer) -> tuple[Weight, float]:
    """The weight in the nearest spec that the format holds, and its relative error in the Euclidean norm."""
    numbers = weight.tensor.dequantize()
    spec = writer.nearest(weight)
    tensor = algorithms.quantize(numbers.to(weight.dtype), spec, "rtn")
    error = float((tensor.dequantize() - numbers).norm() / numbers.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return replace(weight, tensor=tensor), error


def _refusal(writer: Writer, weights: Sequence[Weight], refused: dict[str, str]) -> str:
    lines = []
    for weight in weights:
        if weight.path in refused and len(lines) < 8:
            _, error = _requantized(weight, writer)
            cost = f"as {writer.nearest(weight)} it would be off by {error:.2%}"
            lines.append(f"  {weight.path} {weight.spec}: {refused[weight.path]}; {cost}")
    more = f"\n  and {len(refused) - len(lines)} more" if len(refused) > len(lines) else ""
    head = (
        f"{len(refused)} of {len(weights)} weights have no exact form in {writer.name}; requantize=True writes others"
    )
    return head + ":\n" + "\n".join(lines) + more


__all__ = ["save"]
