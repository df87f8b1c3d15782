"""What to do with a model: one frozen value, checked when it is made."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qcompile import checks, patterns, transformers_config
from qcompile.algorithms import ALGORITHMS, hqq, rtn
from qcompile.errors import ConfigError, QCompileError
from qcompile.fusing import Fusing
from qcompile.ops.row_codes import CODES
from qcompile.quant.activation import ActivationSpec
from qcompile.quant.spec import QSpec

# What a parameter is to its model. A norm or a bias is a vector and always stays dense.
VECTORS = frozenset({"norm", "bias"})
KEEP = VECTORS | {"lm_head", "embedding", "router", "tiny", "conv", "other"}
ROLES = KEEP | {"linear", "experts", "unused"}


KV_CACHES = (*CODES, "none")


@dataclass(frozen=True, eq=False)
class Config:
    """Which weights become what, and what is fused.

    weights      the spec of every weight that no rule below speaks of, such as "u4/g64/asym"; None quantizes none
    algorithm    "hqq" or "rtn"; None takes HQQ for specs that it can make, and round to nearest for the others
    include      patterns of modules to quantize although their role is kept dense, such as "lm_head"
    exclude      patterns of modules to keep dense; stronger than all other rules
    specs        pattern → spec, or None to keep dense; the first match wins
    activations  how compiled programs round what quantized linears read, such as "i8/token/dynamic" (ActivationSpec),
                 where the checkpoint does not say; None leaves it as it is. With weights of "i8/row/sym", or fp8_e4m3
                 for both, codes are multiplied by codes
    kv_cache     "fp8_e4m3" or "i8": the cache of model.generate() holds keys and values as codes of 8 bits, with a
                 scale for each token and head; "none" holds them as they are; None does what the checkpoint says, with
                 its own static scales if it has some
    keep         roles that stay dense: a subset of ROLES
    strict       raise StrictError if something is left behind unexpectedly
    dump         folder for the text of the graph after each pass
    cuda_graphs  replay steps of decoding over a static cache, and other calls that come back, as CUDA graphs (on GPUs)
    disk_cache   keep what was captured and transformed on disk, for other processes, beside Inductor's caches; the
                 environment's QCOMPILE_CACHE names another folder, or is 0. Programs of another model, code, version or
                 machine are told apart by fingerprint.py; an entry is unpickled, so keep the folder to yourself
    keep_caches  how many caches model.generate() keeps for its next calls; model.generate.release() gives them up
    do_fuse, fuse_max_seq_len, modules_to_fuse
                 AWQ's explicit fusing. modules_to_fuse: {"attention": [q, k, v, o], "mlp": [gate, up, down],
                 "layernorm": [names], "use_alibi": bool, "num_attention_heads", "num_key_value_heads", "hidden_size",
                 "rope_theta"}, where [] fuses none of a kind. Without it everything fuses that can. Numbers have to be
                 the model's; with use_alibi no rope is fused.

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
    activations: ActivationSpec | str | None = None
    kv_cache: str | None = None
    keep: Collection[str] = KEEP
    strict: bool = False
    dump: Path | None = None
    cuda_graphs: bool = True
    disk_cache: bool = False
    keep_caches: int = 2
    do_fuse: bool = True
    fuse_max_seq_len: int | None = None
    modules_to_fuse: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("weights", _spec("weights", self.weights))
        put("activations", _activations(self.activations))
        if self.kv_cache not in (None, *KV_CACHES):
            raise ConfigError(f"kv_cache={self.kv_cache!r}; known: {', '.join(KV_CACHES)}")
        for name in ("include", "exclude"):
            put(name, checks.names(name, getattr(self, name)))
        if not isinstance(self.specs, Mapping):
            raise ConfigError(f"specs={self.specs!r} is not a mapping from pattern to spec")
        checks.names("specs", tuple(self.specs))
        put("specs", {pattern: _spec(f"specs[{pattern!r}]", spec) for pattern, spec in self.specs.items()})
        put("keep", frozenset(checks.names("keep", self.keep)))
        for role in sorted(set(self.keep) - ROLES):
            raise ConfigError(f"keep: unknown role {role!r}{checks.hint(role, ROLES)}")
        for name in ("strict", "cuda_graphs", "disk_cache", "do_fuse"):
            checks.flag(name, getattr(self, name))
        if not isinstance(self.dump, (str, Path, type(None))):
            raise ConfigError(f"dump={self.dump!r} is not a path")
        put("dump", None if self.dump is None else Path(self.dump))
        self._check_specs()
        if self.include and self.weights is None and not any(self.specs.values()):
            raise ConfigError(f"include={list(self.include)} without weights: there is no spec to quantize them to")
        if self.fuse_max_seq_len is not None:
            checks.positive("fuse_max_seq_len", self.fuse_max_seq_len)
        if isinstance(self.keep_caches, bool) or not isinstance(self.keep_caches, int) or self.keep_caches < 0:
            raise ConfigError(f"keep_caches={self.keep_caches!r} is not a number of caches")
        put("modules_to_fuse", self.fusing.stated)

    @property
    def quant_method(self) -> str:
        """By this name transformers finds what to do with a `quantization_config` (transformers_quantizer.py)."""
        return "qcompile"

    @functools.cached_property
    def fusing(self) -> Fusing:
        """do_fuse and modules_to_fuse, as passes and plan ask for them."""
        return Fusing(self.do_fuse, self.modules_to_fuse)

    def _check_specs(self) -> None:
        if self.algorithm is not None and self.algorithm not in list(ALGORITHMS):
            raise ConfigError(f"unknown algorithm {self.algorithm!r}{checks.hint(self.algorithm, ALGORITHMS)}")
        for key, spec in [("weights", self.weights), *((f"specs[{p!r}]", spec) for p, spec in self.specs.items())]:
            if not isinstance(spec, QSpec):
                continue
            if reason := rtn.refuses(spec):
                raise ConfigError(f"{key}: {reason}")
            if self.algorithm == "hqq" and (reason := hqq.refuses(spec)):
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
            chosen = transformers_config.fields(SimpleNamespace(**value) if isinstance(value, Mapping) else value)
        else:
            kinds = "a spec such as 'u4/g64/asym', a Config, a dict of its fields or a transformers HqqConfig"
            raise ConfigError(f"a config is {kinds}, not {type(value).__name__}")
        chosen |= options
        known = {f.name for f in fields(cls)}
        for key in chosen:
            if key not in known:
                raise ConfigError(f"unknown config key {key!r}{checks.hint(key, known)}")
        return cls(**chosen)

    def spec_for(self, module: str, role: str) -> QSpec | str:
        """The spec of a module's weight, or the reason why it stays dense."""
        if role in VECTORS:
            return f"kept: {role}"
        if pattern := patterns.first(self.exclude, module):
            return f"excluded by {pattern!r}"
        kept = role in self.keep and not patterns.first(self.include, module)
        if pattern := patterns.first(self.specs, module):
            spec = self.specs[pattern]
            if spec is None:
                return f"kept dense by specs[{pattern!r}]"
            return f"kept: {role}" if kept and not patterns.names_in_full(pattern, module) else _qspec(spec)
        if self.weights is None:
            return "no weights spec in the config"
        return f"kept: {role}" if kept else _qspec(self.weights)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """The patterns that match none of these modules, each once."""
        names = list(modules)
        given = [*self.include, *self.exclude, *self.specs, *self.fusing.names]
        # Every HqqConfig skips lm_head, also for a model that has none.
        found = dict.fromkeys(pattern for pattern in given if pattern != patterns.TAG + "lm_head")
        return [pattern for pattern in found if not any(patterns.matches(pattern, name) for name in names)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `Config.of` takes back."""
        return {
            "weights": _spelled(self.weights),
            "algorithm": self.algorithm,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "specs": {pattern: _spelled(spec) for pattern, spec in self.specs.items()},
            "activations": _spelled(self.activations),
            "kv_cache": self.kv_cache,
            "keep": sorted(self.keep),
            "strict": self.strict,
            "dump": None if self.dump is None else str(self.dump),
            "cuda_graphs": self.cuda_graphs,
            "disk_cache": self.disk_cache,
            "keep_caches": self.keep_caches,
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


def _spec(key: str, value: Any) -> QSpec | None:
    if value is None or isinstance(value, QSpec):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r} is not a spec; a spec is spelled like 'u4/g64/asym'")
    try:
        return QSpec.parse(value)
    except QCompileError as error:
        raise ConfigError(f"{key}: {error}") from error


def _activations(value: Any) -> ActivationSpec | None:
    if value is None:
        return None
    if not isinstance(value, str | ActivationSpec):
        raise ConfigError(f"activations={value!r} is not a spec; a spec is spelled like 'i8/token/dynamic'")
    try:
        spec = ActivationSpec.parse(str(value))
    except QCompileError as error:
        raise ConfigError(f"activations: {error}") from error
    if spec.needs_scale:
        raise ConfigError(f"activations={str(spec)!r} needs numbers that only a checkpoint has; write a dynamic one")
    return spec


def _qspec(spec: QSpec | str) -> QSpec:
    return spec if isinstance(spec, QSpec) else QSpec.parse(spec)


def _spelled(spec: QSpec | ActivationSpec | str | None) -> str | None:
    return None if spec is None else str(spec)
