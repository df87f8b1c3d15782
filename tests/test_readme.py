"""What the README shows works: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qcompile import QSpec, cli, models

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.mark.slow
def test_python_runs_in_order_on_a_tiny_model(
    tiny_chat: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    named = []
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        real = kind.from_pretrained

        def tiny(name: str, real: Any = real, **options: Any) -> Any:
            named.append(name)
            return real(tiny_chat, **options)

        monkeypatch.setattr(kind, "from_pretrained", tiny)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    code = blocks("python")
    assert len(code) >= 3
    for block in code:
        # A shorter answer says as much.
        exec(compile(block.replace("max_new_tokens=64", "max_new_tokens=4"), "README.md", "exec"), namespace)
    assert set(named) == {models.DEMO_MODEL}
    shown = capsys.readouterr().out
    assert "qcompile report   LlamaForCausalLM   u4/g64/asym" in shown
    assert "torch.Size([1, " in shown
    assert "model.layers.1.mlp.down_proj.weight u8/g64/asym" in shown
    assert "model.layers.1.self_attn.o_proj.weight kept dense by specs['self_attn.o_proj']" in shown


def test_two_set_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = dict(re.findall(r"^<!-- (\w+) -->\n```bash\n(.*?)\n```$", TEXT, re.M | re.S))
    assert set(commands) == {"demo", "tests"}
    assert commands["demo"].endswith("&& qcompile demo") and models.DEMO_INSTALL in commands["demo"]
    assert commands["tests"].endswith("&& pytest -n auto")
    assert all("torch" not in command for command in commands.values())


def test_commands_parse() -> None:
    lines = [line for block in blocks("bash") for line in re.split(r"\n| && ", block)]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qcompile ")]
    assert {words[0] for words in found} == {
        "demo",
        "plan",
        "explain",
        "optimize",
        "generate",
        "inspect",
        "convert",
        "tune",
        "doctor",
    }
    for words in found:
        cli._parser().parse_args(words)


def test_specs_parse() -> None:
    specs = re.findall(r"`((?:[ui]\d|ternary)/[^`]+)`", TEXT)
    assert len(specs) >= 3
    assert [str(QSpec.parse(spec)) for spec in specs] == specs


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links)
