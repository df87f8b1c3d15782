"""`from_pretrained` of Transformers: checkpoints of save() and of HQQ, and float ones with a Config to quantize by.

Importing this module registers the method "qcompile" in transformers' registry, where from_pretrained looks it up by
the `quant_method` of a config.json or of the argument. All ways end in a model that optimize() has made ready: packed
weights, programs compiled at the first calls, save_pretrained() and push_to_hub() through save().

Of HQQ's checkpoints transformers finds no weight (5.17 to 5.23: it makes them anew at random, with a warning), so they
are read here as well; a float checkpoint with an HqqConfig stays with transformers' own class.

The registry lies in transformers.quantizers.auto, which nothing but an import reaches: `import qcompile` took 4.5 s
with it and 2.8 s without (processor time, two cores). Any model class of transformers has imported the same modules:
beside one, `import qcompile` takes 0.5 s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcompile import formats
from qcompile.api import optimize
from qcompile.config import Config
from qcompile.errors import CheckpointError, UnsupportedError
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.filler import Filler
from qcompile.formats import Stored

METHOD = "qcompile"


@register_quantization_config(METHOD)
class QCompileConfig(QuantizationConfigMixin):
    """What a config.json says under "quantization_config": the fields of a Config, or how save() wrote the weights."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)
        self.quant_method: Any = METHOD


@register_quantizer(METHOD)
class QCompileQuantizer(HfQuantizer):
    """Lets transformers load the dense tensors. Packed weights are read here; those of a float checkpoint are quantized
    when all is loaded."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.config: Config | None = None
        self.packing: Packing | None = None
        if not self.pre_quantized:
            said = quantization_config
            self.config = Config.of(said if isinstance(said, Config) else _fields(said))

    def update_device_map(self, device_map: Any) -> Any:
        places = device_map.values() if isinstance(device_map, dict) else ()
        if len(set(places)) > 1 or "disk" in places:
            raise UnsupportedError(f"device_map={device_map}: packed weights lie on one device; name one for all")
        return device_map

    def update_weight_conversions(self, weight_conversions: Any, *context: Any) -> Any:
        # save() writes the model's own names.
        return [] if self.pre_quantized else weight_conversions

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if self.pre_quantized:
            with torch.device("cpu"):  # not where the model is made
                self.packing = Packing(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.packing is not None:
            self.packing.finish()
            self.packing = None
        else:
            assert self.config is not None
            model.config.quantization_config = QCompileConfig(**self.config.to_dict())
        return optimize(model, self.config, progress=False)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained beside the packed weights."""
        return True


class HqqCheckpointQuantizer(QCompileQuantizer):
    """HQQ's checkpoints. What is not one gets transformers' own class."""

    def __new__(cls, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> Any:
        if pre_quantized:
            return super().__new__(cls)
        return HqqHfQuantizer(quantization_config, pre_quantized=False, **kwargs)


AUTO_QUANTIZER_MAPPING["hqq"] = HqqCheckpointQuantizer


def _fields(said: QuantizationConfigMixin) -> dict[str, Any]:
    return {key: value for key, value in said.to_dict().items() if key != "quant_method"}


class Packing:
    """The packed weights of a checkpoint on their way into a model, around transformers' own loading.

    Until finish() their parameters stay on the meta device and out of state_dict, so that transformers neither misses
    them nor makes them anew.
    """

    def __init__(self, model: Any, files: Any):
        if not files:
            raise CheckpointError("a qcompile checkpoint is loaded from its files, not from a state_dict")
        self.model = model
        checkpoint = open_checkpoint(Path(files[0]).parent)
        self.stored = list(_weights(model, checkpoint))
        tied = model.all_tied_weights_keys.items()
        packed = {weight.path for weight in self.stored}
        for end, start in tied:  # here tie_weights() does nothing
            if not packed.isdisjoint((end, start)):
                owner, _, name = end.rpartition(".")
                setattr(model.get_submodule(owner), name, model.get_parameter(start))
        self.filler = Filler(model, checkpoint, self.stored, torch.device("cpu"), quantize_inputs=True)
        hidden = {path for weight in self.stored for path in self.filler.places[weight.path].paths}
        for path in hidden:
            model.get_parameter(path)._is_hf_initialized = True
        model.all_tied_weights_keys = {end: start for end, start in tied if hidden.isdisjoint((end, start))}
        read = "|".join(re.escape(name) for weight in self.stored for name in weight.tensors)
        known = type(model)._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, f"^(?:{read})$"}

        def without(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for path in hidden:
                state.pop(prefix + path, None)

        self.hook = model.register_state_dict_post_hook(without)

    def finish(self) -> None:
        self.hook.remove()
        del self.model._keys_to_ignore_on_load_unexpected  # the class has its own
        self.filler.device = next(tensor.device for tensor in self.model.parameters() if not tensor.is_meta)
        with torch.no_grad():
            for weight in self.stored:
                self.filler.pack(weight)


def _weights(model: Any, checkpoint: Checkpoint) -> Iterator[Stored]:
    """The checkpoint's packed weights that the model has. One without its head has other names, and no head."""
    if (method := formats.find(checkpoint)) is None:
        raise CheckpointError(f"{checkpoint.folder}: its config.json says nothing of how the weights are packed")
    names, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    for weight in method.weights(checkpoint):
        if isinstance(weight, Stored):
            for path in (weight.path, weight.path.removeprefix(prefix), prefix + weight.path):
                if path in names:
                    yield replace(weight, path=path)
                    break
