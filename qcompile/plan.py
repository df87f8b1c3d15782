"""What will become of every parameter, decided on shapes alone.

A parameter's role and the config give its spec, or the reason why it stays dense. Siblings, which are linears that read
one value, are stored side by side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from qcompile.config import Config
from qcompile.errors import ConfigError, SpecError, StrictError
from qcompile.patterns import first
from qcompile.quant.granularity import PerGroup, PerRow
from qcompile.quant.spec import QSpec
from qcompile.roles import Names, Role, find_roles, roles_in_graph
from qcompile.storage import Packed, packed_in


@dataclass(frozen=True)
class Entry:
    """One parameter: what it is, its spec or the reason why it stays dense, and its bytes before and after.

    `group` numbers the siblings that are stored side by side; `aliases` are the other names of a tied parameter.
    `decided` is False where a dense parameter is nobody's choice: not of the config, not of a role that is kept.
    `packed` says that it is quantized already, as its checkpoint stores it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    spec: QSpec | str | None
    reason: str
    before: int
    after: int
    group: int | None = None
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    decided: bool = True
    packed: bool = False

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Plan:
    """Every parameter of a model, and how its roles were found."""

    entries: tuple[Entry, ...]
    source: str

    @property
    def before(self) -> int:
        return sum(entry.before for entry in self.entries)

    @property
    def after(self) -> int:
        return sum(entry.after for entry in self.entries)

    @property
    def unexpected(self) -> list[Entry]:
        """Weights that stay dense although nobody decided so."""
        return [entry for entry in self.entries if entry.spec is None and not entry.decided]

    def insist(self) -> None:
        """Raise StrictError with a list if a weight stays dense although nobody decided so."""
        if left := self.unexpected:
            lines = "\n".join(f"  {entry.path}: {entry.reason}" for entry in left)
            raise StrictError(f"{len(left)} parameters would stay dense:\n{lines}")

    @property
    def groups(self) -> list[tuple[Entry, ...]]:
        """Quantized parameters as they are stored: siblings together, the others alone, in the model's order."""
        together: dict[Any, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.spec is not None:
                together[entry.path if entry.group is None else entry.group].append(entry)
        return [tuple(entries) for entries in together.values()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [
            {**asdict(entry), "dtype": str(entry.dtype).removeprefix("torch."), "spec": entry.spec and str(entry.spec)}
            for entry in self.entries
        ]
        return {"source": self.source, "before": self.before, "after": self.after, "parameters": rows}


def make_plan(model: nn.Module, config: Config, example: Mapping[str, Any] | None = None) -> Plan:
    """The plan for a model. `example` are keyword arguments of its forward; Transformers models need none.

    Nothing is computed: parameters may be on the meta device. Raises ConfigError for patterns that match no module
    and for sizes in modules_to_fuse that are not the model's.
    """
    names = _names(model)
    modules = [name for name, _ in model.named_modules()]
    if unmatched := config.unmatched(modules):
        raise ConfigError(f"no module matches {', '.join(map(repr, unmatched))}")
    example = example_inputs(model) if example is None else example
    roles, source = find_roles(model, names, example, config.fusing.reads, config.disk_cache)
    packed = {weight.parameter.paths[0]: weight for weight in packed_in(model)}
    plan = _plan(names, roles, config, source, packed)
    for module in [name for name in modules if first(config.fusing.named("attention"), name)] or [""]:
        config.fusing.check_config(_config_over(model, module), module or type(model).__name__)
    return plan


def plan_graph(weights: Mapping[Node, Tensor], config: Config) -> Plan:
    """The plan for a captured, normalized graph whose weight inputs are these nodes, named by meta["input_path"]."""
    names = [(tensor, (node.meta["input_path"],)) for node, tensor in weights.items()]
    roles = roles_in_graph({node.meta["input_path"]: node for node in weights}, names)
    return _plan(names, roles, config, "graph")


def _plan(
    names: Names, roles: Mapping[str, Role], config: Config, source: str, packed: Mapping[str, Packed] | None = None
) -> Plan:
    entries = []
    for tensor, (path, *aliases) in names:
        role = roles.get(path, Role("other"))
        if packed and path in packed:
            entries.append(_packed_entry(packed[path], role))
        else:
            entries.append(_entry(path, tuple(aliases), tensor, role, config))
    linears = {entry.module: entry.matrix for entry in entries if entry.role in ("linear", "tiny")}
    config.fusing.check_linears(linears)
    apart = {path for path, weight in (packed or {}).items() if not weight.stacks}
    return Plan(_group(entries, roles, config, apart), source)


def _config_over(model: nn.Module, module: str) -> Any:
    """The config of the nearest module at or above this one that has any; of several in one, that of the text model."""
    found = getattr(model.get_submodule(module), "config", None)
    if found is None and module:
        return _config_over(model, module.rpartition(".")[0])
    try:
        return find() if callable(find := getattr(found, "get_text_config", None)) else found
    except ValueError:  # it has two text models
        return found


def _names(model: nn.Module) -> Names:
    """Parameters in the model's order, each with all its names."""
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for path, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), (tensor, []))[1].append(path)
    plain = [(tensor, tuple(paths)) for tensor, paths in names.values()]
    packed = [weight.parameter for weight in packed_in(model)]
    return plain + [(torch.empty(each.shape, dtype=each.dtype, device="meta"), each.paths) for each in packed]


