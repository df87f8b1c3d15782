"""qcompile's own format, which holds every spec: packed codes, scales and zero points as they lie in memory.

    model.safetensors   <parameter>.data, .scale, .zero, .order; of quantized scales .scale.data, .scale.scale, …;
                        <module>.input_rounding.scale, .zero; <attention module>.k_scale, .v_scale of its cache;
                        other tensors under their own names
    config.json         quantization_config: {"quant_method": "qcompile", "version": 1,
                        "weights": {parameter: {"spec", "shape"}}, "inputs": {module: activation spec}, "outputs": {…},
                        "kv_cache": element}

How the bytes lie: qcompile/quant/packing.py.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.writers.contents import (
    ActivationRounding,
    Contents,
    Tensors,
    Weight,
    Writer,
    cache_tensors,
    same,
    write_folder,
)

VERSION = 1


class Native(Writer):
    name = "qcompile"
    scaled_activations = True
    cache_scales = True

    def check(self, contents: Contents) -> None:
        return

    def refuses(self, weight: Weight) -> str | None:
        return None

    def nearest(self, weight: Weight) -> QSpec:
        return weight.spec

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        tensors: Tensors = {}
        roundings: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}}
        for weight in contents.weights:
            for name, piece in pieces(weight.tensor).items():
                tensors[f"{weight.path}.{name}"] = same(piece)
            for side, rounding in (("input", weight.input), ("output", weight.output)):
                if rounding is not None:
                    roundings[f"{side}s"][weight.module] = rounding.spec
                    tensors |= _static(f"{weight.module}.{side}_rounding", rounding)
        said = {
            "quant_method": "qcompile",
            "version": VERSION,
            "weights": {
                weight.path: {"spec": str(weight.spec), "shape": list(weight.tensor.shape)}
                for weight in contents.weights
            },
            **{key: value for key, value in roundings.items() if value},
            **({"kv_cache": contents.caches[0].element} if contents.caches else {}),
        }
        write_folder(contents, folder, tensors | cache_tensors(contents), said, largest_shard)


def pieces(tensor: QTensor) -> dict[str, Tensor]:
    """The stored tensors by dotted name."""
    found: dict[str, Tensor] = {}
    for name, part in tensor.parts().items():
        if isinstance(part, QTensor):
            found.update({f"{name}.{key}": piece for key, piece in pieces(part).items()})
        else:
            found[name] = part
    return found


def _static(prefix: str, rounding: ActivationRounding) -> Tensors:
    numbers = {"scale": rounding.scale, "zero": rounding.zero}
    return {f"{prefix}.{key}": same(number) for key, number in numbers.items() if number is not None}
