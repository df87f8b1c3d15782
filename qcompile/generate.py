"""`model.generate` of an optimized model: transformers' own loop over a static cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qcompile.caches import static_cache
from qcompile.errors import ConfigError
from qcompile.runtime import runner_of

# Cache lengths are rounded up to this many tokens.
LENGTH_STEP = 64
# Arguments with which transformers runs another loop or another cache than the one meant here.
_ELSEWHERE = ("past_key_values", "assistant_model", "prompt_lookup_num_tokens", "custom_generate", "inputs_embeds")


class Generate:
    """Replaces `model.generate` on the instance and adds a static cache where the caller names no other cache."""

    def __init__(self, model: Any):
        self.model = model
        self.__signature__ = inspect.signature(type(model).generate.__get__(model))

    def __call__(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        original = type(self.model).generate.__get__(self.model)
        cache = self._cache(inputs, kwargs)
        if cache is not None:
            kwargs["past_key_values"] = cache
            kwargs.pop("cache_implementation", None)
        # Our forward is compiled already; transformers would wrap it in torch.compile again.
        kwargs.setdefault("disable_compile", True)
        return original(inputs, *args, **kwargs)

    def _cache(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        runner = runner_of(self.model)
        tokens = kwargs.get("input_ids", inputs)
        config = kwargs.get("generation_config") or self.model.generation_config

        def setting(name: str, default: Any = None) -> Any:
            given = kwargs.get(name, getattr(config, name, None))
            return default if given is None else given

        if runner is None or tokens is None:
            return None
        plain = (
            tokens.dim() == 2
            and not getattr(self.model.config, "is_encoder_decoder", False)
            and not any(kwargs.get(name) is not None for name in _ELSEWHERE)
            and setting("use_cache", True)
            and setting("num_beams", 1) == 1
            and setting("cache_implementation", "static") in ("static", "hybrid")
        )
        if not plain or runner.heads is None:
            return None
        batch, prompt = tokens.shape
        new = setting("max_new_tokens")
        needed = prompt + new if new is not None else max(setting("max_length", 20), prompt + 20)
        length = -(-needed // LENGTH_STEP) * LENGTH_STEP
        if (limit := runner.config.fuse_max_seq_len) is not None:
            if needed > limit:
                raise ConfigError(f"{prompt} prompt and {needed - prompt} new tokens exceed fuse_max_seq_len={limit}")
            length = limit
        batch *= setting("num_return_sequences", 1)
        return static_cache(runner.heads, length, batch, self.model.dtype, tokens.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return Generate(memo[id(self.model)])

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self.model,)
