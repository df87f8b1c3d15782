"""Every error that qcompile raises on purpose. Messages say what, where, what was expected and what to do."""


class QCompileError(Exception):
    """Base class: `except qcompile.QCompileError` catches all of ours and nothing else."""


class SpecError(QCompileError, ValueError):
    """A quantization spec that does not parse, or that a tensor does not fit."""


class ConfigError(QCompileError, ValueError):
    """A configuration with an unknown key, a value out of range, or a pattern that matches nothing."""


class FormatError(QCompileError, ValueError):
    """Quantized tensors that disagree with their spec or with each other."""


class CheckpointError(FormatError):
    """Files of a checkpoint that are missing, malformed, or say what cannot be; the message names file and tensor."""


class WeightError(QCompileError, ValueError):
    """A weight that cannot be quantized: NaN, inf, on the meta device, of a dtype without a meaning."""


class LoadError(QCompileError, OSError):
    """A model or a tokenizer that was not found, or cannot be read."""


class CaptureError(QCompileError, RuntimeError):
    """A model whose forward could not be turned into a graph."""


class StrictError(QCompileError, RuntimeError):
    """`strict=True` met parameters or fusion sites that were left behind; the message lists them all."""


class UnsupportedError(QCompileError, RuntimeError):
    """Something that is understood and cannot be done here."""
