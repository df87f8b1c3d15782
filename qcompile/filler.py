"""Put a checkpoint's tensors into a model that has no memory for them yet, one at a time, straight to their device."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import CheckpointError, FormatError, SpecError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats import CacheCodes, Dense, Entry, Ignored, Stored
from qcompile.formats.stored import Joined, Rounding
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import INPUT_ROUNDING, OUTPUT_ROUNDING, Parameter, put, put_rounding
from qcompile.stores import CACHE_SCALES, ActivationRounding, CacheScales


@dataclass(frozen=True)
class Place:
    """A parameter or buffer of the model, under all its names."""

    paths: tuple[str, ...]
    tensor: Tensor


class Filler:
    """Puts a checkpoint's tensors into a model, and keeps account of what was read and what was filled."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        stored: Sequence[Entry],
        device: torch.device,
        quantize_inputs: bool,
        keep_dtypes: bool = False,
    ):
        self.model = model
        self.keep_dtypes = keep_dtypes
        self.quantize_inputs = quantize_inputs
        self.roundings: dict[Any, ActivationRounding] = {}
        self.checkpoint = checkpoint
        self.device = device
        self.places = _places(model, checkpoint, stored)
        self.stored = [entry for entry in stored if not isinstance(entry, Ignored)]
        ignored = [entry.tensors for entry in stored if isinstance(entry, Ignored)]
        self.unread = set(checkpoint.tensors).difference(*ignored)
        self.unfilled = {place.paths[0] for place in self.places.values()}

    def fill(self, bar: Any) -> None:
        for weight in self.stored:
            bar.set_postfix_str(weight.path, refresh=False)
            if isinstance(weight, Stored):
                self.pack(weight)
            elif isinstance(weight, CacheCodes):
                self._cache(weight)
            else:
                self._set(weight)
            bar.update()
        for name in sorted(self.unread):
            if name in self.places:
                bar.set_postfix_str(name, refresh=False)
                self._set(Dense(name, name))
                bar.update()
        for buffers in (module._buffers for module in self.model.modules()):
            for name, buffer in buffers.items():
                if buffer is not None and not buffer.is_meta:
                    buffers[name] = buffer.to(self.device)

    def left(self) -> list[str]:
        """What is wrong: tensors that nothing read, parameters that nothing filled."""
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        # Models compute their frequencies; files of before 2023 hold a copy a layer.
        ignored = (*ignored, r"rotary_emb\.inv_freq$")
        unread = sorted(name for name in self.unread if not _matches(ignored, name))
        lines = []
        if unread:
            lines.append(f"nothing reads {len(unread)} of its tensors: {_some(unread)}")
        if self.unfilled:
            lines.append(f"nothing fills {len(self.unfilled)} parameters: {_some(sorted(self.unfilled))}")
        return lines

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device)

    def pack(self, weight: Stored) -> None:
        with naming(weight.path):
            self._pack(weight)

    def _pack(self, weight: Stored) -> None:
        place = self.places.get(weight.path)
        if place is None:
            raise CheckpointError(f"{weight.path} is quantized in the checkpoint; the model has no such parameter")
        owner = self.model.get_submodule(place.paths[0].rpartition(".")[0])
        transposed = _orientation(weight, place, owner)
        part = weight.read(self._read)
        shape = tuple(place.tensor.shape)
        put(self.model, [Parameter(place.paths, shape, place.tensor.dtype, transposed)], [part])
        if self.quantize_inputs:
            for name, rounding in ((INPUT_ROUNDING, weight.input), (OUTPUT_ROUNDING, weight.output)):
                if rounding is not None:
                    self._round(name, rounding, place)
        self.unread.difference_update(weight.tensors)
        self.unfilled.discard(place.paths[0])

    def _round(self, name: str, rounding: Rounding, place: Place) -> None:
        """Let the modules of a packed weight round what they read or return."""
        spec = ActivationSpec.parse(rounding.spec)
        scale = None if rounding.scale is None else self._number(rounding.scale)
        zero = None if rounding.zero is None else self._number(rounding.zero)
        if scale is not None and not (scale.is_floating_point() and 0 < scale < math.inf):
            raise CheckpointError(f"{rounding.scale} is {scale.item()} ({scale.dtype}), not a positive float")
        if zero is not None and not spec.is_asymmetric:
            if zero != 0:
                raise CheckpointError(f"{rounding.zero} is {zero.item()}; {spec} is symmetric")
            zero = None
        if zero is not None and zero.dtype == torch.int8:
            zero = (zero.to(torch.int16) + int(spec.element.middle)).to(torch.uint8)  # our codes start at 0
        for path in place.paths:
            owner, _, attribute = path.rpartition(".")
            module = self.model.get_submodule(owner)
            if attribute != "weight" or place.tensor.dim() != 2:
                raise CheckpointError(
                    f"{path} of {type(module).__name__} is to be multiplied by activations rounded as {spec}; "
                    "quantize_inputs=False loads it without"
                )
            put_rounding(module, name, self._shared(owner.rpartition(".")[0], spec, scale, zero))

    def _cache(self, entry: CacheCodes) -> None:
        """Let generate() know how the keys and values of a module are cached."""
        module = dict(self.model.named_modules()).get(entry.path)
        if not isinstance(getattr(module, "layer_idx", None), int):
            raise CheckpointError(f"{entry.tensors[0]} is of {entry.path}; the model has no such attention")
        config: Any = self.model.config
        heads = getattr(config.get_text_config(), "num_key_value_heads", None)
        scales = []
        for name in entry.tensors:
            scale = self._read(name).to(torch.float32).flatten()
            if len(scale) not in (1, heads) or not (scale.isfinite() & (scale > 0)).all():
                found = scale[:4].tolist()
                raise CheckpointError(f"{name} is {found}, not one positive float, nor one for each of {heads} heads")
            scales.append(scale if len(scale) == 1 else scale[:, None, None])
        assert module is not None
        module._modules[CACHE_SCALES] = CacheScales(entry.element, *scales)
        self.unread.difference_update(entry.tensors)

    def _shared(
        self, place: str, spec: ActivationSpec, scale: Tensor | None, zero: Tensor | None
    ) -> ActivationRounding:
        """Modules under one parent share a rounding of equal numbers: siblings are seen to round one value alike."""
        numbers = tuple(None if number is None else (number.item(), number.dtype) for number in (scale, zero))
        try:
            return self.roundings.setdefault((place, spec, numbers), ActivationRounding(spec, scale, zero))
        except FormatError as error:
            raise CheckpointError(f"activations of {place}: {error}") from error

    def _number(self, name: str) -> Tensor:
        if math.prod(self.checkpoint.need(name).shape) != 1:
            raise CheckpointError(f"{name} is {self.checkpoint.need(name).shape}; activations have one static scale")
        return self._read(name).reshape(())

    def _set(self, entry: Dense | Joined) -> None:
        names = (entry.tensor,) if isinstance(entry, Dense) else entry.tensors
        name, place = names[0], self.places.get(entry.path)
        if place is None:
            raise CheckpointError(f"{name} is {entry.path} in the checkpoint; the model has no such parameter")
        if place.paths[0] not in self.unfilled:
            self.unread.difference_update(names)  # another name of a tied one
            return
        infos = [self.checkpoint.need(each) for each in names]
        if sum(math.prod(info.shape) for info in infos) != place.tensor.numel():
            raise CheckpointError(f"{name} is {infos[0].shape}, the model needs {tuple(place.tensor.shape)}")
        if any(info.dtype.is_floating_point != place.tensor.dtype.is_floating_point for info in infos):
            raise CheckpointError(f"{name} is {infos[0].dtype}, the model needs {place.tensor.dtype}")
        made = entry.value(self._read(name)) if isinstance(entry, Dense) else entry.read(self._read)
        tensor = made if self.keep_dtypes else made.to(place.tensor.dtype)
        if tensor.shape != place.tensor.shape:
            raise CheckpointError(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(place.tensor.shape)}")
        value = nn.Parameter(tensor, requires_grad=False) if isinstance(place.tensor, nn.Parameter) else tensor
        for path in place.paths:
            owner, _, attribute = path.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, value)
        self.unread.difference_update(names)
        self.unfilled.discard(place.paths[0])


