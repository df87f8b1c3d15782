"""Imports point downwards, only kernels/ imports Triton, only _torch and _guards touch private parts of torch."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module imports from the rows above its own; two names in one row never import one another.
LAYERS = [
    {"_torch", "_guards", "errors"},
    {"quant"},
    {"ops", "graph", "files"},
    {"passes", "kernels", "formats", "writers", "algorithms"},
    # what is to happen, how it is stored, and the account of it
    {"installed", "hub", "bound_region"},
    {"checks", "driver", "patterns", "pinned", "timing", "tuned"},
    {"fusing", "transformers_config", "fingerprint"},
    {"shelf"},
    {"config", "normal", "quantized_layer"},
    {"stores", "calls", "launches", "regions", "replay", "decode_state"},
    {"storage"},
    {"layer_loop"},
    {"step", "caches", "few_layers"},
    {"roles", "unroll", "filler"},
    {"plan"},
    {"pipeline"},
    {"explain"},
    # what a user calls
    {"program"},
    {"again"},
    {"runtime", "choice"},
    {"prompt", "recordings"},
    {"decode_step"},
    {"decode"},
    {"backend", "generate", "models", "conversion"},
    {"save"},
    {"save_pretrained"},
    {"load", "tune"},
    {"api"},
    {"transformers_quantizer"},
    {"__init__"},
    # the command line
    {"evaluate", "chat"},
    {"demo", "doctor", "inspect_checkpoint"},
    {"cli_checkpoint"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {part: height for height, row in enumerate(LAYERS) for part in row}

# Private by name, yet steady for years and without a public spelling.
ALLOWED_PRIVATE = re.compile(r"torch\.(_check\w*|_ops|utils\._pytree)")


def names(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, is it imported) of every import, attribute and string that spells a path into torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}", True) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node), False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, False


def offences(file: str, source: str) -> set[str]:
    """What `file` (as imported: qcompile/passes/x.py) imports or touches and may not."""
    path = Path(file).with_suffix("")
    part = path.parts[1]
    if part not in HEIGHT:
        return {f"{file}: {part} has no layer; give it one in LAYERS"}
    found = set()
    for line, name, imported in names(ast.parse(source), ".".join(path.parts[:-1])):
        where = f"{file}:{line}: {part}"
        first, second = (*name.split("."), "")[:2]
        if imported and first == "qcompile":
            target = second if second in HEIGHT else "__init__"
            if target != part and HEIGHT[target] >= HEIGHT[part]:
                found.add(f"{where} imports {target}, which is not below it")
            if (part, target) == ("kernels", "graph"):
                found.add(f"{where} imports graph: a kernel is given tensors")
        if imported and first == "triton" and part != "kernels":
            found.add(f"{where} imports triton, which only kernels may")
        private = re.match(r"torch(?!\.ops\b)(\.\w+)*?\._(?!_)\w+(?=[.\w]*$)", name)
        if private and part not in ("_torch", "_guards") and not ALLOWED_PRIVATE.fullmatch(private[0]):
            found.add(f"{where} touches {private[0]}, which only _torch and _guards may")
    return found


def test_imports() -> None:
    files = [*ROOT.glob("qcompile/**/*.py"), *ROOT.glob("passes/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    found = set()
    for file in files:
        relative = file.relative_to(ROOT)
        as_imported = relative if relative.parts[0] == "qcompile" else Path("qcompile") / relative
        found |= offences(as_imported.as_posix(), file.read_text(encoding="utf-8"))
    assert len(files) > 10
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("file", "source", "offence"),
    [
        ("qcompile/quant/spec.py", "from qcompile.ops import op", "quant imports ops"),
        ("qcompile/quant/spec.py", "from ..graph.match import Miss", "quant imports graph"),
        ("qcompile/graph/match.py", "import qcompile.ops.linear", "graph imports ops"),
        ("qcompile/kernels/norm.py", "from qcompile.graph.match import Miss", "kernels imports graph"),
        ("qcompile/passes/fuse.py", "def f():\n    from qcompile import kernels", "passes imports kernels"),
        ("qcompile/passes/fuse.py", "from .. import optimize", "passes imports __init__"),
        ("qcompile/passes/fuse.py", "import triton.language as tl", "passes imports triton"),
        ("qcompile/api.py", "from .cli import main", "api imports cli"),
        ("qcompile/api.py", "from torch import _dynamo", "api touches torch._dynamo"),
        ("qcompile/api.py", "import torch.fx._pytree", "api touches torch.fx._pytree"),
        ("qcompile/api.py", "torch._inductor.config.freezing = True", "api touches torch._inductor"),
        ("qcompile/api.py", "import_module('torch._guards.detect')", "api touches torch._guards"),
        ("qcompile/misc.py", "", "misc has no layer"),
    ],
)
def test_planted_offence_is_found(file: str, source: str, offence: str) -> None:
    assert any(offence in found for found in offences(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("qcompile/__init__.py", "from .api import optimize\nfrom qcompile.quant import QSpec"),
        ("qcompile/_torch.py", "from torch._inductor.compile_fx import compile_fx"),
        ("qcompile/passes/fuse.py", "from qcompile.passes.tools import x\nfrom ..ops import linear"),
        ("qcompile/kernels/norm.py", "import triton\ntorch._check(x > 0)\ntorch.ops.aten._to_copy.default"),
        ("qcompile/pipeline.py", "'see torch._dynamo for why'\ntorch.__version__"),
    ],
)
def test_honest_code_passes(file: str, source: str) -> None:
    assert not offences(file, source)
