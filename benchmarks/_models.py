"""A model of Llama-3-8B's shape with random weights, as we and others run it on a GPU, as far as they are installed."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from benchmarks._gpu import Report
from qcompile.algorithms import quantize
from qcompile.caches import static_cache
from qcompile.quant.spec import QSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EAGER = "bf16, eager"
SHAPE: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
# For trying the scripts out.
TINY: dict[str, Any] = SHAPE | {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip


@dataclass
class Contender:
    """`call(input_ids, past_key_values)` gives the logits of the last token; `seconds` made the model ready."""

    name: str
    model: Any
    call: Callable[..., Tensor]
    seconds: float

    def cache(self, batch: int, length: int) -> Any:
        config = self.model.config
        width = config.hidden_size // config.num_attention_heads
        heads = [(config.num_key_value_heads, width, width)] * config.num_hidden_layers
        return static_cache(heads, length, batch, torch.bfloat16, DEVICE)

    @property
    def read_bytes(self) -> int:
        """What a step reads of the weights: all but the table of embeddings, of which it reads a row."""
        held = sum(_nbytes(t) for t in [*self.model.parameters(), *self.model.buffers()])
        return held - self.model.get_input_embeddings().weight.nbytes


def contenders(
    report: Report, layers: int, specs: Sequence[str], only: Sequence[str] = (), tiny: bool = False
) -> Iterator[Contender]:
    """One after the other, each freed before the next: bf16 eager, others' compiled, and qcompile's specs. One that
    cannot be made is a failure of the report.

    A spec may end in `+lm_head`, which quantizes the output layer too, in `+unfused`, or in `+i8` or `+fp8_e4m3`,
    which rounds activations by token. Of all these those whose names hold one of `only`, if that is given.
    """
    makers: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {EAGER: _eager, "bf16, torch.compile": _compiled}
    makers |= {name: make for name, make in OTHERS.items() if find_spec(name.partition(" ")[0])}
    makers |= {f"qcompile {spec}": functools.partial(_ours, spec) for spec in specs}
    for name, make in makers.items():
        if only and not any(part in name for part in only):
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        with DEVICE:
            config = LlamaConfig(num_hidden_layers=layers, **(TINY if tiny else SHAPE))
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        start = time.perf_counter()
        try:
            call = make(model)
        except Exception as failure:
            report.fail(name, f"{type(failure).__name__}: {failure}"[:400])
            continue
        synchronize()
        yield Contender(name, model, call, time.perf_counter() - start)
        del model, call
        gc.collect()  # a model and what compiles its calls refer to one another
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def _eager(model: Any) -> Callable[..., Tensor]:
    def call(input_ids: Tensor, past_key_values: Any) -> Tensor:
        return model(input_ids=input_ids, past_key_values=past_key_values, logits_to_keep=1).logits

    return call


def _compiled(model: Any) -> Callable[..., Tensor]:
    return torch.compile(_eager(model), dynamic=False)


def _torchao(model: Any, name: str) -> Callable[..., Tensor]:
    from torchao import quantization  # type: ignore[import-not-found]

    options = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"} if "Int4" in name else {}
    quantization.quantize_(model.model, getattr(quantization, name)(**options))
    return _compiled(model)


def _gemlite(model: Any) -> Callable[..., Tensor]:
    """Rounded to nearest in the layout that HQQ has with gemlite; the weights are random."""
    from gemlite.helper import A16Wn  # type: ignore[import-not-found]

    spec = QSpec.parse("u4/g64/asym")
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                q = quantize(child.weight, spec, "rtn")
                assert isinstance(q.scale, Tensor) and isinstance(q.zero, Tensor)
                scale, zero = (side.reshape(-1, 1).bfloat16() for side in (q.scale, q.zero))
                setattr(
                    parent, name, A16Wn(device="cuda", dtype=torch.bfloat16).from_weights(q.codes(), scale, zero, 4, 64)
                )
    return _compiled(model)


OTHERS: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    "torchao int4 g128, torch.compile": functools.partial(_torchao, name="Int4WeightOnlyConfig"),
    "torchao int8, torch.compile": functools.partial(_torchao, name="Int8WeightOnlyConfig"),
    "gemlite u4 g64, torch.compile": _gemlite,
}


def _ours(spec: str, model: Any) -> Callable[..., Tensor]:
    weights, *options = spec.split("+")
    rounding = next((f"{option}/token/dynamic" for option in options if option in ("i8", "fp8_e4m3")), None)
    include = ["lm_head"] if "lm_head" in options else []
    qcompile.optimize(
        model,
        weights,
        include=include,
        activations=rounding,
        do_fuse="unfused" not in options,
        algorithm="rtn",
        progress=False,
    )
    return _eager(model)


def _nbytes(tensor: Any) -> int:
    """Of the numbers that are stored, where a tensor subclass says it is larger."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as the replay of a CUDA graph."""
    if DEVICE.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, one after the other without waiting on the host, after a warm-up."""
    marks = [_now()]
    for _ in range(repeats + 2):
        call()
        marks.append(_now())
    synchronize()
    taken = [_between(first, last) for first, last in itertools.pairwise(marks)]
    return sorted(taken[2:])[repeats // 2]


def generated(model: Any, prompt: torch.Tensor, tokens: int, repeats: int, **options: Any) -> float:
    """Tokens a second of model.generate(): of 5/4 of so many new ones less 1/4, medians of calls that take turns."""

    def call(new: int) -> float:
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        return waited(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths, **options))

    short, long = tokens // 4, tokens + tokens // 4
    # The first three compile and record; the longer text first, whose cache then serves both.
    taken = [(call(long), call(short)) for _ in range(3 + repeats)][3:]
    return tokens * prompt.shape[0] / (statistics.median(a for a, _ in taken) - statistics.median(b for _, b in taken))


def waited(call: Callable[[], object]) -> float:
    """Seconds of a call, with nothing before it and till all of it is done."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _now() -> Any:
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    return last - first if DEVICE.type != "cuda" else first.elapsed_time(last) / 1e3
