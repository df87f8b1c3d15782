"""dump."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompile.graph import capture
from qcompile.graph.dump import dump, type_text, write_dump

ROOT = Path(__file__).resolve().parent.parent.parent

PROGRAM = """
import torch
from torch import nn
from qcompile.graph import capture
from qcompile.graph.dump import dump

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, *tensors):
        x, y = tensors
        for layer in self.layers:
            x = layer(x).relu()
        a, b = x.exp().to(torch.bfloat16).chunk(2, -1)
        return a, torch.cat([x, y], 1), {"b": b.sum(dtype=torch.float64)}

text = dump(capture.export(Model(), [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]).gm.graph)
"""


def text():
    scope = {}
    exec(PROGRAM, scope)
    return scope["text"]


def test_text(golden):
    golden("graph/dump", text())


def test_two_runs_are_byte_equal():
    """Another process hashes strings differently and counts symbols from zero."""
    program = PROGRAM + "print(text, end='')"
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout == text() == text()


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (torch.empty(2, 3, dtype=torch.bfloat16), "bf16[2,3]"),
        (torch.empty((), dtype=torch.bool), "bool[]"),
        (torch.empty(1, dtype=torch.complex64), "complex64[1]"),
        ((torch.empty(1), [torch.empty(2, dtype=torch.uint8)]), "(f32[1], (u8[2]))"),
        (3, "int"),
        (2.5, "float"),
        (True, "bool"),
        (None, "none"),
    ],
)
def test_types(value, want):
    assert type_text(value) == want


def test_symbols_are_named_by_appearance():
    class Join(nn.Module):
        def forward(self, *tensors):
            x, y = tensors
            return torch.cat([x.flatten(), y.flatten()])

    graph = capture.export(Join(), [torch.randn(2, 3), torch.randn(5, 2, 4)]).gm.graph
    lines = dump(graph).splitlines()
    assert lines[0].startswith("%tensors_0 : f32[s0,s1]") and lines[1].startswith("%tensors_1 : f32[s2,s3,s4]")
    assert "f32[s0*s1 + s2*s3*s4]" in lines[-2]


def test_write_dump(tmp_path):
    write_dump(tmp_path / "new", 20, "fuse_siblings", "%x : …\n")
    assert (tmp_path / "new" / "020-fuse_siblings.txt").read_text() == "%x : …\n"
