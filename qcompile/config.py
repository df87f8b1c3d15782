"""What to do with a model: one frozen value, checked when it is made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qcompile.algorithms import ALGORITHMS, hqq
from qcompile.errors import ConfigError, QCompileError
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup, PerOutputGroup, PerRow, PerTensor
from qcompile.quant.spec import QSpec, Zero

# What a parameter is to its model. A norm or a bias is a vector and always stays dense.
VECTORS = frozenset({"norm", "bias"})
KEEP = VECTORS | {"lm_head", "embedding", "router", "tiny", "conv", "other"}
ROLES = KEEP | {"linear", "experts", "unused"}


@dataclass(frozen=True, eq=False)
class Config:
    """Which weights become what, and what is fused.

    weights      the spec of every weight that no rule below speaks of, such as "u4/g64/asym"; None quantizes none
    algorithm    "hqq" or "rtn"; None takes HQQ for specs that it can make, and round to nearest for the others
    include      patterns of modules to quantize although their role is kept dense, such as "lm_head"
    exclude      patterns of modules to keep dense; stronger than all other rules
    specs        pattern → spec, or None to keep dense; the first match wins
    keep         roles that stay dense: a subset of ROLES
    strict       raise StrictError if something is left behind unexpectedly
    dump         folder for the text of the graph after each pass
    do_fuse, fuse_max_seq_len, modules_to_fuse
                 AWQ's explicit fusing. modules_to_fuse: {"attention": [q, k, v, o], "mlp": [gate, up, down],
                 "layernorm": [names], "use_alibi": bool, "num_attention_heads", "num_key_value_heads", "hidden_size",
                 "rope_theta"}, where [] fuses none of a kind. Without it everything fuses that can.

    Patterns are compared with dotted module names. They match whole components, anywhere in the name: "lm_head",
    "self_attn.q_proj", "layers.0", "vision.*.fc?"; `*` also runs over dots. "tag:self_attn.q_proj" matches by HQQ's
    tag, which is the whole name without "model", "layers" and numbers.

    Precedence: exclude, then specs, then keep (unless in include, or named in full by specs), then weights.
    """

    weights: QSpec | str | None = None
    algorithm: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    specs: Mapping[str, QSpec | str | None] = field(default_factory=dict)
    keep: Collection[str] = KEEP
    strict: bool = False
    dump: Path | None = None
    do_fuse: bool = True
    fuse_max_seq_len: int | None = None
    modules_to_fuse: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("weights", _spec("weights", self.weights))
        for name in ("include", "exclude"):
            put(name, _patterns(name, getattr(self, name)))
        if not isinstance(self.specs, Mapping):
            raise ConfigError(f"specs={self.specs!r} is not a mapping from pattern to spec")
        _patterns("specs", tuple(self.specs))
        put("specs", {pattern: _spec(f"specs[{pattern!r}]", spec) for pattern, spec in self.specs.items()})
        put("keep", frozenset(_patterns("keep", self.keep)))
        for role in sorted(set(self.keep) - ROLES):
            raise ConfigError(f"keep: unknown role {role!r}{_hint(role, ROLES)}")
        for name in ("strict", "do_fuse"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is neither True nor False")
        if not isinstance(self.dump, (str, Path, type(None))):
            raise ConfigError(f"dump={self.dump!r} is not a path")
        put("dump", None if self.dump is None else Path(self.dump))
        self._check_algorithm()
        if self.include and self.weights is None and not any(self.specs.values()):
            raise ConfigError(f"include={list(self.include)} without weights: there is no spec to quantize them to")
        if self.fuse_max_seq_len is not None:
            _positive("fuse_max_seq_len", self.fuse_max_seq_len)
        put("modules_to_fuse", _modules_to_fuse(self.modules_to_fuse))

    def _check_algorithm(self) -> None:
        if self.algorithm is not None and self.algorithm not in list(ALGORITHMS):
            raise ConfigError(f"unknown algorithm {self.algorithm!r}{_hint(self.algorithm, ALGORITHMS)}")
        if self.algorithm != "hqq":
            return
        for key, spec in [("weights", self.weights), *((f"specs[{p!r}]", spec) for p, spec in self.specs.items())]:
            if isinstance(spec, QSpec) and (reason := hqq.refuses(spec)):
                raise ConfigError(f"{key}={str(spec)!r} with algorithm='hqq': {reason}; algorithm='rtn' takes it")

    @classmethod
    def of(cls, value: Any = None, **options: Any) -> Config:
        """A config from a spec, a dict of fields, a Config, or a transformers HqqConfig; `options` are fields on top.

        Of an AwqConfig, or any dict with "quant_method": "awq", the fusing keys are taken: its weights are quantized.
        """
        chosen: dict[str, Any]
        if isinstance(value, Config):
            chosen = {f.name: getattr(value, f.name) for f in fields(cls)}
        elif value is None or isinstance(value, (str, QSpec)):
            chosen = {"weights": value}
        elif isinstance(value, Mapping) and "quant_method" not in value:
            chosen = dict(value)
        elif isinstance(value, Mapping) or hasattr(value, "quant_method"):
            chosen = _of_transformers(SimpleNamespace(**value) if isinstance(value, Mapping) else value)
        else:
            kinds = "a spec such as 'u4/g64/asym', a Config, a dict of its fields or a transformers HqqConfig"
            raise ConfigError(f"a config is {kinds}, not {type(value).__name__}")
        chosen |= options
        known = {f.name for f in fields(cls)}
        for key in chosen:
            if key not in known:
                raise ConfigError(f"unknown config key {key!r}{_hint(key, known)}")
        return cls(**chosen)

    def spec_for(self, module: str, role: str) -> QSpec | str:
        """The spec of a module's weight, or the reason why it stays dense."""
        if role in VECTORS:
            return f"kept: {role}"
        if pattern := _first(self.exclude, module):
            return f"excluded by {pattern!r}"
        kept = role in self.keep and not _first(self.include, module)
        if pattern := _first(self.specs, module):
            spec = self.specs[pattern]
            if spec is None:
                return f"kept dense by specs[{pattern!r}]"
            return f"kept: {role}" if kept and not _names_in_full(pattern, module) else _qspec(spec)
        if self.weights is None:
            return "no weights spec in the config"
        return f"kept: {role}" if kept else _qspec(self.weights)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """The patterns that match none of these modules, each once."""
        names = list(modules)
        patterns = [*self.include, *self.exclude, *self.specs]
        if self.do_fuse and self.modules_to_fuse is not None:
            patterns += [name for kind in _NAMES for name in self.modules_to_fuse.get(kind, ())]
        # Every HqqConfig skips lm_head, also for a model that has none.
        found = dict.fromkeys(pattern for pattern in patterns if pattern != _TAG + "lm_head")
        return [pattern for pattern in found if not any(_matches(pattern, name) for name in names)]

    def may_store_together(self, modules: Iterable[str]) -> bool:
        """Whether siblings may share one buffer. modules_to_fuse, if given, names them all in one of its lists."""
        if not self.do_fuse or self.modules_to_fuse is None:
            return self.do_fuse
        names = list(modules)
        lists = [self.modules_to_fuse.get(kind, ()) for kind in ("attention", "mlp")]
        return any(all(_first(patterns, name) for name in names) for patterns in lists)

    def may_fuse_in(self, kind: str) -> Callable[[str], bool]:
        """Which module paths a pass of this kind may work in: "layernorm", "attention", "mlp", or "any" of them.

        A norm is named itself. Attention and MLP work in the parents of the linears that are named.
        """
        if not self.do_fuse or self.modules_to_fuse is None or kind == "any":
            return lambda module: self.do_fuse
        names = self.modules_to_fuse.get(kind, [])
        if kind == "layernorm":
            return lambda module: _first(names, module) is not None
        parents = [name.rpartition(".")[0] for name in names]
        return lambda module: any(not parent or _matches(parent, module) for parent in parents)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `Config.of` takes back."""
        return {
            "weights": _spelled(self.weights),
            "algorithm": self.algorithm,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "specs": {pattern: _spelled(spec) for pattern, spec in self.specs.items()},
            "keep": sorted(self.keep),
            "strict": self.strict,
            "dump": None if self.dump is None else str(self.dump),
            "do_fuse": self.do_fuse,
            "fuse_max_seq_len": self.fuse_max_seq_len,
            "modules_to_fuse": self.modules_to_fuse,
        }

    def to_json(self) -> str:
        """One line, equal for equal configs. Keys are not sorted: the order of `specs` has a meaning."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


