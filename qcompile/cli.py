"""The command line: what it says of itself, takes, and makes of errors."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qcompile import cli_checkpoint, commands, doctor, models
from qcompile.algorithms import ALGORITHMS
from qcompile.commands import FAILED, LEFT, OK, WEIGHTS
from qcompile.config import KV_CACHES
from qcompile.errors import QCompileError, StrictError
from qcompile.tune import LASTS

MODEL_HELP = f"a local directory, a .gguf file, or a hub id such as {models.DEMO_MODEL}"

SPECS = """
A spec says how a weight is stored: element/granularity/zero.
  element      u1 … u8 (with a zero point), i2 … i8 (centred, without), ternary
  granularity  g64: 64 neighbouring inputs share a scale; row: one output channel does; tensor; o64: HQQ's axis 0
  zero         asym: float zero point; asym_int: integer zero point; sym: none
  examples     u4/g64/asym   i8/row/sym   u2/g16/asym   ternary/g64/asym   u4/g64/asym/scale(u8/o128/asym)

A PATTERN matches dotted module names by whole components: lm_head, layers.0, self_attn.q_proj, "mlp.*_proj".
"""

EXAMPLES = {
    None: """
examples:
  qcompile demo                                        a small chat model before and after, in a few minutes
  qcompile plan MODEL --weights u4/g64/asym            what would happen to each parameter; loads no weights
  qcompile optimize MODEL --weights u3/g64/asym        quantize, compile, report, measure
  qcompile generate MODEL "Why is the sky blue?"       stream an answer from the 4-bit model
  qcompile inspect MODEL                               how a checkpoint stores each parameter
  qcompile convert SRC DST --to gptq                   a quantized checkpoint in another library's format
  qcompile tune MODEL                                  measure the fastest kernels for its linears on this GPU
  qcompile doctor                                      which kernels run on this machine, and why others do not

`qcompile COMMAND --help` explains each one. Exit status: 0 fine; 1 something was left behind (--strict), or a kernel
or compiler is missing (doctor); 2 an error, told in one line on stderr.
""",
    "demo": """
examples:
  qcompile demo                      float against 4 bits, then one question to the 4-bit model
  qcompile demo --bits 8 4 3 2       one row for each width
  qcompile demo --interactive        ends in a chat
  qcompile demo --full               all widths, torch.compile of the float model too; takes several minutes
""",
    "plan": """
examples:
  qcompile plan MODEL                                                    every linear to u4/g64/asym
  qcompile plan MODEL --weights i8/row/sym --include lm_head             the output layer too
  qcompile plan MODEL --spec mlp.down_proj=u8/g64/asym --exclude layers.0
""",
    "explain": """
examples:
  qcompile explain MODEL                           what each pass did, what it missed and why, which kernels run
  qcompile explain MODEL --dump graphs/            and the graph after each pass, as text
  qcompile explain MODEL --json > report.json
""",
    "optimize": """
examples:
  qcompile optimize MODEL --weights u4/g64/asym
  qcompile optimize MODEL --weights none           fuse and compile only
  qcompile optimize MODEL --strict                 exit 1 if anything is left behind
""",
    "generate": """
examples:
  qcompile generate MODEL "What is the capital of France?"
  echo "Once upon a time" | qcompile generate MODEL - --raw --max-new-tokens 100
  qcompile generate MODEL "Hello" --weights none   the float model, compiled
  qcompile generate MODEL "Hello" --kv-cache i8    keys and values of the text in 8 bits
""",
    **cli_checkpoint.EXAMPLES,
    "tune": """
examples:
  qcompile tune MODEL                                          its linears at u4/g64/asym, or as its checkpoint has them
  qcompile tune MODEL --weights i4/g128/sym --rows 1-64        a decoding step of up to 64 texts
  qcompile tune --shape 4096 14336 --spec u4/g64/asym --spec i8/row/sym

Takes some minutes. What is faster than the formulas' choices is kept in ~/.cache/qcompile/tuned, or in QCOMPILE_CACHE,
for this GPU and these versions; every program of yours uses it. With --shape, a SPEC is that of the shapes.
""",
    "doctor": """
Kernels are asked in order, and the first one that does not refuse runs. MEANING is plain torch.
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. SystemExit comes from argparse only."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:  # this is the edge: whatever it is becomes one message and an exit status
        if options.debug:
            traceback.print_exc()
        else:
            print(f"error: {_message(error)}", file=sys.stderr)
        return LEFT if isinstance(error, StrictError) else FAILED


