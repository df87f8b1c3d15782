import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile import api, cli, demo, doctor, models
from qcompile.chat import Chat
from qcompile.evaluate import Speed
from qcompile.kernels import _packed_cpu as packed

COMMANDS = ["demo", "plan", "explain", "optimize", "generate", "inspect", "convert", "tune", "doctor"]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`optimize` leaves the model as it is; the list gets the configs it was given."""
    given: list[Any] = []

    def optimize(model: Any, config: Any, **options: Any) -> Any:
        given.append(config)
        return model

    monkeypatch.setattr(api, "optimize", optimize)
    return given


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert "doctor" in command or f"qcompile {command}" in text.partition("examples:")[2]
    assert ("element/granularity/zero" in text) == (command not in ("demo", "doctor", "inspect", "convert"))
    assert max(map(len, text.splitlines())) <= 120


def test_top_level_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {command} ", text, re.M) for command in COMMANDS)
    assert "Exit status" in text


def test_specs_in_the_help_parse() -> None:
    from qcompile import QSpec

    line = next(line for line in cli.SPECS.splitlines() if line.strip().startswith("examples"))
    assert [str(QSpec.parse(spec)) for spec in line.split()[1:]] == line.split()[1:]


def test_usage_errors_are_argparse_s(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        [],
        ["nonsense"],
        ["plan"],
        ["plan", "x", "--weight", "u4/g64/asym"],
        ["generate", "x", "y", "--max-new-tokens", "0"],
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(wrong)
        assert exit.value.code == 2
    assert "'0' is not a positive number" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert re.fullmatch(r"qcompile \d+\.\d+.*\n", capsys.readouterr().out)


# plan


def test_plan_is_a_dry_run(
    tiny_chat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("plan loads no weights"))
    assert cli.main(["plan", str(tiny_chat), "--weights", "u3/g64/asym"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"model\.layers\.\*\.mlp\.gate_proj\.weight +128x64 +linear +u3/g64/asym +gate_proj\+up_proj", text
    )
    assert re.search(r"14 of 20 parameters quantized; \d.* -> .*, [\d.]+ times smaller; roles from graph", text)


def test_plan_as_json_and_every_option(tiny_chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--spec", "mlp.down_proj=u8/g32/asym", "--spec", "q_proj=none", "--exclude", "layers.0"]
    options += ["--algorithm", "rtn", "--dtype", "bfloat16", "--json"]
    assert cli.main(["plan", str(tiny_chat), *options]) == 0
    found = {row["path"]: row for row in json.loads(capsys.readouterr().out)["parameters"]}
    assert found["model.layers.1.mlp.down_proj.weight"]["spec"] == "u8/g32/asym"
    assert found["model.layers.1.mlp.up_proj.weight"]["spec"] == "u4/g64/asym"
    assert found["model.layers.1.self_attn.q_proj.weight"]["reason"] == "kept dense by specs['q_proj']"
    assert found["model.layers.0.mlp.up_proj.weight"]["spec"] is None
    assert {row["dtype"] for row in found.values()} == {"bfloat16"}


def test_strict_plan_exits_1(tiny_chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tiny_chat), "--strict"]) == 0
    # Groups of 96 do not divide a (32, 64) weight.
    assert cli.main(["plan", str(tiny_chat), "--strict", "--weights", "u4/g96/asym"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: \d+ parameters would stay dense:\n  model\.layers\.0\.\S+: u4/g96/asym: ", error)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "/nowhere"], "no directory and no .gguf file '/nowhere'"),
        (["plan", "TINY", "--weights", "u4"], "a spec is element/granularity/zero, such as u4/g64/asym"),
        (["plan", "TINY", "--exclude", "nothing_like_it"], "no module matches 'nothing_like_it'"),
        (["plan", "TINY", "--spec", "mlp"], "a rule is PATTERN=SPEC, such as mlp.down_proj=u8/g64/asym"),
        (["plan", "TINY", "--algorithm", "hqq", "--weights", "i8/row/sym"], "algorithm='rtn' takes it"),
        (["explain", "TINY", "--device", "nonsense"], "nonsense"),
    ],
)
def test_errors_are_one_message(
    arguments: list[str], message: str, tiny_chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(tiny_chat) if word == "TINY" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "/nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "find", lambda name: {}["key\nof two lines"])
    assert cli.main(["plan", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: KeyError: ") and error.endswith("(--debug shows where)\n")


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "find", interrupt)
    assert cli.main(["plan", "x"]) == 130


def test_module_runs_into_a_closed_pipe() -> None:
    command = f"{sys.executable} -m qcompile doctor u4/g64/asym | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # torch may warn about the machine there.
    assert not re.search("error:|Traceback|BrokenPipe", done.stderr), done.stderr


# explain, optimize, generate


def test_explain_reports(tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(tiny_chat), "--dump", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("qcompile report   LlamaForCausalLM   u4/g64/asym   on cpu")
    assert "fuse_siblings" in text and "program     input_ids i64[s0,s1]" in text
    assert list(tmp_path.glob("*/*captured.txt"))
    assert cli.main(["explain", str(tiny_chat), "--weights", "none", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["weights"] is None and report["programs"]


def test_generate_streams_the_reply(tiny_chat: Path, uncompiled: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "8", "--weights", "u2/g64/asym", "--kv-cache", "i8", "--verbose"]
    assert cli.main(["generate", str(tiny_chat), "Hi", *options]) == 0
    shown = capsys.readouterr()
    chat = Chat(models.load(models.find(str(tiny_chat))), models.load_tokenizer(models.find(str(tiny_chat))), 8)
    assert shown.out == chat.reply("Hi").text + "\n"
    assert re.search(r"^\d tokens in [\d.]+ s", shown.err, re.M)
    assert str(uncompiled[0].weights) == "u2/g64/asym" and uncompiled[0].kv_cache == "i8"


def test_generate_reads_standard_input(
    tiny_chat: Path, uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi"))
    assert cli.main(["generate", str(tiny_chat), "-", "--raw", "--max-new-tokens", "4", "--temperature", "0.7"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_chat_keeps_its_turns(tiny_chat: Path) -> None:
    source = models.find(str(tiny_chat))
    pieces: list[str] = []
    chat = Chat(models.load(source), models.load_tokenizer(source), max_new_tokens=4, write=pieces.append)
    first = chat.reply("One")
    assert "".join(pieces) == first.text
    chat.reply("Two")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    raw = Chat(chat.model, chat.tokenizer, max_new_tokens=4, raw=True)
    raw.reply("One")
    assert raw.turns == []


@pytest.mark.slow
def test_optimize_measures(tiny_chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimize", str(tiny_chat), "--prompt-tokens", "8", "--new-tokens", "4", "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["timing"]) == {"load_s", "quantize_s", "compile_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert all(value > 0 for value in report["timing"].values())
    assert not report["eager"]


# doctor


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json", "u4/g64/asym", "i8/row/sym"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["ok"] else 1)
    assert found["versions"]["torch"] == torch.__version__
    assert [(row["spec"], row["device"]) for row in found["kernels"]][:2] == [
        ("u4/g64/asym", "cpu"),
        ("i8/row/sym", "cpu"),
    ]
    assert cli.main(["doctor", "u4/g64/asym"]) in (0, 1)
    assert re.search(r"^u4/g64/asym +cpu ", capsys.readouterr().out, re.M)


def test_doctor_asks_about_all_kinds_of_specs() -> None:
    found = doctor.examine()
    assert {row.spec for row in found.kernels if row.device == "cpu"} == set(doctor.SPECS)
    nested = doctor.examine(["u4/g64/asym/scale(u8/o4/asym)"]).kernels[0]
    if packed.Reader.of("u4/g64/asym", 64).many_codes is not None:
        assert {row.spec: row.rounded for row in found.kernels if row.device == "cpu"}["u4/g64/asym"] == "cpu"
    assert nested.one == found.kernels[list(doctor.SPECS).index("u4/g64/asym")].one


def test_verdict_of_the_doctor() -> None:
    fast, slow = (
        doctor.Kernel("u4/row/asym", "cpu", "k", "k", "k", ()),
        doctor.Kernel("u4/o8/asym", "cpu", "MEANING", "k", "k", ()),
    )
    assert doctor.Findings({}, {}, None, (fast, slow)).ok
    assert not doctor.Findings({}, {}, None, (fast, slow), asked=True).ok
    assert not doctor.Findings({}, {}, None, (slow,)).ok
    broken = doctor.Findings({}, {}, "no C++ compiler", (fast,))
    assert not broken.ok and "install g++ or clang" in str(broken)


# demo


def test_demo_table() -> None:
    rows = [
        demo.Row("float32, eager", 1_000_000, 20.0, 0.0, Speed(100.0, 10.0, 128, 32)),
        demo.Row("qcompile u4/g64/asym", 300_000, 21.5, 12.3, Speed(150.0, 25.0, 128, 32)),
    ]
    last = demo.table(rows).splitlines()[-1]
    assert re.split(r"  +", last) == [
        "qcompile u4/g64/asym",
        "300.0 kB",
        "25.0 (2.50x)",
        "150 (1.50x)",
        "21.50",
        "12 s",
    ]


def test_conversation_ends_politely(tiny_chat: Path) -> None:
    source = models.find(str(tiny_chat))
    chat = Chat(models.load(source), models.load_tokenizer(source), max_new_tokens=2)
    answers, written = iter(["Hello", ""]), []
    demo.converse(chat, written.append, lambda prompt: next(answers))
    assert len(chat.turns) == 2

    def end(prompt: str) -> str:
        raise EOFError

    demo.converse(chat, written.append, end)
    assert len(chat.turns) == 2


@pytest.mark.slow
def test_demo_from_end_to_end(tiny_chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", str(tiny_chat), "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert f"> {demo.QUESTION}" in text
    assert re.search(r"^qcompile u4/g64/asym +[\d.]+ kB +[\d.]+ \([\d.]+x\) .* s$", text, re.M)


def test_demo_goes_through_its_steps(
    tiny_chat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(demo, "optimize", lambda model, spec, **options: seen.append((spec, options["specs"])) or model)
    monkeypatch.setattr(
        demo, "throughputs", lambda models, *sizes, **options: dict.fromkeys(models, Speed(1.0, 1.0, *sizes[:2]))
    )
    monkeypatch.setattr(models, "find_demo", lambda: models.find(str(tiny_chat)))
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert cli.main(["demo", "--bits", "8", "4", "--interactive"]) == 0
    tables = dict.fromkeys(["model.embed_tokens", "lm_head"], demo.EMBEDDINGS)
    assert seen == [("u8/g64/asym", tables), ("u4/g64/asym", tables)]
    text = capsys.readouterr().out
    steps = [
        "load the model",
        "eager: perplexity",
        "u8/g64/asym: quantize",
        "u4/g64/asym: quantize",
        "speed, side by side",
    ]
    places = [text.index(step) for step in [*steps, demo.QUESTION, "decode tokens/s", "in all", "Type a message"]]
    assert places == sorted(places)
