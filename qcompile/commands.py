"""What each command does with its arguments; it returns the exit status."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from qcompile import api, cli_checkpoint, demo, doctor, models
from qcompile.chat import Chat
from qcompile.config import Config
from qcompile.errors import QCompileError
from qcompile.evaluate import throughput
from qcompile.explain import parameters_text, size
from qcompile.plan import Plan
from qcompile.quant.spec import QSpec
from qcompile.tune import find_gpu, linears_of, tune

OK, LEFT, FAILED = 0, 1, 2

# What float weights become without --weights.
WEIGHTS = "u4/g64/asym"

# The long version of the demo.
FULL: dict[str, Any] = {"new": 64, "rounds": 5, "quick": False}


def run_demo(options: argparse.Namespace) -> int:
    source = models.find(options.model) if options.model else models.find_demo()
    full = options.full
    bits = options.bits or ([8, 4, 3, 2] if full else [4])
    started = time.perf_counter()
    _write(f"model   {models.DEMO_MODEL if not options.model else source}\n")
    if not options.model and source.local:
        _write(
            f"from    the installed package {models.DEMO_PACKAGE} (4-bit GGUF, unpacked; the hub has the original)\n"
        )
    elif not source.local:
        _write("from    the hub\n")
    _write(f"on      {doctor.describe_device(options.device)}\n\n")
    run = demo.Demo(source, bits, full, options.dtype, options.device, **(FULL if full else {}))
    rows, chat = run.run(_write)
    _write(f"\n> {demo.QUESTION}\n")
    chat.reply(demo.QUESTION)
    _write(f"\n\n{demo.table(rows)}\n")
    _write(
        f"\nToken embeddings are {demo.EMBEDDINGS} in all of qcompile's rows. Batch 1, prompt of {run.prompt} tokens, "
    )
    _write(f"{run.new} new ones. {time.perf_counter() - started:.0f} s in all.\n")
    if options.interactive:
        demo.converse(chat, _write, input)
    return OK


def run_plan(options: argparse.Namespace) -> int:
    plan = _dry_run(options)
    if options.json:
        _write(json.dumps(plan.to_dict(), indent=1) + "\n")
    else:
        quantized = sum(entry.spec is not None for entry in plan.entries)
        _write(
            f"{parameters_text(plan)}\n\n"
            f"{quantized} of {len(plan.entries)} parameters quantized; {size(plan.before)} -> {size(plan.after)}, "
            f"{plan.before / max(plan.after, 1):.2f} times smaller; roles from {plan.source}\n"
        )
    if options.strict:
        plan.insist()
    return OK


def _dry_run(options: argparse.Namespace) -> Plan:
    packed = _packed(options)
    config = _config(options, packed)
    if packed:
        return api.plan(_open(options, packed), config)
    return api.plan(models.skeleton(models.find(options.model), options.dtype, options.device), config)


def run_explain(options: argparse.Namespace) -> int:
    packed = _packed(options)
    model = _quantize(_open(options, packed), _config(options, packed))
    _report(model, options.json)
    return OK


def run_optimize(options: argparse.Namespace) -> int:
    packed = _packed(options)
    config = _config(options, packed)
    timing: dict[str, Any] = {}
    model = _timed(timing, "load_s", lambda: _open(options, packed))
    model = _timed(timing, "quantize_s", lambda: _quantize(model, config))
    if getattr(model, "can_generate", bool)():
        sizes = {"prompt": options.prompt_tokens, "new": options.new_tokens, "warm_up": False}
        _timed(timing, "compile_s", lambda: throughput(model, **sizes, rounds=1))
        speed = throughput(model, **sizes)
        timing |= {"prefill_tokens_per_s": round(speed.prefill, 1), "decode_tokens_per_s": round(speed.decode, 1)}
    elif (example := api.example_inputs(model)) is not None:
        with torch.no_grad():
            _timed(timing, "compile_s", lambda: model(**example))
            _timed(timing, "forward_s", lambda: model(**example))
    _report(model, options.json, timing)
    return OK


def run_generate(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    packed = _packed(options)
    config = _config(options, packed)
    tokenizer = models.load_tokenizer(models.find(options.model))
    model = _quantize(_open(options, packed), config)
    chat = Chat(model, tokenizer, options.max_new_tokens, options.temperature, options.raw, _write)
    reply = chat.reply(prompt)
    _write("\n")
    if options.verbose:
        print(f"{reply.tokens} tokens in {reply.seconds:.1f} s, compilation included", file=sys.stderr)
    return OK


def run_tune(options: argparse.Namespace) -> int:
    gpu = find_gpu(options.device)
    if (options.model is None) == (not options.shape):
        raise QCompileError("give a MODEL, or --shape OUTPUTS INPUTS")
    if options.shape:
        specs = [str(QSpec.parse(spec)) for spec in options.spec or [options.weights or WEIGHTS]]
        linears = [(spec, *shape) for spec in specs for shape in options.shape]
    else:
        packed = _packed(options)
        config = _config(options, packed)
        skeleton = (
            _open(options, packed) if packed else models.skeleton(models.find(options.model), options.dtype, str(gpu))
        )
        linears = linears_of(api.plan(skeleton, config))
    tuning = tune(linears=linears, rows=options.rows, device=gpu, progress=sys.stderr.isatty())
    _write((json.dumps(tuning.to_dict(), indent=1) if options.json else str(tuning)) + "\n")
    return OK


def run_doctor(options: argparse.Namespace) -> int:
    findings = doctor.examine(options.specs)
    _write((json.dumps(findings.to_dict(), indent=1) if options.json else str(findings)) + "\n")
    return OK if findings.ok else LEFT


def _packed(options: argparse.Namespace) -> bool:
    """Whether the model runs with the weights that its checkpoint has: quantized ones, and nothing else asked for."""
    return options.weights is None and cli_checkpoint.is_packed(models.find(options.model))


def _open(options: argparse.Namespace, packed: bool) -> Any:
    return cli_checkpoint.open_model(options, packed)


def _config(options: argparse.Namespace, packed: bool) -> Config:
    pairs = [given.partition("=") for given in options.spec]
    for pattern, equals, _ in pairs:
        if not equals:
            raise QCompileError(f"--spec {pattern}: a rule is PATTERN=SPEC, such as mlp.down_proj=u8/g64/asym")
    return Config(
        weights=_spec(options.weights or ("none" if packed else WEIGHTS)),
        algorithm=options.algorithm,
        include=tuple(options.include),
        exclude=tuple(options.exclude),
        specs={pattern: _spec(spec) for pattern, _, spec in pairs},
        activations=options.activations,
        kv_cache=options.kv_cache,
        strict=options.strict,
        dump=options.dump,
    )


def _spec(text: str) -> str | None:
    return None if text == "none" else text


def _quantize(model: Any, config: Config) -> Any:
    return api.optimize(model, config, progress=sys.stderr.isatty())


def _report(model: Any, as_json: bool, timing: dict[str, Any] | None = None) -> None:
    report = api.explain(model)
    if as_json:
        _write(json.dumps({**report.to_dict(), **({"timing": timing} if timing else {})}, indent=1) + "\n")
        return
    _write(f"{report}\n")
    if timing:
        _write("\ntiming      " + ", ".join(f"{name} {value}" for name, value in timing.items()) + "\n")


def _timed(timing: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    timing[name] = round(time.perf_counter() - start, 2)
    return result


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