# Patterns

_TAG = "tag:"


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith(_TAG):
        parts = [part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric()]
        return ".".join(parts) == pattern.removeprefix(_TAG)
    return fnmatchcase(f".{module}.", f"*.{pattern}.*")


def _first(patterns: Iterable[str], module: str) -> str | None:
    return next((pattern for pattern in patterns if _matches(pattern, module)), None)


def _names_in_full(pattern: str, module: str) -> bool:
    """Whether a matching pattern names this very module, not one above it or many at once."""
    return pattern.startswith(_TAG) or f".{module}".endswith(f".{pattern}")


# Checks of single values

_NAMES = {"attention": (0, 3, 4), "mlp": (0, 2, 3), "layernorm": None}
_SIZES = ("num_attention_heads", "num_key_value_heads", "hidden_size")
_FUSE_KEYS = (*_NAMES, "use_alibi", *_SIZES, "rope_theta")


def _hint(word: object, known: Iterable[str]) -> str:
    if close := get_close_matches(str(word), sorted(known), n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"


def _spec(key: str, value: Any) -> QSpec | None:
    if value is None or isinstance(value, QSpec):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r} is not a spec; a spec is spelled like 'u4/g64/asym'")
    try:
        return QSpec.parse(value)
    except QCompileError as error:
        raise ConfigError(f"{key}: {error}") from error


