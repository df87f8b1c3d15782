"""The ways in which checkpoints store quantized weights: one file a method."""

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.aqlm import Aqlm
from qcompile.formats.awq import Awq
from qcompile.formats.bitnet import BitNet
from qcompile.formats.bitsandbytes import BitsAndBytes
from qcompile.formats.compressed_tensors import CompressedTensors
from qcompile.formats.eetq import Eetq
from qcompile.formats.fbgemm_fp8 import FbgemmFp8
from qcompile.formats.fp8 import Fp8
from qcompile.formats.gemma import Gemma
from qcompile.formats.gguf import Gguf
from qcompile.formats.gptq import Gptq
from qcompile.formats.hqq import Hqq
from qcompile.formats.metal import Metal
from qcompile.formats.mxfp4 import Mxfp4
from qcompile.formats.native import Native
from qcompile.formats.quanto import Quanto
from qcompile.formats.quark import Quark
from qcompile.formats.stored import CacheCodes, Dense, Entry, Format, Ignored, Stored
from qcompile.formats.torchao import TorchAO
from qcompile.formats.vptq import Vptq

# The first that claims a checkpoint reads it.
FORMATS: tuple[Format, ...] = (
    Gguf(),
    Native(),
    Awq(),
    Gptq(),
    Hqq(),
    TorchAO(),
    BitsAndBytes(),
    CompressedTensors(),
    Quark(),
    FbgemmFp8(),
    Fp8(),
    Eetq(),
    BitNet(),
    Mxfp4(),
    Aqlm(),
    Vptq(),
    Quanto(),
    Metal(),
    Gemma(),
)


def find(checkpoint: Checkpoint) -> Format | None:
    """Who reads this checkpoint; None for a float one. Raises CheckpointError for a method that nobody here reads."""
    for candidate in FORMATS:
        if candidate.claims(checkpoint):
            return candidate
    if method := checkpoint.quantization.get("quant_method"):
        known = ", ".join(candidate.name for candidate in FORMATS)
        raise CheckpointError(
            f"{checkpoint.folder.name} is quantized by {method!r}, which qcompile does not read (it reads {known}); "
            "take the model's float original and quantize it with qcompile.optimize"
        )
    return None


__all__ = ["FORMATS", "CacheCodes", "Dense", "Entry", "Format", "Gguf", "Ignored", "Stored", "find"]
