"""Decode one token at a time on a GPU: a model of Llama-3-8B's shape with random weights.

    python -m benchmarks.decode_gpu --out FOLDER [--layers 32] [--weights u4/g64/asym+lm_head …] [--batch 1 …]

For every spec, with `+lm_head` for the last linear too, and every batch: seconds to quantize and of the first calls;
milliseconds of a call as a user makes it, and of a step that the script captures in a CUDA graph itself, with its
tokens/s and the weights' bytes over its time; and tokens/s of generate(), greedy and by top k and top p. Beside the
float model in eager mode. Below, the ops of a step and where its time goes, kernel by kernel.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.caches import static_cache
from qcompile.runtime import runner_of

CACHE, POSITION = 1024, 512
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weights", nargs="+", default=["u4/g64/asym+lm_head"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    args = parser.parse_args()
    rows = []
    for spec in [None, *args.weights]:
        gc.collect()  # a model and what compiles its calls refer to one another
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        for row in measure(spec, args.layers, args.batch):
            rows.append(row)
            print(row, flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "decode_gpu.json").write_text(json.dumps(rows, indent=1))
            (args.out / "decode_gpu.md").write_text(report(rows, args.layers))


def measure(spec: str | None, layers: int, batches: list[int]) -> Iterator[dict[str, object]]:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    seconds = None
    if spec is not None:
        start = time.perf_counter()
        weights = spec.removesuffix("+lm_head")
        include = ["lm_head"] if weights != spec else []
        qcompile.optimize(model, qcompile.Config(weights=weights, include=include), progress=False)
        torch.cuda.synchronize()
        seconds = round(time.perf_counter() - start, 1)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    read = held - model.model.embed_tokens.weight.nbytes  # one row of the table is read
    for batch in batches:
        torch.cuda.reset_peak_memory_stats()
        row: dict[str, object] = {"weights": spec or "bf16, eager", "batch": batch, "quantize s": seconds}
        yield row | steps(model, layers, batch, read) | {"peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1)}


def steps(model: torch.nn.Module, layers: int, batch: int, read: int) -> dict[str, object]:
    row: dict[str, object] = {}
    cache = static_cache([(8, 128, 128)] * layers, CACHE, batch, torch.bfloat16, torch.device("cuda"))
    prompt = torch.randint(0, 1000, (batch, POSITION), device="cuda")
    token = torch.zeros((batch, 1), dtype=torch.long, device="cuda")
    with torch.no_grad():
        start = time.perf_counter()
        model(input_ids=prompt, past_key_values=cache)
        torch.cuda.synchronize()
        row["first prefill s"] = round(time.perf_counter() - start, 1)

        def step() -> torch.Tensor:
            return model(input_ids=token, past_key_values=cache).logits

        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        row["first step s"] = round(time.perf_counter() - start, 1)
        row["ms a call"] = round(timed(step), 3)
        replay = captured(step)
        ms = timed(replay)
    row["ms a step"] = round(ms, 3)
    row["tokens/s"] = round(1000 * batch / ms, 1)
    row["generate() tokens/s"] = round(generated(model, batch), 1)
    row["sampling tokens/s"] = round(generated(model, batch, **SAMPLING), 1)
    row["weights GB"] = round(read / 1e9, 3)
    row["GB/s"] = round(read / 1e6 / ms)
    if runner_of(model) is not None:
        found = collections.Counter(
            f"{low.op} {low.implementation}" for low in qcompile.explain(model).outcomes[-1].lowered
        )
        row["ops"] = dict(found)
        row["kernels"] = kernels(replay)
    return row


def kernels(replay: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Kernel → how many a step has, and their µs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            replay()
        torch.cuda.synchronize()
    found = {event.key[:60]: (event.count // 4, event.device_time_total / 4) for event in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:16])


def generated(model: torch.nn.Module, batch: int, **how: object) -> float:
    """Tokens a second of model.generate() from POSITION tokens on: 160 new ones less 32, medians of three."""
    prompt = torch.randint(0, 1000, (batch, POSITION), device="cuda")

    def seconds(new: int) -> float:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **how}
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # type: ignore[operator]
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return sorted(taken[1:])[1]

    return 128 * batch / (seconds(160) - seconds(32))


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
    keys = [key for key in rows[-1] if key not in ("ops", "kernels")]
    table = tabulate([[row.get(key) for key in keys] for row in rows], headers=keys, tablefmt="github")
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    shape = f"Llama-3-8B shape, {layers} layers, random weights, context {POSITION}, cache {CACHE}"
    parts = [device, shape, table]
    for row in rows:
        if "ops" not in row:
            continue
        spent = [(name, *number) for name, number in row["kernels"].items()]  # type: ignore[attr-defined]
        parts += [f"{row['weights']}, batch {row['batch']}: {row['ops']}"]
        parts += [tabulate(spent, headers=["kernel", "a step", "µs"], tablefmt="github", floatfmt=".1f")]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