def _qspec(spec: QSpec | str) -> QSpec:
    return spec if isinstance(spec, QSpec) else QSpec.parse(spec)


def _spelled(spec: QSpec | str | None) -> str | None:
    return None if spec is None else str(spec)


def _patterns(key: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Collection) or isinstance(values, Mapping):
        raise ConfigError(f"{key}={value!r} is not a list of names")
    for name in values:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{key} holds {name!r}, which is not a name")
    return tuple(sorted(values) if isinstance(values, (set, frozenset)) else values)


def _positive(key: str, value: Any, kinds: tuple[type, ...] = (int,)) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r} is not a positive {' or '.join(kind.__name__ for kind in kinds)}")


def _modules_to_fuse(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"modules_to_fuse={given!r} is not a mapping")
    for key, value in given.items():
        where = f"modules_to_fuse[{key!r}]"
        if key not in _FUSE_KEYS:
            raise ConfigError(f"modules_to_fuse: unknown key {key!r}{_hint(key, _FUSE_KEYS)}")
        if key in _NAMES:
            if isinstance(value, str):
                raise ConfigError(f"{where}={value!r} is one name, not a list of names")
            names, counts = _patterns(where, value), _NAMES[key]
            if counts and len(names) not in counts:
                order = {"attention": "q, k, v and perhaps o", "mlp": "gate, up, down, or up, down"}[key]
                raise ConfigError(f"{where} holds {len(names)} names: {list(names)}; it is [] or {order}")
            if len(set(names)) < len(names):
                raise ConfigError(f"{where} holds a name twice: {list(names)}")
        elif key == "use_alibi":
            if not isinstance(value, bool):
                raise ConfigError(f"{where}={value!r} is neither True nor False")
        else:
            _positive(where, value, (int, float) if key == "rope_theta" else (int,))
    heads, kv_heads, hidden = (given.get(key) for key in _SIZES)
    if heads and hidden and hidden % heads:
        raise ConfigError(f"modules_to_fuse: {heads} num_attention_heads do not divide hidden_size {hidden}")
    if heads and kv_heads and heads % kv_heads:
        raise ConfigError(f"modules_to_fuse: {kv_heads} num_key_value_heads do not divide {heads} num_attention_heads")
    return {key: list(given[key]) if key in _NAMES else given[key] for key in _FUSE_KEYS if key in given}


# Configs of transformers, read by their attributes

_FUSING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse")


