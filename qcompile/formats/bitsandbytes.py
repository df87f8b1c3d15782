"""bitsandbytes: 4-bit floats in flat blocks, and LLM.int8.

    4 bits   W           bytes (any dtype) of the flat weight, the first code of a byte in its high half
             W.absmax    float32 (blocks,), or uint8 codes of a second quantization with
                         W.nested_absmax float32 (blocks / nested_blocksize,) and W.nested_quant_map float32 (256,)
             W.quant_map float32 (16,): the table, which the kernels do not read
             W.quant_state.bitsandbytes__nf4 or __fp4   uint8, JSON: shape, quant_type, blocksize, nested_*
    8 bits   P.weight int8 (out, in), P.SCB float32 (out,): absmax of a row, P.weight_format uint8 (): 0 for rows

Blocks run on over the ends of rows. https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py,
nn/modules.py)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields
from qcompile.formats.stored import Read, Rounding, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

STATE = ".quant_state.bitsandbytes__"
ELEMENTS = {"nf4": "nf4", "fp4": "fp4_bnb"}


class BitsAndBytes:
    name = "bitsandbytes"

    def claims(self, checkpoint: Checkpoint) -> bool:
        says = checkpoint.quantization
        named = says.get("quant_method") == self.name or says.get("load_in_4bit") or says.get("load_in_8bit")
        return bool(named) or any(STATE in name or name.endswith(".SCB") for name in checkpoint.tensors)

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for name in checkpoint.tensors:
            if STATE in name:
                yield _four_bits(checkpoint, *name.split(STATE, 1))
        for module in checkpoint.modules("SCB"):
            yield _int8(checkpoint, module)


def _four_bits(checkpoint: Checkpoint, path: str, kind: str) -> Stored:
    name = f"{path}{STATE}{kind}"
    if kind not in ELEMENTS:
        raise CheckpointError(f"{name}: unknown quantization {kind!r}; known: {', '.join(ELEMENTS)}")
    state = _state(checkpoint, name)
    shape, block = _counts(name, state, "shape"), _counts(name, state, "blocksize")[0]
    if state.get("quant_type", kind) != kind:
        raise CheckpointError(f"{name}: the text says quant_type {state['quant_type']!r}, the name {kind!r}")
    numel = math.prod(shape)
    info = checkpoint.need(path)
    # Wider storage dtypes round the bytes up to whole words.
    if not 0 <= info.nbytes - -(-numel // 2) < info.dtype.itemsize:
        raise CheckpointError(f"{path} has {info.nbytes} bytes; {shape} in 4 bits needs {-(-numel // 2)}")
    blocks = -(-numel // block)
    absmax = checkpoint.need(f"{path}.absmax", (blocks,), {torch.float32, torch.uint8})
    if absmax.dtype == torch.uint8:
        nested = _counts(name, state, "nested_blocksize")[0]
        checkpoint.need(f"{path}.nested_absmax", (-(-blocks // nested),), torch.float32)
        checkpoint.need(f"{path}.nested_quant_map", (256,), torch.float32)
        if not isinstance(state.get("nested_offset"), (int, float)):
            raise CheckpointError(f"{name}: nested_offset is {state.get('nested_offset')!r}, not a number")
    elif f"{path}.nested_absmax" in checkpoint.tensors:
        raise CheckpointError(f"{path}.absmax is float32, and {path}.nested_absmax belongs to codes")
    # Where the last block is cut off, smaller groups share their block's scale.
    size = math.gcd(block, numel)
    spec = QSpec(Element.parse(ELEMENTS[kind]), PerGroup(size), Zero.NONE)

    def read(tensor: Read) -> QTensor:
        flat = tensor(path).contiguous().view(-1).view(torch.uint8)
        columns = shape[-1]

        def codes(start: int, stop: int) -> Tensor:
            first, last = start * columns, stop * columns
            pairs = fields(flat[first // 2 : -(-last // 2)], 4, (1, 0))
            return pairs[first % 2 : first % 2 + last - first].reshape(-1, columns)

        absmax = _absmax(tensor, path, state)
        scale = absmax[torch.arange(numel // size, device=absmax.device) // (block // size)]
        return QTensor.from_rows(spec, shape, codes, scale.reshape(spec.scale_shape(numel // columns, columns)))

    tensors = (path, *(name for name in checkpoint.tensors if name.startswith(f"{path}.")))
    return Stored(path, spec, shape, tensors, read)


def _absmax(tensor: Read, path: str, state: dict[str, Any]) -> Tensor:
    """The largest magnitude of each block; a doubly quantized one in the arithmetic of bitsandbytes, bit by bit."""
    absmax = tensor(f"{path}.absmax")
    if absmax.dtype == torch.uint8:
        table, outer = tensor(f"{path}.nested_quant_map"), tensor(f"{path}.nested_absmax")
        outer = outer[torch.arange(len(absmax), device=absmax.device) // _counts(path, state, "nested_blocksize")[0]]
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
        absmax = table[absmax.int()] * outer + offset
    return finite(f"{path}.absmax", absmax)


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    checkpoint.need(name, 1, torch.uint8)
    try:
        state = json.loads(bytes(checkpoint.read(name).tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name} holds a {type(state).__name__}, not an object")
    return state


def _counts(name: str, state: dict[str, Any], key: str) -> tuple[int, ...]:
    value = state.get(key)
    counts: tuple[Any, ...] = tuple(value) if isinstance(value, list) else (value,)
    if not counts or not all(type(count) is int and 0 < count < 2**40 for count in counts):
        raise CheckpointError(f"{name}: {key} is {str(value)[:80]}, not a count or a list of counts")
    return counts


def _int8(checkpoint: Checkpoint, module: str) -> Stored:
    weight, scb, layout = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    rows, columns = checkpoint.need(weight, 2, torch.int8).shape
    checkpoint.need(scb, (rows,), torch.float32)
    tensors = [weight, scb]
    if layout in checkpoint.tensors:
        tensors.append(layout)
        if checkpoint.read(layout).ne(0).any():
            raise CheckpointError(
                f"{layout} is not 0: this weight lies in the tiles of an old GPU kernel, not in rows; "
                "load it with the bitsandbytes that wrote it and save it again"
            )
    threshold = checkpoint.quantization.get("llm_int8_threshold", 6.0)
    if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
        raise CheckpointError(f"llm_int8_threshold is {threshold!r}, not a magnitude")
    spec = QSpec.parse("i8/row/sym")

    def read(tensor: Read) -> QTensor:
        packed = tensor(weight)

        def codes(start: int, stop: int) -> Tensor:
            return packed[start:stop].view(torch.uint8) ^ 0x80

        scale = finite(scb, tensor(scb)).reshape(-1, 1) * (1 / 127)
        return QTensor.from_rows(spec, (rows, columns), codes, scale)

    rounding = f"i8/token/dynamic/outliers({float(threshold)})" if threshold else "i8/token/dynamic"
    return Stored(weight, spec, (rows, columns), tuple(tensors), read, Rounding(rounding))
