"""What may be fused, and where: do_fuse and AWQ's modules_to_fuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qcompile import checks, patterns
from qcompile.errors import ConfigError

_COUNTS = {"attention": (0, 3, 4), "mlp": (0, 2, 3), "layernorm": None}
_ORDER = {"attention": "q, k, v and perhaps o", "mlp": "gate, up, down, or up, down"}
_SIZES = ("num_attention_heads", "num_key_value_heads", "hidden_size")
_KEYS = (*_COUNTS, "use_alibi", *_SIZES, "rope_theta")


@dataclass(frozen=True)
class Fusing:
    """`stated` is modules_to_fuse, in one order of keys; None fuses everything that can, unless `do_fuse` is False."""

    do_fuse: bool = True
    stated: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.stated is None:
            return
        if not isinstance(self.stated, Mapping):
            raise ConfigError(f"modules_to_fuse={self.stated!r} is not a mapping")
        for key, value in self.stated.items():
            _check(key, value)
        heads, kv_heads, hidden = (self.stated.get(key) for key in _SIZES)
        if heads and hidden and hidden % heads:
            raise ConfigError(f"modules_to_fuse: {heads} num_attention_heads do not divide hidden_size {hidden}")
        if heads and kv_heads and heads % kv_heads:
            raise ConfigError(
                f"modules_to_fuse: {kv_heads} num_key_value_heads do not divide {heads} num_attention_heads"
            )
        given = {key: self.stated[key] for key in _KEYS if key in self.stated}
        put = {key: list(value) if key in _COUNTS else value for key, value in given.items()}
        object.__setattr__(self, "stated", put)

    @property
    def names(self) -> list[str]:
        """All patterns that are to match a module."""
        if not self.do_fuse or self.stated is None:
            return []
        return [name for kind in _COUNTS for name in self.stated.get(kind, ())]

    def may_store_together(self, modules: Iterable[str]) -> bool:
        """Whether siblings may share one buffer. modules_to_fuse, if given, names them all in one of its lists."""
        if not self.do_fuse or self.stated is None:
            return self.do_fuse
        names = list(modules)
        lists = [self.stated.get(kind, ()) for kind in ("attention", "mlp")]
        return any(all(patterns.first(given, name) for name in names) for given in lists)

    def may_fuse_in(self, kind: str) -> Callable[[str], bool]:
        """Which module paths a pass of this kind may work in: "layernorm", "attention", "mlp", or "any" of them.

        A norm is named itself. Attention and MLP work in the parents of the linears that are named.
        """
        if not self.do_fuse or self.stated is None or kind == "any":
            return lambda module: self.do_fuse
        names = self.stated.get(kind, [])
        if kind == "layernorm":
            return lambda module: patterns.first(names, module) is not None
        parents = [name.rpartition(".")[0] for name in names]
        return lambda module: any(not parent or patterns.matches(parent, module) for parent in parents)


def _check(key: str, value: Any) -> None:
    where = f"modules_to_fuse[{key!r}]"
    if key not in _KEYS:
        raise ConfigError(f"modules_to_fuse: unknown key {key!r}{checks.hint(key, _KEYS)}")
    if key in _COUNTS:
        if isinstance(value, str):
            raise ConfigError(f"{where}={value!r} is one name, not a list of names")
        names, counts = checks.names(where, value), _COUNTS[key]
        if counts and len(names) not in counts:
            raise ConfigError(f"{where} holds {len(names)} names: {list(names)}; it is [] or {_ORDER[key]}")
        if len(set(names)) < len(names):
            raise ConfigError(f"{where} holds a name twice: {list(names)}")
    elif key == "use_alibi":
        checks.flag(where, value)
    else:
        checks.positive(where, value, (int, float) if key == "rope_theta" else (int,))
