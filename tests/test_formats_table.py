"""docs/formats.md: what is read, what runs it, and what can be written, as found on checkpoints of every method.

QCOMPILE_ACCEPT=1 rewrites it.
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tabulate import tabulate
from torch import Tensor

import qcompile
from qcompile import formats, writers
from qcompile.files.checkpoint import open_checkpoint
from qcompile.kernels import _packed_cpu
from qcompile.kernels._weight import refuses_weight
from qcompile.quant.tensor import QTensor
from qcompile.save import _contents

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "formats.md"
HEAD = """# Formats

Every spec that the checkpoints in `tests/checkpoints` hold, by the method that wrote them. All are read without the
library that wrote them, keep their own codes and scales, and stay packed in memory. *Kernel* is what multiplies a
weight of this spec: `packed` unpacks codes in registers, `plain torch` unpacks the weight first. *Saved as* lists the
formats that hold such weights exactly; others are refused unless you ask to quantize again. A test writes this page.

"""


def kernel(refusal: str | None) -> str:
    return "plain torch" if refusal else "packed"


def rows_of(folder: Path) -> list[tuple[str, str, str, str, frozenset[str]]]:
    path = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
    method = formats.find(open_checkpoint(path))
    assert method is not None, f"{folder.name}: nobody reads it"
    model = qcompile.load(str(path), dtype=torch.float32, progress=False)
    found = []
    for weight in _contents(model).weights:
        saved = frozenset(writer.name for writer in writers.WRITERS if writer.refuses(weight) is None)
        if not isinstance(weight.tensor, QTensor):
            found.append((method.name, str(weight.spec), "plain torch", "plain torch", saved))
            continue
        columns = weight.tensor.columns
        sides = [s.dequantize() if isinstance(s, QTensor) else s for s in (weight.tensor.scale, weight.tensor.zero)]
        assert isinstance(sides[0], Tensor)
        arguments = (sides[0], sides[1], str(weight.spec), columns)
        cpu = kernel(_packed_cpu.refuses(torch.empty(0), torch.float32, *arguments))
        gpu = kernel(refuses_weight(*arguments))
        found.append((method.name, str(weight.spec), cpu, gpu, saved))
    return found


def test_table() -> None:
    saved: dict[tuple[str, str], list[frozenset[str]]] = defaultdict(list)
    kernels: dict[tuple[str, str], tuple[str, str]] = {}
    for folder in sorted((ROOT / "tests" / "checkpoints").iterdir()):
        if not folder.is_dir() or folder.name == "gguf-blocks":  # blocks alone, no model
            continue
        for method, spec, cpu, gpu, names in rows_of(folder):
            saved[method, spec].append(names)
            before = kernels.setdefault((method, spec), (cpu, gpu))
            kernels[method, spec] = tuple(max(pair) for pair in zip(before, (cpu, gpu), strict=True))  # type: ignore[assignment]
    lines = []
    for method, spec in sorted(kernels):
        held = sorted(frozenset.intersection(*saved[method, spec]))
        lines.append([method, f"`{spec}`", *kernels[method, spec], ", ".join(held)])
    text = HEAD + tabulate(lines, ["method", "spec", "CPU kernel", "GPU kernel", "saved as"], "github") + "\n"
    if os.environ.get("QCOMPILE_ACCEPT") == "1":
        TABLE.write_text(text, encoding="utf-8")
    if TABLE.read_text(encoding="utf-8") != text:
        pytest.fail("docs/formats.md is out of date; QCOMPILE_ACCEPT=1 rewrites it", pytrace=False)