def _places(model: nn.Module, checkpoint: Checkpoint, stored: Sequence[Entry]) -> dict[str, Place]:
    """What is to be filled, by each of its names: parameters, persistent buffers, other buffers that `stored` names.

    A tie is undone where one end is packed and the other has a tensor of its own: quantized heads of tied models are
    stored beside the float embedding.
    """
    packed = {weight.path for weight in stored if isinstance(weight, Stored)}
    dense = {entry.path for entry in stored if isinstance(entry, Dense)} | set(checkpoint.tensors)
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), (tensor, []))[1].append(path)
    for path, buffer in model.named_buffers():
        if path in dense:
            names.setdefault(id(buffer), (buffer, [path]))
    found = {}
    for tensor, paths in names.values():
        ends = [[path for path in paths if path in packed], [path for path in paths if path not in packed]]
        for end in ends if ends[0] and not dense.isdisjoint(ends[1]) else [paths]:
            found.update(dict.fromkeys(end, Place(tuple(end), tensor)))
    return found


def _orientation(weight: Stored, place: Place, owner: nn.Module) -> bool:
    """Whether the model holds this weight as (…, in_features, out_features)."""
    shape = tuple(place.tensor.shape)
    if shape == weight.shape:
        # A square weight does not show it. Experts of transformers say it.
        turned = type(owner).__name__ == "Conv1D" or getattr(owner, "is_transposed", False) is True
        return turned and shape[-1] == shape[-2]
    if shape == (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]):
        return True
    raise CheckpointError(
        f"{weight.path} is {weight.shape} as {weight.spec}; the model needs {shape}. "
        "Does config.json belong to these files?"
    )


def _matches(patterns: Collection[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Specs and tensors that do not fit one another as errors of this checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except (FormatError, SpecError) as error:
        raise CheckpointError(f"{what}: {error}") from error