def _message(error: Exception) -> str:
    if isinstance(error, QCompileError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory; try --device cpu or fewer bits ({str(error).partition('.')[0]})"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = _new(
        argparse.ArgumentParser, None, prog="qcompile", description="A quantization compiler for PyTorch models."
    )
    parser.add_argument("--version", action="version", version=f"qcompile {doctor.versions()['qcompile']}")
    added = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        made = _new(added.add_parser, name, name=name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        made.add_argument("--debug", action="store_true", help="show tracebacks")
        made.set_defaults(run=run)
        return made

    show = command("demo", commands.run_demo, "show what quantizing and compiling does to a small chat model")
    show.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP}, which is the default")
    show.add_argument(
        "--bits", nargs="+", type=int, choices=range(1, 9), metavar="N", help="widths to show (default: 4)"
    )
    show.add_argument("--full", action="store_true", help="the long version: more widths, more rounds, torch.compile")
    show.add_argument("--interactive", action="store_true", help="chat with the quantized model at the end")
    _add_device(show)

    for name, run, summary in (
        ("plan", commands.run_plan, "say what would happen to each parameter, without loading weights"),
        ("explain", commands.run_explain, "quantize and print the report: parameters, passes, misses, kernels"),
        ("optimize", commands.run_optimize, "quantize, compile, print the report and measure the speed"),
    ):
        made = command(name, run, summary)
        made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
        _add_config(made)
        _add_device(made)
        made.add_argument("--json", action="store_true", help="print JSON")
        if name == "optimize":
            made.add_argument("--prompt-tokens", type=_count, default=128, metavar="N", help="measured prompt (128)")
            made.add_argument("--new-tokens", type=_count, default=32, metavar="N", help="measured new tokens (32)")

    made = command("generate", commands.run_generate, "answer a prompt with the quantized model, token by token")
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    made.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help="default: 256")
    made.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0: sample (default: greedy)")
    made.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    made.add_argument("--verbose", action="store_true", help="tell the time on stderr")
    _add_config(made)
    _add_device(made)

    for name, run, summary in (
        ("inspect", cli_checkpoint.inspect, "show how a checkpoint stores each parameter, without loading weights"),
        ("convert", cli_checkpoint.convert, "write a quantized checkpoint in another format, exactly or not at all"),
    ):
        cli_checkpoint.add_arguments(name, command(name, run, summary))

    made = command("tune", commands.run_tune, "measure which kernels and tiles are the fastest for linears on this GPU")
    made.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    sizes: dict[str, Any] = {"nargs": 2, "type": _count, "metavar": ("OUTPUTS", "INPUTS")}
    made.add_argument("--shape", action="append", default=[], **sizes, help="a weight, instead of a model's")
    made.add_argument(
        "--rows", type=_span, default=(1, LASTS[-1]), metavar="N-M", help=f"tokens in a batch (1-{LASTS[-1]})"
    )
    _add_config(made)
    _add_device(made)
    made.add_argument("--json", action="store_true", help="print JSON")

    made = command(
        "doctor", commands.run_doctor, "show versions, devices, the compiler, and which kernel runs which spec"
    )
    made.add_argument("specs", nargs="*", metavar="SPEC", help="specs to ask about (default: a selection)")
    made.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _new(make: Callable[..., argparse.ArgumentParser], command: str | None, **options: Any) -> argparse.ArgumentParser:
    specs = "" if command in ("demo", "doctor", "inspect", "convert") else SPECS
    return make(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{EXAMPLES[command].strip()}\n{specs}",
        allow_abbrev=False,
        **options,
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to quantize")
    group.add_argument(
        "--weights", metavar="SPEC", help=f"default: {WEIGHTS}, or what is quantized already; none: quantize nothing"
    )
    group.add_argument("--activations", metavar="SPEC", help="of what linears read, such as i8/token/dynamic")
    group.add_argument("--kv-cache", choices=KV_CACHES, help="hold keys and values in 8 bits, or as they are")
    group.add_argument("--algorithm", choices=sorted(ALGORITHMS), help="default: hqq where it knows the spec, else rtn")
    group.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="quantize what is usually kept"
    )
    group.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="keep these modules dense")
    group.add_argument("--spec", action="append", default=[], metavar="PATTERN=SPEC", help="a rule for some modules")
    group.add_argument("--strict", action="store_true", help="fail if a weight or a fusion site is left behind")
    group.add_argument("--dump", metavar="DIR", help="write the graph after each pass to this folder")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("auto", *models.DTYPES), default="auto", help="of activations and dense weights"
    )
    parser.add_argument(
        "--device", default=models.best_device(), metavar="NAME", help="cpu, cuda, … (default: %(default)s)"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    span = _count(first), _count(last or first)
    if span[0] > span[1]:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins")
    return span
