"""GGUF: llama.cpp's models in one file, with weights in blocks that carry their own scales.

The types of blocks are in _gguf_blocks, configuration and names in _gguf_model. Where llama.cpp keeps a tensor in
another order or with another value than transformers, it is brought back here: rows of q and k, which move whole and so
stay packed, and Gemma's norms.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.files.gguf_file import GgufFile
from qcompile.formats import _gguf_model as model
from qcompile.formats._gguf_blocks import TYPES, unpack
from qcompile.formats._gguf_model import Metadata
from qcompile.formats.stored import Dense, Entry, Ignored, Read, Stored, finite
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor


class Gguf:
    name = "gguf"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return all(isinstance(file, GgufFile) for file in checkpoint.files)

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The configuration as in a config.json of transformers'."""
        return model.config(checkpoint)

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        metadata = Metadata(checkpoint)
        in_config = {"rope_factors_long.weight", "rope_factors_short.weight"}
        if model.llama3(metadata):
            in_config.add("rope_freqs.weight")
        elif "rope_freqs.weight" in checkpoint.tensors:
            yield Dense("model.rotary_emb.inv_freq", "rope_freqs.weight", _frequencies(metadata))
        yield Ignored(tuple(in_config))
        for name, info in checkpoint.tensors.items():
            if path := metadata.architecture.path(name):
                yield (
                    _weight(checkpoint, name, path, _rows(metadata, name))
                    if info.blocks
                    else Dense(path, name, _value(metadata, name))
                )


def _weight(checkpoint: Checkpoint, name: str, path: str, rows: Callable[[Tensor], Tensor]) -> Stored:
    kind = checkpoint.need(name, 2).blocks
    if kind not in TYPES:
        raise CheckpointError(
            f"{name} is of type {kind}, whose codebook qcompile does not read; it reads {', '.join(TYPES)}. "
            "Take another file of the model, such as Q4_K_M, or quantize its float original with qcompile.optimize"
        )
    spec, tensors = TYPES[kind].spec, (name,)
    factor = name.removesuffix(".weight") + ".scale"
    if kind == "NVFP4" and factor in checkpoint.tensors:
        checkpoint.need(factor, (1,), torch.float32)
        spec, tensors = replace(spec, scale_spec=QSpec.parse("fp8_e4m3/tensor/sym")), (name, factor)

    def read(tensor: Read) -> QTensor:
        weight = unpack(kind, rows(tensor(name)))
        _check_scales(name, weight)
        if len(tensors) == 1:
            return weight
        assert isinstance(weight.scale, Tensor) and spec.scale_spec
        scale = QTensor.from_codes(spec.scale_spec, weight.scale.view(torch.uint8), tensor(factor)[None], None)
        return replace(weight, spec=spec, scale=scale)

    return Stored(path, spec, model.shape(checkpoint, name), tensors, read)


def _check_scales(name: str, weight: QTensor) -> None:
    for side in (weight.scale, weight.zero):
        if isinstance(side, QTensor):
            _check_scales(name, side)
        elif side is not None:
            finite(name, side)


def _rows(metadata: Metadata, name: str) -> Callable[[Tensor], Tensor]:
    """Brings the rows of q and k from pairs, llama.cpp's order, to halves."""
    heads = {"attn_q": metadata.heads, "attn_k": metadata.kv_heads}.get(name.split(".")[-2])
    if heads is None or not metadata.architecture.permuted:
        return lambda rows: rows

    def halves(rows: Tensor) -> Tensor:
        if rows.shape[0] != heads * metadata.head_dim or metadata.head_dim % 2:
            raise CheckpointError(f"{name} has {rows.shape[0]} rows, which are not {heads} heads of pairs")
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return halves


def _value(metadata: Metadata, name: str) -> Callable[[Tensor], Tensor]:
    if metadata.architecture.offset and name.endswith("norm.weight"):
        return lambda tensor: tensor.float() - 1
    return _rows(metadata, name)


def _frequencies(metadata: Metadata) -> Callable[[Tensor], Tensor]:
    """The rotary embedding's frequencies from their divisors, of which the metadata says nothing."""
    if metadata.get("rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{metadata.name}.rope.scaling and rope_freqs.weight both scale the rotary embedding")
    return partial(_divided, metadata.rope_base)


def _divided(base: float, factors: Tensor) -> Tensor:
    factors = finite("rope_freqs.weight", factors.float())
    steps = torch.arange(0, 2 * len(factors), 2, device=factors.device).float() / (2 * len(factors))
    return 1.0 / base**steps / factors
