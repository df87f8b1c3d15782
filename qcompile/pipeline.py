"""Which passes run, in which order, and what came of it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from qcompile.config import Config
from qcompile.errors import StrictError
from qcompile.graph.dump import dump, write_dump
from qcompile.graph.match import Miss, module_path
from qcompile.graph.rewrite import PassResult, Rewriter, Rule, apply
from qcompile.normal import normalizing_passes
from qcompile.ops.registry import MEANING
from qcompile.passes.advance_lengths import AdvanceLengths
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_attention_cache import FuseAttentionCache
from qcompile.passes.fuse_attention_codes import FuseAttentionCodes
from qcompile.passes.fuse_chain import FuseChain
from qcompile.passes.fuse_gated_codes import FuseGatedCodes
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.fuse_mlp import FuseMlp
from qcompile.passes.fuse_norm import FuseNorm
from qcompile.passes.fuse_rope import FuseRope
from qcompile.passes.fuse_rope_cache import FuseRopeCache
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.lower import Lowered, lower
from qcompile.passes.quantize_activation import QuantizeActivation
from qcompile.passes.quantize_embedding import QuantizeEmbedding
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.recognize_activation import RecognizeActivation
from qcompile.passes.recognize_attention import RecognizeAttention
from qcompile.passes.recognize_norm import RecognizeNorm
from qcompile.passes.round_activation import RoundActivation

# Importing a kernel signs it up. Earlier ones are asked first.
KERNELS = (
    "linear_cpu",
    "fused_linear_cpu",
    "dequantize_cpu",
    "linear_cuda",
    "fused_linear",
    "dequantize_gpu",
    "norm",
    "gated_act",
    "rope",
    "rope_into_cache",
    "attention_decode",
    "attention_into_cache",
    "attention_codes",
    "attention_prompt",
    "attention_cpu",
    "attention_prompt_cpu",
    "chain_cpu",
    "lengths_cpu",
    "inductor",
    "linear_w8a8_cpu",
    "linear_w8a8_cuda",
    "gated_codes",
    "linear_rounded",
)
for kernel in KERNELS:
    importlib.import_module(f"qcompile.kernels.{kernel}")


@dataclass(frozen=True)
class Outcome:
    """What the pipeline did to one graph: every pass, every op call's implementation, and the graph before lowering.

    `inputs` names the call, such as `i64[s0,s1]`, by the types of the caller's tensors.
    """

    inputs: str
    passes: tuple[PassResult, ...]
    lowered: tuple[Lowered, ...]
    text: str

    def insist(self) -> None:
        """Raise StrictError with a list if a fusion site was missed or a quantized op has no kernel here."""
        left = [f"{result.name}: {reason} ({site.module})" for result in self.passes for reason, site in result.misses]
        left += [
            f"{low.op} {low.detail} has no kernel here ({low.site.module})"
            for low in self.lowered
            if low.implementation == MEANING and low.detail
        ]
        if left:
            lines = "\n".join(f"  {line}" for line in left)
            raise StrictError(f"{len(left)} sites are left in {self.inputs}:\n{lines}")


def default_passes(config: Config) -> list[Rule[Any]]:
    """The passes, in order."""
    # One spelling first, because captured spellings change with each release of torch and transformers.
    passes = [*normalizing_passes(), RecognizeActivation(), RecognizeNorm(), RecognizeAttention()]
    passes += [QuantizeLinear(), QuantizeEmbedding()]
    if config.activations is not None:
        passes += [RoundActivation(str(config.activations))]
    if not config.do_fuse:
        return [*passes, QuantizeActivation()]
    passes += _confined(config, ("any", FuseSiblings()), ("rope", FuseRope()))
    # After siblings: gate and up are halves of one tensor, and a linear with an activation is no sibling.
    passes += _confined(config, ("mlp", FuseMlp()), ("attention", FuseAttention()), ("attention", FuseAttentionCodes()))
    passes += [AdvanceLengths()]
    passes += _confined(config, ("attention", FuseRopeCache()), ("attention", FuseAttentionCache()))
    # After siblings and MLPs, which are fused while their linears are linears.
    passes += [QuantizeActivation(), *_confined(config, ("mlp", FuseGatedCodes()))]
    # Norms last: a rotation is a sum too, and a norm behind it would take it for its residual; and where a linear takes
    # its norm and the sum behind it, they do not join one another.
    passes += _confined(config, ("any", FuseLinear()), ("layernorm", FuseNorm()))
    # Of what is fused as far as it can be.
    return [*passes, *_confined(config, ("any", FuseChain()))]


def _confined(config: Config, *rules: tuple[str, Rule[Any]]) -> list[Rule[Any]]:
    """Each rule for the kind of module that is named beside it, where the config says which modules to fuse."""
    if config.modules_to_fuse is None:
        return [rule for _, rule in rules]
    return [Confined(rule, functools.partial(config.fusing.why_not, kind)) for kind, rule in rules]


class Confined:
    """A pass that works only where `why_not(module path)` is None; elsewhere it is the reason of a miss."""

    def __init__(self, rule: Rule[Any], why_not: Callable[[str], str | None]):
        self.rule = rule
        self.name = rule.name
        self.why_not = why_not

    def match(self, node: Node) -> Any:
        found = self.rule.match(node)
        if found is None or isinstance(found, Miss) or (reason := self.why_not(module_path(node))) is None:
            return found
        return Miss(reason, node)

    def rewrite(self, g: Rewriter, match: Any) -> None:
        self.rule.rewrite(g, match)


@dataclass
class Pipeline:
    """Passes, dump folder and Inductor options, ready to run on graphs."""

    passes: Sequence[Rule[Any]]
    dump: Path | None = None

    @staticmethod
    def of(config: Config) -> Pipeline:
        """The pipeline for a config. QCOMPILE_DUMP, a folder, stands in for a dump that the config does not have."""
        dump = config.dump or os.environ.get("QCOMPILE_DUMP")
        return Pipeline(default_passes(config), Path(dump) if dump else None)

    def transform(self, gm: GraphModule, inputs: str) -> Outcome:
        """Run all passes on a graph in normal form and lower it, in place. Dumps go to `dump/inputs/…`."""
        folder = self.dump / _file_name(inputs) if self.dump else None
        results = []
        self._write(folder, 0, "captured", gm)
        for index, rule in enumerate(self.passes, start=1):
            results.append(apply(gm.graph, rule))
            if results[-1].rewrites:
                self._write(folder, 10 * index, rule.name, gm)
        text = dump(gm.graph)
        lowered = lower(gm)
        self._write(folder, 10 * (len(self.passes) + 1), "lower", gm)
        return Outcome(inputs, tuple(results), lowered, text)

    def _write(self, folder: Path | None, index: int, name: str, gm: GraphModule) -> None:
        if folder is not None:
            write_dump(folder, index, name, dump(gm.graph))


def _file_name(inputs: str) -> str:
    """`i64[s0,s1] i64[s0,s2]` as a folder's name."""
    return "".join(c if c.isalnum() else "-" for c in inputs).strip("-")[:100] or "no-inputs"
