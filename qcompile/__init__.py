"""qcompile: any PyTorch model in, a fused quantized program out."""

from qcompile import transformers_quantizer as _  # noqa: F401  registers itself
from qcompile.api import dequantize, dump, explain, load, optimize, plan, save
from qcompile.config import Config
from qcompile.errors import QCompileError
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.tune import tune

__all__ = [
    "Config",
    "QCompileError",
    "QSpec",
    "QTensor",
    "dequantize",
    "dump",
    "explain",
    "load",
    "optimize",
    "plan",
    "save",
    "tune",
]
