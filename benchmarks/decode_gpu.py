"""Decode one token at a time on a GPU: a model of Llama-3-8B's shape with random weights, in a CUDA graph.

    python -m benchmarks.decode_gpu --out FOLDER [--layers 32] [--weights u4/g64/asym …]

For every spec: seconds to quantize and to compile; milliseconds of a call as a user makes it, and of a step that the
script captures in a CUDA graph itself, with its tokens/s and the weights' bytes over its time; and tokens/s of
generate(). Beside the float model in eager mode.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.caches import static_cache

CACHE, POSITION = 1024, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weights", nargs="+", default=["u4/g64/asym"])
    args = parser.parse_args()
    rows = []
    for spec in [None, *args.weights]:
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        rows.append(measure(spec, args.layers))
        print(rows[-1], flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode_gpu.json").write_text(json.dumps(rows, indent=1))
        (args.out / "decode_gpu.md").write_text(report(rows, args.layers))


def measure(spec: str | None, layers: int) -> dict[str, object]:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    row: dict[str, object] = {"weights": spec or "bf16, eager"}
    if spec is not None:
        start = time.perf_counter()
        qcompile.optimize(model, spec, progress=False)
        torch.cuda.synchronize()
        row["quantize s"] = round(time.perf_counter() - start, 1)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    read = held - model.model.embed_tokens.weight.nbytes  # one row of the table is read
    heads = [(8, 128, 128)] * layers
    cache = static_cache(heads, CACHE, 1, torch.bfloat16, torch.device("cuda"))
    token = torch.zeros((1, 1), dtype=torch.long, device="cuda")
    with torch.no_grad():
        start = time.perf_counter()
        model(input_ids=torch.randint(0, 1000, (1, POSITION), device="cuda"), past_key_values=cache)
        torch.cuda.synchronize()
        row["first prefill s"] = round(time.perf_counter() - start, 1)

        def step() -> torch.Tensor:
            return model(input_ids=token, past_key_values=cache).logits

        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        row["first step s"] = round(time.perf_counter() - start, 1)
        row["ms a call"] = round(timed(step), 3)
        row["ms a step"] = round(timed(captured(step)), 3)
    row["tokens/s"] = round(1000 / row["ms a step"], 1)  # type: ignore[operator]
    row["generate() tokens/s"] = round(generated(model), 1)
    row["weights GB"] = round(read / 1e9, 3)
    row["GB/s"] = round(read / 1e6 / row["ms a step"])  # type: ignore[operator]
    row["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    if spec is not None:
        report = qcompile.explain(model)
        kernels = {}
        for low in report.outcomes[-1].lowered:
            kernels[f"{low.op} {low.implementation}"] = kernels.get(f"{low.op} {low.implementation}", 0) + 1
        row["ops"] = kernels
    return row


def generated(model: torch.nn.Module) -> float:
    """Tokens a second of model.generate(), greedy, from POSITION tokens on: 96 new ones less 32, medians of three."""
    prompt = torch.randint(0, 1000, (1, POSITION), device="cuda")

    def seconds(new: int) -> float:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # type: ignore[operator]
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return sorted(taken[1:])[1]

    return 64 / (seconds(96) - seconds(32))


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as the replay of a CUDA graph."""
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


def timed(step: Callable[[], object], repeats: int = 40) -> float:
    """Median milliseconds."""
    for _ in range(5):
        step()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]


def report(rows: list[dict[str, object]], layers: int) -> str:
    keys = [key for key in rows[-1] if key != "ops"]
    table = tabulate([[row.get(key, "") for key in keys] for row in rows], headers=keys, tablefmt="github")
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    shape = (
        f"Llama-3-8B shape, {layers} layers, random weights, batch 1, context {POSITION}, cache {CACHE}, bf16 lm_head"
    )
    ops = "\n".join(f"- {row['weights']}: {row['ops']}" for row in rows if "ops" in row)
    return f"{device}\n\n{shape}\n\n{table}\n\nOps of the decode graph:\n\n{ops}\n"


if __name__ == "__main__":
    main()
