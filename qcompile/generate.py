"""`model.generate` of an optimized model: a static cache, and a loop of its own for what it is mostly called with."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from qcompile.caches import KeptCaches, cache_codes
from qcompile.calls import CACHE_NAMES, cache_name
from qcompile.decode import decode
from qcompile.errors import ConfigError
from qcompile.ops.row_codes import CODES
from qcompile.recordings import Recordings
from qcompile.runtime import Runner, runner_of

# Cache lengths are rounded up to so many tokens, and to an eighth of theirs.
LENGTH_STEP = 64
# With one of these, transformers runs another loop than sampling or greedy decoding, or the loop has more to do.
_OTHER_LOOPS = (
    "assistant_model", "assistant_early_exit", "use_mtp", "prompt_lookup_num_tokens", "custom_generate", "dola_layers",
    "penalty_alpha", "constraints", "force_words_ids", "synced_gpus", "token_healing", "output_attentions",
    "output_hidden_states",
)  # fmt: skip
# With one of these, a cache comes from elsewhere.
_OTHER_CACHES = (
    *CACHE_NAMES, "assistant_model", "prompt_lookup_num_tokens", "custom_generate", "inputs_embeds",
)  # fmt: skip


class Generate:
    """Replaces `model.generate` on the instance.

    It adds a static cache where the caller names no other cache, and keeps it for the next call, with the recordings of
    its steps; `release()` gives them up. Greedy decoding and sampling run in qcompile.decode and give what
    transformers' own loop gives; beams, assisted decoding and the like run in transformers' loops.
    """

    def __init__(self, model: Any):
        self.model = model
        self.caches, self.recordings = KeptCaches(), Recordings()
        self.__signature__ = inspect.signature(type(model).generate.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self.model).generate.__get__(self.model)
        named = self.__signature__.bind(*args, **kwargs).arguments
        kwargs = {**named.pop("kwargs", {}), **named}
        runner, cache = runner_of(self.model), None
        if (
            runner is not None
            and not getattr(self.model.config, "is_encoder_decoder", False)
            and self._setting(kwargs, "num_beams", 1) == 1
        ):
            if (cache := self._cache(runner, kwargs)) is not None:
                kwargs[cache_name(runner.__signature__.parameters)] = cache
                kwargs.pop("cache_implementation", None)
            if not any(self._setting(kwargs, name) for name in _OTHER_LOOPS):
                kwargs = self._with_stop_strings(kwargs)
                recordings = self.recordings if runner.config.cuda_graphs else None
                kwargs["custom_generate"] = functools.partial(
                    decode, streamer=kwargs.get("streamer"), recordings=recordings, fresh=cache is not None
                )
        # Our forward is compiled already; transformers would wrap it in torch.compile again.
        kwargs.setdefault("disable_compile", True)
        result = original(**kwargs)
        if runner is not None and cache is not None and isinstance(result, torch.Tensor):
            self.caches.give(cache, runner.config.keep_caches)  # other results have the cache in them
        return result

    def release(self) -> None:
        """Give up the caches that wait for the next call, and the recordings of prompts and steps on them."""
        self.caches.release()
        if (runner := runner_of(self.model)) is not None:
            runner.release()

    def _setting(self, kwargs: Mapping[str, Any], name: str, default: Any = None) -> Any:
        """A value as generate() will take it: from the call, from the call's config, from the model's config."""
        places = (
            kwargs,
            vars(kwargs.get("generation_config") or self.model.generation_config),
            vars(self.model.generation_config),
        )
        return next((value for place in places if (value := place.get(name)) is not None), default)

    def _cache(self, runner: Runner, kwargs: Mapping[str, Any]) -> Any:
        setting = functools.partial(self._setting, kwargs)
        tokens = kwargs.get("input_ids", kwargs.get("inputs"))
        if (
            tokens is None
            or tokens.dim() != 2
            or any(kwargs.get(name) is not None for name in _OTHER_CACHES)
            or not setting("use_cache", True)
            or setting("cache_implementation", "static") not in ("static", "hybrid")
            or runner.heads is None
        ):
            return None
        batch, prompt = tokens.shape
        new = setting("max_new_tokens")
        needed = prompt + new if new is not None else max(setting("max_length", 20), prompt + 20)
        step = max(LENGTH_STEP, (1 << needed.bit_length()) >> 4)
        length = -(-needed // step) * step
        if (limit := runner.config.fuse_max_seq_len) is not None:
            if needed > limit:
                raise ConfigError(f"{prompt} prompt and {needed - prompt} new tokens exceed fuse_max_seq_len={limit}")
            length = limit
        batch *= setting("num_return_sequences", 1)
        form = (runner.heads, length, batch, self.model.dtype, self.model.device)
        said = cache_codes(self.model, runner.config.kv_cache)
        if said is not None and said.scales is not None and len(said.scales) != len(runner.heads):
            why = f"the checkpoint has scales for {len(said.scales)} caches, the model has {len(runner.heads)}"
            warnings.warn(f"qcompile: keys and values are cached as they are: {why}", stacklevel=4)
            said = None
        return self.caches.take(*form) if said is None else self.caches.take(*form, CODES[said.element], said.scales)

    def _with_stop_strings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments with a criterion made of stop strings: transformers gives no tokenizer to a `custom_generate`."""
        from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

        tokenizer, strings = kwargs.pop("tokenizer", None), self._setting(kwargs, "stop_strings")
        if tokenizer is None or strings is None:
            return kwargs
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or ())
        criteria.append(StopStringCriteria(tokenizer, strings))
        return {**kwargs, "stop_strings": None, "stopping_criteria": criteria}

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return Generate(memo[id(self.model)])

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self.model,)
