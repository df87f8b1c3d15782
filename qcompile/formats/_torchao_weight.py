"""A weight of torchao's: a tensor subclass flattened into plain tensors, which the file's header describes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Read, Rounding, Stored
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor


@dataclass(frozen=True)
class Weight:
    """One flattened subclass: its parameter, its class and attributes, and where its tensors are."""

    checkpoint: Checkpoint
    path: str
    kind: str
    data: dict[str, Any]

    def attribute(self, key: str) -> Any:
        """A dtype or an enumeration by its name."""
        return named(self.data.get(key))

    def name(self, part: str) -> str:
        module, _, parameter = self.path.rpartition(".")
        return f"{module}._{parameter}_{part}"

    def has(self, part: str) -> bool:
        return self.name(part) in self.checkpoint.tensors

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in self.checkpoint.tensors if name.startswith(self.name("")))

    def counts(self, key: str) -> tuple[int, ...]:
        value = self.data.get(key)
        if not isinstance(value, list) or not value or not all(type(n) is int and n > 0 for n in value):
            raise CheckpointError(f"{self.path}: {key} is {str(value)[:80]}, not a list of counts")
        return tuple(value)

    def stored(
        self, spec: QSpec, shape: tuple[int, ...], read: Callable[[Read], QTensor], rounding: Rounding | None
    ) -> Stored:
        if self.has("act_pre_scale"):
            raise CheckpointError(
                f"{self.name('act_pre_scale')} multiplies the input of the layer, which is not done here; "
                "fold it into the layer before, or quantize the float original with qcompile.optimize"
            )
        return Stored(self.path, spec, shape, self.tensors, read, rounding)


def weights_in(checkpoint: Checkpoint) -> Iterator[Weight]:
    """Those that the header describes."""
    for path, text in checkpoint.metadata.items():
        if not isinstance(text, str) or "." not in path or '"_type"' not in text:
            continue
        try:
            entry = json.loads(text)
            kind, data, parts = entry["_type"], entry.get("_data", {}), entry.get("_tensor_data_names", [])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the header's {path} is no torchao description: {error!r}") from error
        if kind == "Tensor":
            continue
        if not isinstance(kind, str) or not isinstance(data, dict) or not isinstance(parts, list):
            raise CheckpointError(f"the header's {path} is no torchao description: {text[:80]}")
        weight = Weight(checkpoint, path, kind, data)
        for part in parts:
            checkpoint.need(weight.name(str(part)))
        yield weight


def named(value: Any) -> Any:
    """A dtype or an enumeration by its name."""
    return value.get("_data") if isinstance(value, dict) else value