def _packed_entry(weight: Packed, role: Role) -> Entry:
    parameter = weight.parameter
    path, *aliases = parameter.paths
    try:
        spec: QSpec | str = QSpec.parse(weight.spec)
    except SpecError:  # vector codebooks have a spelling of their own
        spec = weight.spec
    before = math.prod(parameter.shape) * parameter.dtype.itemsize
    kind = "linear" if role.name in ("unused", "other") and len(parameter.shape) == 2 else role.name
    return Entry(
        path,
        parameter.shape,
        parameter.dtype,
        kind,
        spec,
        "",
        before,
        weight.nbytes,
        None,
        parameter.transposed,
        tuple(aliases),
        packed=True,
    )


def _entry(path: str, aliases: tuple[str, ...], tensor: Tensor, role: Role, config: Config) -> Entry:
    size = tensor.numel() * tensor.element_size()
    dense = Entry(
        path, tuple(tensor.shape), tensor.dtype, role.name, None, "", size, size, None, role.transposed, aliases
    )
    chosen = config.spec_for(dense.module, role.name)
    if isinstance(chosen, str):
        return replace(dense, reason=chosen)
    if role.name not in ("linear", "lm_head", "router", "tiny", "embedding"):
        return replace(dense, reason=f"a parameter of role {role.name} has no quantized form", decided=False)
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return replace(
            dense, reason=f"the weight is {str(tensor.dtype).removeprefix('torch.')}, not a float", decided=False
        )
    try:
        after = chosen.nbytes(*dense.matrix, min(tensor.element_size(), 4))
    except SpecError as error:
        return replace(dense, reason=f"{chosen}: {error}", decided=False)
    return replace(dense, spec=chosen, after=after)


def _group(
    entries: list[Entry], roles: Mapping[str, Role], config: Config, apart: Collection[str]
) -> tuple[Entry, ...]:
    """Number the siblings: linears that read one value and agree in spec, width, dtype and device."""
    candidates: dict[Any, list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        role = roles.get(entry.path)
        if role is None or role.reads is None or entry.transposed or entry.path in apart or not _stacks(entry):
            continue
        candidates[role.reads, entry.spec, entry.shape[1], entry.dtype, entry.packed].append(index)
    numbered = list(entries)
    groups = [indices for indices in candidates.values() if len(indices) > 1]
    for number, indices in enumerate(groups):
        if config.fusing.may_store_together([entries[index].module for index in indices]):
            for index in indices:
                numbered[index] = replace(entries[index], group=number)
    return tuple(numbered)


def _stacks(entry: Entry) -> bool:
    """Whether rows of this weight carry their own scales, so that weights can lie side by side."""
    spec = entry.spec
    if not isinstance(spec, QSpec) or spec.scale_spec or spec.zero_spec or entry.aliases:
        return False
    rows, columns = entry.matrix
    flat = isinstance(spec.granularity, PerGroup) and columns % spec.granularity.size
    return isinstance(spec.granularity, (PerRow, PerGroup)) and not flat


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Small inputs for a Transformers model's forward, or None if there is no telling."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    first = next(model.parameters(), None)
    if config is None or first is None:
        return None
    device = first.device
    if name == "input_ids":
        tokens = torch.ones((2, 8), dtype=torch.long, device=device)
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}
        return {"input_ids": tokens, **({"use_cache": False} if hasattr(config, "use_cache") else {})}
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.zeros((2, channels, *size), dtype=first.dtype, device=device)}
    return None
