"""`model.save_pretrained` of a model with packed weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.errors import ConfigError
from qcompile.save import LARGEST_SHARD, save
from qcompile.storage import packed_in


class SavePretrained:
    """Replaces `model.save_pretrained` on the instance: a model with packed weights is written by save(), whose files
    push_to_hub, which calls this, uploads. Adapters, and models without packed weights, are transformers' business."""

    def __init__(self, model: Any):
        self.model = model
        self.__signature__ = inspect.signature(type(model).save_pretrained.__get__(model))

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        from transformers.utils.hub import convert_file_size_to_int

        model = self.model
        if not packed_in(model) or getattr(model, "_hf_peft_config_loaded", False):
            return type(model).save_pretrained(model, save_directory, *args, **kwargs)
        given = self.__signature__.bind(save_directory, *args, **kwargs).arguments
        for name in ("state_dict", "variant", "distributed_checkpoint"):
            if given.get(name):
                raise ConfigError(f"save_pretrained of packed weights takes no {name}")
        if not given.get("is_main_process", True):
            return None
        largest = convert_file_size_to_int(given.get("max_shard_size", LARGEST_SHARD))
        save(model, save_directory, largest_shard=largest)
        if not given.get("push_to_hub"):
            return None
        rest = {"repo_id": Path(save_directory).name, "token": given.get("token"), **given.get("kwargs", {})}
        return model.push_to_hub(**rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(memo[id(self.model)])

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self.model,)


def attach(model: nn.Module) -> None:
    """Let a Transformers model's save_pretrained write packed weights as save() does."""
    if hasattr(type(model), "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model)
