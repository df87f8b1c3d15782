"""Open a checkpoint as a model: its own codes and scales, packed, with nothing dequantized on the way.

The model is made without memory for its weights. Tensors are then read one at a time and go straight to their final
place on the target device.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from tqdm.auto import tqdm

from qcompile import _torch, formats, models
from qcompile.conversion import convert
from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.filler import Filler, naming
from qcompile.formats import Gguf
from qcompile.kernels._cpp import compile_ahead
from qcompile.save_pretrained import attach
from qcompile.stores import ScaledActivation


def load(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    quantize_inputs: bool = True,
    strict: bool = True,
    progress: bool = True,
) -> nn.Module:
    """The model of a checkpoint in a folder, a .gguf file or on the hub, float or quantized, for inference.

    dtype     what weights are unpacked to and dense ones are kept in; "auto" takes the checkpoint's own, or what this
              device is fast in; "stored" keeps each dense tensor in the dtype that it has in the files, for save()
    quantize_inputs
              whether activations are rounded where the checkpoint asks for it; False multiplies them as they are
    strict    whether a tensor that nothing reads, or a parameter that nothing fills, is an error or a warning
    progress  whether to show a progress bar

    The library that wrote the checkpoint is not needed, and no code from the checkpoint runs.
    Raises LoadError where there is no model, CheckpointError where its files are not what they should be.
    """
    source = models.find(name)
    folder = models.fetch(source)
    if torch.device(device).type == "cpu":
        compile_ahead([_torch.know_processor])
    checkpoint = open_checkpoint(folder / source.gguf if source.gguf else folder)
    method = formats.find(checkpoint)
    config = method.config(checkpoint) if isinstance(method, Gguf) else None
    _check_sizes(checkpoint)
    model = models.empty(source, dtype, str(device), config)
    checkpoint.shapes = {path: tuple(tensor.shape) for path, tensor in model.state_dict().items()}
    with naming(str(source)):
        stored = list(method.weights(checkpoint)) if method else []
    _scale_activations(model, checkpoint)
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    known |= {name for name, _ in model.named_modules()}
    stored = convert(model, checkpoint, stored, known)
    filler = Filler(model, checkpoint, stored, torch.device(device), quantize_inputs, keep_dtypes=dtype == "stored")
    with tqdm(total=len(filler.places), desc="load", disable=not progress, leave=False) as bar, torch.no_grad():
        filler.fill(bar)
    if left := filler.left():
        if strict:
            raise CheckpointError(f"{source}: " + "\n".join(left) + "\nstrict=False loads all the same")
        warnings.warn(f"qcompile: {source}: " + "; ".join(left), stacklevel=2)
    attach(model)
    return model.requires_grad_(False).eval()


def _check_sizes(checkpoint: Checkpoint) -> None:
    """A model of the sizes in config.json is made before a tensor is read; refuse what these files cannot hold."""
    widest = max((max(info.shape, default=1) for info in checkpoint.tensors.values()), default=1)
    limits = {"num_hidden_layers": len(checkpoint.tensors), **dict.fromkeys(_WIDTHS, 64 * widest)}
    for part in (checkpoint.config, checkpoint.config.get("text_config")):
        for key, most in limits.items():
            said = part.get(key) if isinstance(part, dict) else None
            if isinstance(said, int) and said > most:
                raise CheckpointError(
                    f"config.json: {key} is {said}; the files hold {len(checkpoint.tensors)} tensors, "
                    f"none wider than {widest}. Does it belong to them?"
                )


_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_experts", "num_local_experts")


def _scale_activations(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Divide the activations that have `scales` in the checkpoint: AWQ leaves them where no weight stands before a
    linear to take its scales, as in BLOOM, Falcon, GPT-NeoX and GPT-J."""
    modules = dict(model.named_modules())
    for path in checkpoint.modules("scales"):
        act, shape = modules.get(path), checkpoint.tensors[f"{path}.scales"].shape
        if act is not None and len(shape) == 1 and not any(True for _ in act.parameters()):
            owner, _, name = path.rpartition(".")
            scaled = ScaledActivation(act, shape[0], next(model.parameters()).dtype)
            setattr(model.get_submodule(owner), name, scaled)
