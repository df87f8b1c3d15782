"""Configs of transformers, read by their attributes: HqqConfig, and the fusing keys of AwqConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qcompile import checks, patterns
from qcompile.errors import ConfigError
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup, PerOutputGroup, PerRow, PerTensor
from qcompile.quant.spec import QSpec, Zero

_FUSING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse")
# What is no nn.Linear there, as roles.
_KEPT = frozenset({"norm", "bias", "embedding", "conv", "experts", "other"})


def fields(theirs: Any) -> dict[str, Any]:
    """The fields of a Config that say what `theirs` says."""
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
                specs[patterns.TAG + tag], algorithm = _of_hqq_params(tag, params)
                algorithms.add(algorithm)
    if len(algorithms) > 1:
        raise ConfigError("HqqConfig: optimize is True for some tags and False for others")
    return {
        "weights": weights,
        "specs": specs,
        "exclude": tuple(patterns.TAG + tag for tag in skipped if tag not in listed),
        "keep": _KEPT,
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
        checks.positive(f"{where}: group_size", size)
        granularity = PerGroup(size) if axis == 1 else PerOutputGroup(size)
    return QSpec(Element.parse(tags[bits]), granularity, Zero.FLOAT)
