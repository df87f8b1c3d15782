"""Whole models on the CPU: packed ones against torch and llama.cpp, each held against what the memory gives.

    python -m benchmarks.cpu [--shape smollm2 | llama-1b [--layers 4]] [--specs u8/g64/asym u4/g64/asym] [--activations
        i8/token/dynamic] [--record]

All have the same weights and the same threads and take turns. The read limit is that of reading 512 MB in pages of
2 MiB with as many threads, measured between the rounds; a decoded token reads every weight once, so its bytes times
tokens a second are held against that. llama.cpp takes part where llama-cpp-python is installed, in blocks of 4 and 8
bits with a scale for 32 inputs; `CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python` builds it for this machine.
torchao takes part where it is installed: int8 weights, and int8 weights by int8 activations, through torch.compile.
--activations adds each of qcompile's models once more, with activations rounded so.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import qcompile
from benchmarks.record import device_slug, record
from qcompile import models
from qcompile.evaluate import Speed, throughputs
from qcompile.kernels._cpp import load_cpp
from qcompile.program import BoundProgram
from qcompile.runtime import runner_of

SPECS = ("u8/g64/asym", "u4/g64/asym", "u3/g64/asym", "u2/g64/asym", "u1/g64/asym")
HEADS = "u8/g64/asym"
LLAMA_CPP = {"Q8_0": "i8/g32/sym", "Q4_0": "i4/g32/sym"}
PROMPTS = (16, 128, 512)
LINEARS = ("::linear_packed", "::linear_codes", "::fused_packed", "::chain_packed", "::bound_chain")
BATCHES = (2, 4, 8, 16, 32, 64)
NEW = 24

READ = """
#include <cstddef>
#include <cstdint>
#include <sys/mman.h>
extern "C" char* prepare(size_t bytes) {
    char* at = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(at, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < bytes; i++) at[i] = i * 7;
    return at;
}
extern "C" int64_t read_all(const char* at, size_t bytes, int threads) {
    int64_t total = 0;
    const int64_t* words = (const int64_t*)at;
#pragma omp parallel for simd num_threads(threads) reduction(+ : total)
    for (size_t i = 0; i < bytes / 8; i++) total += words[i];
    return total;
}
"""


class ReadLimit:
    """Bytes a second of reading more memory than any cache holds, with all threads."""

    def __init__(self, size: int = 512 << 20):
        self.size, self.rates = size, list[float]()
        self.code = load_cpp(READ)
        self.code.prepare.argtypes, self.code.prepare.restype = [ctypes.c_size_t], ctypes.c_void_p
        self.code.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.at = self.code.prepare(size)

    def measure(self, times: int = 5) -> None:
        for _ in range(times):
            start = time.perf_counter()
            self.code.read_all(self.at, self.size, torch.get_num_threads())
            self.rates.append(self.size / (time.perf_counter() - start))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@dataclass
class Line:
    """What was measured of one contender: tokens a second, by length of the prompt, and by rows of a step."""

    bytes: int
    prefill: dict[int, float]
    decode: dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("smollm2", "llama-1b"), default="smollm2")
    parser.add_argument("--layers", type=int, default=16, help="of llama-1b, where time is short")
    parser.add_argument("--specs", nargs="*", default=SPECS)
    parser.add_argument("--activations", help="such as i8/token/dynamic")
    parser.add_argument("--prompts", nargs="*", type=int, default=PROMPTS)
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=(), help="eager, compile, torchao, llama.cpp")
    parser.add_argument("--note", default="", help="what a reader should know of the machine")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--named", help="a word in the name of the record, beside others of this shape")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = (
        models.load(models.find_demo(), "bfloat16", "cpu") if options.shape == "smollm2" else llama_1b(options.layers)
    )
    limit = ReadLimit()
    with tempfile.TemporaryDirectory() as folder:
        contenders = dict(torch_models(model, options.without))
        for spec in options.specs:
            tell(f"quantize to {spec}")
            contenders[f"qcompile {spec}"] = quantized(model, spec)
            if options.activations:
                rounded = quantized(model, spec, activations=options.activations)
                contenders[f"qcompile {spec} × {options.activations.partition('/')[0]}"] = rounded
        if importlib.util.find_spec("llama_cpp") and "llama.cpp" not in options.without:
            contenders |= {f"llama.cpp {kind}": LlamaCpp(model, kind, Path(folder)) for kind in LLAMA_CPP}
        lines = measure(contenders, limit, options.prompts, options.batches, options.rounds)
    ours = {name: spent(one) for name, one in contenders.items() if isinstance(one, nn.Module) and runner_of(one)}
    text = "\n\n".join((notes(options, limit), *tables(lines, limit.rate), steps(ours)))
    print(text)
    if options.record:
        name = "-".join(filter(None, ("cpu", options.shape, options.named, device_slug("cpu"))))
        print(record(name, f"Whole models on the CPU: {options.shape}", text, "cpu"))


def llama_1b(layers: int = 16) -> nn.Module:
    """Random numbers in the shape of Llama-3.2-1B, with a smaller vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def torch_models(model: nn.Module, without: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    if "eager" not in without:
        yield "bf16, eager", model
    if "compile" not in without:
        yield "bf16, torch.compile", compiled(copy.deepcopy(model))
    if importlib.util.find_spec("torchao") and "torchao" not in without:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        for name, way in (("i8", Int8WeightOnlyConfig()), ("i8 × i8", Int8DynamicActivationInt8WeightConfig())):
            twin = copy.deepcopy(model)
            quantize_(twin, way)
            yield f"torchao {name}", compiled(twin)


def compiled(model: Any) -> nn.Module:
    model.forward = torch.compile(model.forward)
    model.generation_config.cache_implementation = "static"
    return model


def quantized(model: nn.Module, spec: str, heads: str = HEADS, activations: str | None = None) -> nn.Module:
    twin = copy.deepcopy(model)
    tables = [twin.get_input_embeddings(), twin.get_output_embeddings()]  # type: ignore[operator]
    specs = {name: heads for name, module in twin.named_modules() if any(module is table for table in tables)}
    return qcompile.optimize(twin, spec, specs=specs, algorithm="rtn", activations=activations, progress=False)


class LlamaCpp:
    """llama.cpp on the same weights, rounded to its blocks, through a GGUF file."""

    def __init__(self, model: nn.Module, kind: str, folder: Path):
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        spec = LLAMA_CPP[kind]
        qcompile.save(quantized(model, spec, spec), folder / kind, "gguf", tokenizer=bytewise(), progress=False)
        path = folder / kind / "model.gguf"
        self.bytes = path.stat().st_size
        threads = torch.get_num_threads()
        self.model = Llama(
            str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def speed(self, prompt: int, new: int) -> Speed:
        self.model.reset()
        times = [time.perf_counter()]
        for tokens in ([i * 7919 % 32000 for i in range(prompt)], *([1] for _ in range(new))):
            self.model.eval(tokens)
            times.append(time.perf_counter())
        first, *later = (end - begin for begin, end in itertools.pairwise(times))
        return Speed(prompt / first, 1 / statistics.median(later), prompt, new)


def bytewise() -> Any:
    """A tokenizer that says nothing, without which llama.cpp does not open a file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters | {"ab": len(letters)}, [("a", "b")]))  # a file without merges is refused
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="a", eos_token="b")


def measure(
    contenders: dict[str, Any], limit: ReadLimit, prompts: Sequence[int], batches: Sequence[int], rounds: int
) -> dict[str, Line]:
    lines = {name: Line(bytes_of(contender), {}, {}) for name, contender in contenders.items()}
    modules = {name: contender for name, contender in contenders.items() if isinstance(contender, nn.Module)}
    others = {name: contender for name, contender in contenders.items() if name not in modules}
    for prompt in prompts:
        tell(f"prompts of {prompt} tokens")
        new, runs = NEW if prompt == 128 else 1, {name: list[Speed]() for name in contenders}
        for turn in range(rounds + 1):
            speeds = throughputs(modules, prompt, new, 1, warm_up=not turn)
            speeds |= {name: other.speed(prompt, new) for name, other in others.items()}
            limit.measure()
            if turn:  # the first one warms up
                for name, speed in speeds.items():
                    runs[name].append(speed)
        for name, speeds in runs.items():
            lines[name].prefill[prompt] = statistics.median(speed.prefill for speed in speeds)
            if prompt == 128:
                lines[name].decode[1] = statistics.median(speed.decode for speed in speeds)
    # torch.compile would compile each of these anew.
    eager_or_ours = {
        name: module for name, module in modules.items() if "forward" not in module.__dict__ or runner_of(module)
    }
    for batch in batches:
        tell(f"{batch} texts at once")
        for name, speed in throughputs(eager_or_ours, 16, NEW // 3, rounds, batch=batch).items():
            lines[name].decode[batch] = speed.decode
    limit.measure()
    return lines


def tell(doing: str) -> None:
    print(f"{time.strftime('%X')} {doing}", file=sys.stderr, flush=True)


def bytes_of(contender: Any) -> int:
    """Bytes of the weights that a token reads. Token table and output layer are one in both shapes."""
    if isinstance(contender, nn.Module):
        runner = runner_of(contender)
        return runner.plan.after if runner else sum(getattr(p, "nbytes", 0) for p in contender.parameters())
    return contender.bytes


@dataclass
class Spent:
    """Milliseconds of a decode step: all of it, in linears and what is fused with them, in the compiled program."""

    step: float
    linears: float
    program: float


def spent(model: nn.Module, prompt: int = 128) -> Spent:
    from torch.profiler import ProfilerActivity, profile

    with timed_programs() as programs:
        speed = throughputs({"": model}, prompt, NEW, 3, warm_up=False)[""]

    def in_linears(new: int) -> float:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            throughputs({"": model}, prompt, new, 1, warm_up=False)
        return sum(event.cpu_time_total for event in found.events() or () if event.name.endswith(LINEARS)) / 1e3

    linears = (in_linears(NEW) - in_linears(1)) / (NEW - 1)
    return Spent(1e3 / speed.decode, linears, statistics.median(programs) * 1e3)


@contextmanager
def timed_programs() -> Iterator[list[float]]:
    """Seconds of every step of a compiled program that generate() takes."""
    taken: list[float] = []
    original = BoundProgram.run

    def call(self: BoundProgram) -> Any:
        start = time.perf_counter()
        result = original(self)
        taken.append(time.perf_counter() - start)
        return result

    BoundProgram.run = call  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        BoundProgram.run = original  # type: ignore[method-assign]


def notes(options: argparse.Namespace, limit: ReadLimit) -> str:
    shape = {
        "smollm2": "SmolLM2-135M-Instruct",
        "llama-1b": f"Random numbers in the shape of {options.layers} layers of Llama-3.2-1B with 32,000 tokens",
    }[options.shape]
    rates = f"{limit.rate / 1e9:.1f} GB/s, from {min(limit.rates) / 1e9:.1f} to {max(limit.rates) / 1e9:.1f}"
    return (
        f"{shape}, {torch.get_num_threads()} threads. Read limit, measured in this run: {rates}. Medians of "
        f"{options.rounds} rounds in which all take turns. Decode follows a prompt of 128 tokens; embedding and output "
        f"layer are {HEADS} in qcompile's rows. Weights are rounded to nearest. {options.note}"
    )


def tables(lines: dict[str, Line], limit: float) -> list[str]:
    first = next(iter(lines.values()))
    prompts, batches = first.prefill, [batch for batch in first.decode if batch > 1]
    speeds = [
        [
            name,
            f"{line.bytes / 1e6:.0f} MB",
            f"{line.decode[1]:.1f}",
            f"{line.bytes * line.decode[1] / limit:.0%}",
            *(f"{line.prefill[prompt]:.0f}" for prompt in prompts),
        ]
        for name, line in lines.items()
        if 1 in line.decode
    ]
    heads = ["model", "a token reads", "decode tokens/s", "of the limit", *(f"prefill {n}" for n in prompts)]
    found = [tabulate(speeds, heads, tablefmt="github", disable_numparse=True)]
    if batches:
        rows = [
            [name, *(f"{line.decode[batch] * batch:.0f}" for batch in batches)]
            for name, line in lines.items()
            if len(line.decode) > 1
        ]
        title = "Tokens a second of all rows together, where several texts grow at once:"
        found.append(f"{title}\n\n{tabulate(rows, ['model', *map(str, batches)], 'github', disable_numparse=True)}")
    return found


def steps(ours: dict[str, Spent]) -> str:
    rows = [
        [
            name,
            f"{one.step:.2f}",
            f"{one.linears:.2f}",
            f"{1 - one.linears / one.step:.0%}",
            f"{one.step - one.program:.2f}",
        ]
        for name, one in ours.items()
    ]
    heads = ["model", "step, ms", "linears", "outside of them", "Python outside of the program, ms"]
    title = (
        "One step of decoding; linears are timed by torch's profiler, calls and what is fused with them included: "
        "norms, gates, residuals, and in a chain rope and attention:"
    )
    return f"{title}\n\n{tabulate(rows, heads, tablefmt='github', disable_numparse=True)}"


if __name__ == "__main__":
    main()
