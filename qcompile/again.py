"""A call from before, recognized: one that differs from it only in the values of its tensors needs no search.

A step of decoding follows some hundred others like it. To take its caches apart, to check every shape that its program
assumes and every weight takes milliseconds of Python; to see that all of it is as it was takes a tenth of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from qcompile import _guards, calls
from qcompile.program import Program
from qcompile.replay import Form, strides

# A program with what to call it on: weights, flat tensors, caches, form.
Bound = tuple[Program, Sequence[Tensor], Sequence[Tensor], Sequence[Any], Form]


class Again:
    """What a call was like. `again(kwargs)` is that call's program on the tensors of a call like it, or None.

    It keeps no tensor and no cache alive. `flat` are the taken apart `kwargs` of the call, `weights` its program's.
    """

    def __init__(self, program: Program, kwargs: Mapping[str, Any], flat: calls.Flat, weights: Sequence[Tensor]):
        self.program = program
        self.given = {name: _known(value) for name, value in kwargs.items()}
        self.names = tuple(kwargs)
        self.stay = sorted(flat.cached | program.written)
        self.form = _guards.same_form([*weights, *(flat.tensors[i] for i in self.stay)])

    def __call__(self, kwargs: Mapping[str, Any]) -> Bound | None:
        if tuple(kwargs) != self.names:
            return None
        tensors: list[Tensor] = []
        caches = []
        for name, value in kwargs.items():
            known = self.given[name]
            if isinstance(known, KnownCache):
                if (found := known.tensors(value)) is None:
                    return None
                tensors += found
                caches.append(value)
            elif known != _known(value):
                return None
            elif isinstance(value, Tensor):
                tensors.append(value)
        weights = self.program.gather()
        if not self.program.is_tied or not self.form([*weights, *(tensors[i] for i in self.stay)]):
            return None
        return self.program, weights, tensors, caches, self.form


def _known(value: Any) -> Any:
    """What must be equal of an argument. Arguments that are neither tensor, cache nor plain never are."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, strides(value)
    if calls.is_cache(value):
        return KnownCache(value)
    return (type(value), value) if isinstance(value, calls.PLAIN) else object()


class KnownCache:
    """How the layers of a cache were made up."""

    def __init__(self, cache: Any):
        self.type = type(cache)
        self.layers = list(map(type, cache.layers))
        self.names = _names(cache)
        values = _values(cache)
        # As calls.flatten lists them: layer by layer, by name.
        layer = [place for place, layer in enumerate(cache.layers) for _ in vars(layer)]
        order = sorted(range(len(values)), key=lambda i: (layer[i], self.names[i]))
        self.places = [i for i in order if isinstance(values[i], Tensor)]
        self.kinds = [type(values[i]) for i in self.places]
        # The longest length of an allocated layer is the size of a tensor.
        self.rest = [i for i in order if i not in {*self.places} and self.names[i] != "max_cache_len"]
        self.plain = [values[i] if isinstance(values[i], calls.PLAIN) else object() for i in self.rest]

    def tensors(self, cache: Any) -> list[Tensor] | None:
        """The tensors of a cache made up like this one."""
        if type(cache) is not self.type or list(map(type, cache.layers)) != self.layers or _names(cache) != self.names:
            return None
        values = _values(cache)
        if not all(map(is_, [values[i] for i in self.rest], self.plain)):
            return None
        found = [values[i] for i in self.places]
        return found if list(map(type, found)) == self.kinds else None


def _names(cache: Any) -> list[str]:
    return list(chain.from_iterable(map(vars, cache.layers)))


def _values(cache: Any) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, map(vars, cache.layers))))
