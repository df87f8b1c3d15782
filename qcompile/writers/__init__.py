"""The formats that checkpoints are written in: one file each."""

from qcompile.errors import ConfigError
from qcompile.writers.awq import Awq
from qcompile.writers.compressed_tensors import CompressedTensors
from qcompile.writers.contents import ActivationRounding, CacheCodes, Contents, Weight, Writer
from qcompile.writers.float import Float
from qcompile.writers.gguf import Gguf
from qcompile.writers.gptq import Gptq
from qcompile.writers.hqq import Hqq
from qcompile.writers.native import Native

WRITERS: tuple[Writer, ...] = (Native(), CompressedTensors(), Gptq(), Awq(), Hqq(), Gguf(), Float())


def find(name: str) -> Writer:
    """The writer of this name; ConfigError lists the known ones."""
    for writer in WRITERS:
        if writer.name == name:
            return writer
    raise ConfigError(f"unknown format {name!r}; known: {', '.join(writer.name for writer in WRITERS)}")


__all__ = ["WRITERS", "ActivationRounding", "CacheCodes", "Contents", "Weight", "Writer", "find"]
