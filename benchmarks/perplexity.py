"""Perplexity of a model in float and in fewer bits: our compiled model against the hqq package's own weights.

    python -m benchmarks.perplexity --model DIR --text FILE [--bits 8 4 3 2] [--device cpu cuda]

The text's documents are separated by blank lines. Windows of 512 tokens, the first 40 of them. For `hqq` every linear
layer that we quantize gets the weight that hqq.core.quantize.Quantizer makes and dequantizes, in the eager model; the
two columns should agree to the last digit or so. All in float32. Below, inputs of the same linears are rounded as well:
`WEIGHTS+ACTIVATIONS`; or keys and values lie in a quantized cache, as those of generate() do: `WEIGHTS,KV_CACHE`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import qcompile
from benchmarks.record import device_slug, record
from qcompile import models
from qcompile.caches import static_cache
from qcompile.evaluate import document_tokens, perplexity
from qcompile.ops.row_codes import CODES

ROUNDED = ["i8/row/sym+i8/token/dynamic", "u4/g64/asym+i8/token/dynamic", "fp8_e4m3/row/sym+fp8_e4m3/token/dynamic"]
CACHED = ["none,i8", "none,fp8_e4m3", "u4/g64/asym,i8"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local directory, a .gguf file or a hub id")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--rounded", nargs="*", default=ROUNDED, metavar="WEIGHTS+ACTIVATIONS")
    parser.add_argument("--cached", nargs="*", default=CACHED, metavar="WEIGHTS,KV_CACHE")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16")
    parser.add_argument("--device", nargs="+", default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    options = parser.parse_args()

    source = models.find(options.model)
    tokens = document_tokens(options.text.read_text("utf-8"), models.load_tokenizer(source))
    model = models.load(source, options.dtype)

    def measure(candidate: nn.Module, device: str, cache: Callable[[], Any] | None = None) -> str:
        found = perplexity(candidate.to(device), tokens, options.window, options.windows, cache)
        print(f"{device} {found:.4f}", flush=True)
        return f"{found:.2f}"

    first = options.device[0]
    rows = [
        ["float", measure(copy.deepcopy(model), first), *(compiled(model, None, d, measure) for d in options.device)]
    ]
    for bits in options.bits:
        spec = f"u{bits}/g{options.group}/asym"
        print(spec, flush=True)
        theirs = measure(with_hqq_weights(copy.deepcopy(model), spec, bits, options.group), first)
        rows.append([spec, theirs, *(compiled(model, spec, device, measure) for device in options.device)])
    for both in options.rounded:
        weights, _, activations = both.partition("+")
        print(both, flush=True)
        rows.append([both, "", *(compiled(model, weights, device, measure, activations) for device in options.device)])
    for both in options.cached:
        weights, _, element = both.partition(",")
        print(both, flush=True)
        spec = None if weights == "none" else weights
        name = f"{'float' if spec is None else spec}, {element} cache"
        rows.append([name, "", *(over_cache(model, spec, d, measure, element, options.window) for d in options.device)])
    headers = ["weights", f"hqq, eager on {first}", *(f"qcompile on {device}" for device in options.device)]
    body = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    note = f"Perplexity over {options.windows} windows of {options.window} tokens, {options.dtype}."
    name = Path(options.model).name
    path = record(
        f"perplexity-{name}-{device_slug(options.device[-1])}",
        f"Perplexity of {name}",
        f"{note}\n\n{body}",
        options.device[-1],
    )
    print(f"\n{body}\n\n{path}")


def compiled(model: nn.Module, spec: str | None, device: str, measure, activations: str | None = None) -> str:
    ours = qcompile.optimize(copy.deepcopy(model).to(device), spec, activations=activations)
    return measure(ours, device)


def over_cache(model: nn.Module, spec: str | None, device: str, measure, element: str, window: int) -> str:
    ours: Any = qcompile.optimize(copy.deepcopy(model).to(device), spec, kv_cache=element)
    heads, codes = ours.forward.heads, CODES[element]
    return measure(ours, device, lambda: static_cache(heads, window, 1, ours.dtype, ours.device, codes))


def with_hqq_weights(model: nn.Module, spec: str, bits: int, group: int) -> nn.Module:
    """The model with the float weights that the hqq package makes of its own codes."""
    from hqq.core.quantize import Quantizer

    for entry in qcompile.plan(model, spec).entries:
        if entry.spec is None:
            continue
        weight = model.get_parameter(entry.path)
        codes, meta = Quantizer.quantize(
            weight.data.float(), nbits=bits, group_size=group, axis=1, round_zero=bits == 4, device="cpu",
            compute_dtype=torch.float32, view_as_float=False,
        )  # fmt: skip
        weight.data = Quantizer.dequantize(codes, meta).to(weight.dtype).reshape(weight.shape)
    return model


if __name__ == "__main__":
    main()
