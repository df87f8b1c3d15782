"""What may be fused, and where: do_fuse and AWQ's modules_to_fuse.

    attention            [q, k, v] or [q, k, v, o], or [qkv] for one linear that makes all three; names are patterns
    mlp                  [gate, up, down], or [up, down]
    layernorm            [names]
    use_alibi            True: attention has a bias for positions and no rope, so none is fused there
    num_attention_heads, num_key_value_heads, hidden_size
                         held against the linears in "attention", one by one, and against the model's config
    rope_theta           held against the model's config: the graph has its own angles

Nothing of this is needed to fuse: passes read the graph. It confines them, and where there is no graph yet, it says
which linears are siblings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qcompile import checks, patterns
from qcompile.errors import ConfigError

_COUNTS = {"attention": (0, 1, 3, 4), "mlp": (0, 2, 3), "layernorm": None}
_ORDER = {"attention": "q, k, v and perhaps o, or one for q, k and v", "mlp": "gate, up, down, or up, down"}
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

    def named(self, kind: str) -> list[str]:
        """The patterns in one of the lists: "attention", "mlp" or "layernorm"."""
        return list(self.stated.get(kind, ())) if self.do_fuse and self.stated else []

    @property
    def names(self) -> list[str]:
        """All patterns that are to match a module."""
        return [name for kind in _COUNTS for name in self.named(kind)]

    def may_store_together(self, modules: Iterable[str]) -> bool:
        """Whether siblings may share one buffer. modules_to_fuse, if given, names them all in one of its lists."""
        if not self.do_fuse or self.stated is None:
            return self.do_fuse
        names = list(modules)
        return any(all(patterns.first(self.named(kind), name) for name in names) for kind in ("attention", "mlp"))

    def why_not(self, kind: str, module: str) -> str | None:
        """Why a pass of this kind may not work in a module, None if it may.

        A "layernorm" is named itself. "mlp", "attention" and "rope" work in the parents of the linears that are named,
        "any" everywhere.
        """
        if not self.do_fuse:
            return "do_fuse is False"
        if self.stated is None or kind == "any":
            return None
        names = self.named("attention" if kind == "rope" else kind)
        if kind == "layernorm":
            named = patterns.first(names, module) is not None
        else:
            parents = [name.rpartition(".")[0] for name in names]
            named = any(not parent or patterns.matches(parent, module) for parent in parents)
        if not named:
            return "the module is not named in modules_to_fuse"
        if kind == "rope" and self.stated.get("use_alibi"):
            return "modules_to_fuse has use_alibi: no rope belongs here"
        return None

    def reads(self, module: str) -> tuple[str, str] | None:
        """A name for what a linear reads: one for q, k and v, or gate and up, of a parent; None if unstated."""
        for kind in ("attention", "mlp"):
            if patterns.first(self._siblings(kind), module):
                return kind, module.rpartition(".")[0]
        return None

    def check_linears(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Hold the sizes against linears, module → (out_features, in_features). Raises ConfigError."""
        found: dict[str, dict[int, str]] = defaultdict(dict)
        names = self._siblings("attention")
        for module in linears:
            if name := patterns.first(names, module):
                found[module.rpartition(".")[0]][names.index(name)] = module
        for modules in found.values():
            self._check_attention({place: (module, *linears[module]) for place, module in modules.items()})

    def _check_attention(self, linears: Mapping[int, tuple[str, int, int]]) -> None:
        """The q, k and v of one module, by their places: (name, out_features, in_features)."""
        stated, widths = self.stated or {}, {}
        for place, (module, rows, columns) in linears.items():
            hidden = stated.get("hidden_size", columns)
            if place == 0 and hidden != columns:
                raise _mismatch(f"hidden_size is {hidden}", f"{module} reads {columns} features")
            key = "num_key_value_heads" if place else "num_attention_heads"
            if (heads := stated.get(key)) is None:
                continue
            if rows % heads:
                raise _mismatch(f"{key} is {heads}", f"{module} makes {rows} features, which is no multiple of it")
            widths[place] = rows // heads
        if 0 in widths and widths.get(1, widths[0]) != widths[0]:
            counts = " and ".join(f"{key} is {stated[key]}" for key in ("num_attention_heads", "num_key_value_heads"))
            heads = [f"{linears[place][0]} heads of {widths[place]} features" for place in (0, 1)]
            raise _mismatch(counts, f"that gives {' and '.join(heads)}")

    def check_config(self, config: Any, where: str) -> None:
        """Hold the sizes and rope_theta against the config of a transformers model. Raises ConfigError."""
        stated = self.stated if self.do_fuse and self.stated else {}
        for key in (*_SIZES, "rope_theta"):
            theirs = _thetas(config) if key == "rope_theta" else [getattr(config, key, None)]
            known = [value for value in theirs if isinstance(value, (int, float))]
            if key in stated and known and stated[key] not in known:
                has = " and ".join(map(str, known))
                raise _mismatch(f"{key} is {stated[key]}", f"{type(config).__name__}, the config of {where}, has {has}")

    def _siblings(self, kind: str) -> list[str]:
        """The names that are stated to read one value."""
        names = self.named(kind)
        # [qkv] and [up, down] have no siblings.
        return names[: 3 if kind == "attention" else 2] if len(names) > 2 else []


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


def _thetas(config: Any) -> list[Any]:
    """The bases of a config's rotary embeddings: one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None)
    tables = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    found = [table["rope_theta"] for table in tables if isinstance(table, Mapping) and "rope_theta" in table]
    return found or [getattr(config, "rope_theta", None)]


def _mismatch(stated: str, found: str) -> ConfigError:
    todo = "correct the number, leave it out, or name only the attention that it describes, as in 'text.*.q_proj'"
    return ConfigError(f"modules_to_fuse: {stated}, but {found}; {todo}")