def _of_transformers(theirs: Any) -> dict[str, Any]:
    method = getattr(theirs.quant_method, "value", theirs.quant_method)
    if method == "awq":
        # An unset key is None there, and means the default.
        found = {key: getattr(theirs, key, None) for key in _FUSING}
        return {key: value for key, value in found.items() if value is not None}
    if method != "hqq":
        raise ConfigError(f"quant_method {method!r} describes a checkpoint; a config is made of hqq and awq only")
    if not isinstance(getattr(theirs, "quant_config", None), Mapping):
        raise ConfigError("a config with quant_method 'hqq' needs the mapping quant_config")
    return _of_hqq(theirs.quant_config, getattr(theirs, "skip_modules", None) or ())


def _of_hqq(given: Mapping[str, Any], skipped: Iterable[str]) -> dict[str, Any]:
    """HqqConfig quantizes every nn.Linear, small ones too, whose tag is not skipped; if it is dynamic, the tags listed
    and no others. A tag that is skipped and listed is quantized."""
    specs, listed, algorithms = {}, (), set()
    if "weight_quant_params" in given:
        weights, algorithm = _of_hqq_params("quant_config", given)
        algorithms.add(algorithm)
    else:
        weights, listed = None, given
        for tag, params in given.items():
            if params is not None:
                specs[_TAG + tag], algorithm = _of_hqq_params(tag, params)
                algorithms.add(algorithm)
    if len(algorithms) > 1:
        raise ConfigError("HqqConfig: optimize is True for some tags and False for others")
    return {
        "weights": weights,
        "specs": specs,
        "exclude": tuple(_TAG + tag for tag in skipped if tag not in listed),
        "keep": KEEP - {"lm_head", "router", "tiny"} | {"experts"},
        "algorithm": next(iter(algorithms), None),
    }


def _of_hqq_params(where: str, given: Any) -> tuple[QSpec, str]:
    """The spec and the algorithm that a dict of hqq's BaseQuantizeConfig asks for."""
    where = f"HqqConfig: {where}"
    if not isinstance(given, Mapping) or not isinstance(given.get("weight_quant_params"), Mapping):
        raise ConfigError(f"{where} has no weight_quant_params")
    params = given["weight_quant_params"]
    spec = _of_hqq_tensor(where, params)
    optimized, rounded = params.get("optimize", True), params.get("round_zero", False)
    if optimized and bool(rounded) != (spec.element.bits == 4):
        raise ConfigError(f"{where}: round_zero={rounded} with nbits={params.get('nbits', 4)} is not known")
    sides: list[QSpec | None] = []
    for key in ("scale_quant_params", "zero_quant_params"):
        side = given.get(key)
        if side and (side.get("optimize", True) or side.get("round_zero", False)):
            raise ConfigError(f"{where}: {key} has optimize or round_zero; only min-max rounding is known for it")
        sides.append(_of_hqq_tensor(f"{where}: {key}", side) if side else None)
    return QSpec(spec.element, spec.granularity, spec.zero, *sides), "hqq" if optimized else "rtn"


def _of_hqq_tensor(where: str, params: Mapping[str, Any]) -> QSpec:
    # The defaults are those of Quantizer.quantize.
    bits, size, axis = params.get("nbits", 4), params.get("group_size", 64), params.get("axis", 0)
    tags = {1: "u1", 1.58: "ternary", 2: "u2", 3: "u3", 4: "u4", 5: "u5", 6: "u6", 8: "u8"}
    if bits not in list(tags):
        raise ConfigError(f"{where}: nbits={bits!r}; known: {', '.join(map(str, tags))}")
    if axis not in (0, 1):
        raise ConfigError(f"{where}: axis={axis!r} is neither 0 nor 1")
    if not params.get("channel_wise", True):
        granularity = PerTensor()
    elif size is None and axis == 1:
        granularity = PerRow()
    elif size is None:
        raise ConfigError(f"{where}: group_size=None with axis=0 has one scale per input, which no spec can say")
    else:
        _positive(f"{where}: group_size", size)
        granularity = PerGroup(size) if axis == 1 else PerOutputGroup(size)
    return QSpec(Element.parse(tags[bits]), granularity, Zero.FLOAT)
