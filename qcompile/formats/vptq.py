"""VPTQ: columns of vectors that run along the outputs, entries of a codebook, with a second one for what is left over.

    centroids.weight            float (G, entries * v): G groups of columns have codebooks of their own
    res_centroids.weight        alike, or absent
    indices                     int32 (G, out/v, words): a stream of bits along the columns of a group, the first index
                                low, the second above it; or 16 bits an index (G, out/v, in/G), with res_indices
    outlier_centroids.weight    float (1, entries * w)
    outlier_indices             16 bits an index (1, out/w, outliers): for columns before all others
    perm                        (in,): stored column j is column perm[j]
    weight_scale, weight_bias   float (in,), by column

Sizes are in the configuration, by module. 16-bit indices have no sign, and may be viewed as float16.

https://github.com/microsoft/VPTQ (vptq/layers/vqlinear.py, vptq/ops/quant_gemm.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Read, Stored, finite
from qcompile.quant.codebook import CodebookTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SIXTEEN_BITS = (torch.int16, torch.uint16, torch.float16)


class Vptq:
    name = "vptq"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == "vptq"

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for module in checkpoint.modules("indices"):
            yield _Layer(checkpoint, module).stored()


class _Layer:
    """One module: its sizes, checked against its tensors."""

    def __init__(self, checkpoint: Checkpoint, module: str):
        self.checkpoint, self.module = checkpoint, module
        said = checkpoint.quantization
        by_module = said.get("config_for_layers")
        found = by_module.get(module) if isinstance(by_module, dict) else None
        said = found or said.get("shared_layer_config")
        if not isinstance(said, dict):
            raise CheckpointError(f"quantization_config: config_for_layers says nothing of {module}")
        self.said: dict[str, Any] = said
        self.outlier_height, self.height = self._pair("vector_lens")
        if 0 in (self.outlier_height, self.height):
            raise CheckpointError(f"quantization_config: {self.module}: vector_lens has 0, vectors without numbers")
        self.outlier_entries, self.entries = self._pair("num_centroids")
        self.rest_entries = self._pair("num_res_centroids")[1]
        self.size = self._number("group_size")
        self.groups, self.down, _ = checkpoint.need(self.name("indices"), 3).shape
        self.rows = self._number("out_features") if "out_features" in self.said else self.down * self.height
        self.outliers = 0
        if self.has("outlier_indices"):
            shape = checkpoint.need(self.name("outlier_indices"), 3, SIXTEEN_BITS).shape
            self.outliers = shape[2]
            checkpoint.need(self.name("outlier_indices"), (1, -(-self.rows // self.outlier_height), self.outliers))
        self.columns = self.outliers + self.groups * self.size

    def stored(self) -> Stored:
        need, rows = self.checkpoint.need, -(-self.rows // self.height)
        if self.down != rows:
            raise CheckpointError(
                f"{self.name('indices')} has {self.down} rows of vectors; {self.rows} outputs need {rows}"
            )
        self._book("centroids", self.groups, self.entries, self.height)
        if self.rest_entries > 0:
            self._book("res_centroids", self.groups, self.rest_entries, self.height)
        if self.outliers:
            self._book("outlier_centroids", 1, self.outlier_entries, self.outlier_height)
        for kind in ("indices", "res_indices"):
            if kind == "indices" and self.is_packed:
                words = -(-self.size * sum(self.bits) // 32)
                need(self.name(kind), (self.groups, self.down, words), torch.int32)
            elif kind == "indices" or (self.rest_entries > 0 and not self.is_packed):
                need(self.name(kind), (self.groups, self.down, self.size), SIXTEEN_BITS)
        for kind, dtypes in (
            ("perm", (torch.int16, torch.uint16, torch.int64)),
            ("weight_scale", FLOATS),
            ("weight_bias", FLOATS),
        ):
            if self.has(kind) or self.said.get("enable_perm" if kind == "perm" else "enable_norm") is True:
                need(self.name(kind), (self.columns,), dtypes)
        shape = (self.rows, self.columns)
        entries = f"{self.entries}+{self.rest_entries}" if self.rest_entries > 0 else str(self.entries)
        outliers = f"/outliers({self.outlier_height}x1/{self.outlier_entries})" if self.outliers else ""
        spec = f"codebook/{self.height}x1/{entries}{outliers}"
        return Stored(f"{self.module}.weight", spec, shape, self._tensors(), self._read)

    def _read(self, tensor: Read) -> CodebookTensor:
        def book(kind: str, groups: int, entries: int, height: int) -> Tensor:
            name = self.name(f"{kind}.weight")
            return finite(name, tensor(name)).reshape(groups, entries, height, 1)

        def row(kind: str) -> Tensor | None:
            return finite(name, tensor(name)).reshape(1, -1) if self.has(kind) and (name := self.name(kind)) else None

        indices, books = [], [book("centroids", self.groups, self.entries, self.height)]
        if self.rest_entries > 0:
            books.append(book("res_centroids", self.groups, self.rest_entries, self.height))
        if self.is_packed:
            both = _stream(tensor(self.name("indices")), sum(self.bits), self.size)
            indices = [both & (2 ** self.bits[0] - 1), both >> self.bits[0]][: len(books)]
        else:
            indices = [_unsigned(tensor(self.name(kind))) for kind in ("indices", "res_indices")[: len(books)]]
        codes = [
            self._codes("indices", numbers.transpose(0, 1).flatten(1), entries)
            for numbers, entries in zip(indices, (self.entries, self.rest_entries))
        ]
        outlier_codes = outlier_book = None
        if self.outliers:
            numbers = _unsigned(tensor(self.name("outlier_indices")))[0]
            outlier_codes = self._codes("outlier_indices", numbers, self.outlier_entries)
            outlier_book = book("outlier_centroids", 1, self.outlier_entries, self.outlier_height)
        return CodebookTensor(
            (self.rows, self.columns),
            tuple(codes),
            tuple(books),
            outlier_codes,
            outlier_book,
            row("weight_scale"),
            row("weight_bias"),
            self._order(tensor) if self.has("perm") else None,
        )

    def _codes(self, kind: str, numbers: Tensor, entries: int) -> Tensor:
        if numbers.numel() and int(numbers.max()) >= entries:
            raise CheckpointError(f"{self.name(kind)} names entry {int(numbers.max())} of {entries}")
        return numbers.to(torch.uint8 if entries <= 256 else torch.int16).contiguous()

    def _order(self, tensor: Read) -> Tensor:
        stored = tensor(self.name("perm"))
        order = stored if stored.dtype == torch.int64 else _unsigned(stored)
        if not torch.equal(order.sort().values, torch.arange(self.columns, device=order.device)):
            raise CheckpointError(f"{self.name('perm')} is no permutation of {self.columns} columns")
        return order

    def _book(self, kind: str, groups: int, entries: int, height: int) -> None:
        if entries < 1 or height < 1:
            raise CheckpointError(f"quantization_config: {self.module} has {entries} {kind} of {height} numbers")
        self.checkpoint.need(self.name(f"{kind}.weight"), (groups, entries * height), FLOATS)

    def _tensors(self) -> tuple[str, ...]:
        kinds = ("indices", "res_indices", "outlier_indices", "perm", "weight_scale", "weight_bias")
        kinds += tuple(f"{kind}.weight" for kind in ("centroids", "res_centroids", "outlier_centroids"))
        return tuple(self.name(kind) for kind in kinds if self.has(kind))

    @property
    def is_packed(self) -> bool:
        return self.checkpoint.need(self.name("indices")).dtype == torch.int32

    @property
    def bits(self) -> tuple[int, int]:
        """Those of a packed index and of the second one above it."""
        return (self.entries - 1).bit_length(), max(self.rest_entries - 1, 0).bit_length()

    def name(self, kind: str) -> str:
        return f"{self.module}.{kind}"

    def has(self, kind: str) -> bool:
        return self.name(kind) in self.checkpoint.tensors

    def _pair(self, key: str) -> tuple[int, int]:
        found: Any = self.said.get(key)
        if not isinstance(found, list) or len(found) != 2 or not all(type(number) is int for number in found):
            raise CheckpointError(f"quantization_config: {self.module}: {key} is {str(found)[:80]}, not two numbers")
        return found[0], found[1]

    def _number(self, key: str) -> int:
        found: Any = self.said.get(key)
        if type(found) is not int or found < 1:
            raise CheckpointError(f"quantization_config: {self.module}: {key} is {str(found)[:80]}, not a size")
        return found


def _unsigned(numbers: Tensor) -> Tensor:
    """16 bits of any dtype as int64 without a sign."""
    return numbers.view(torch.int16).to(torch.int64) & 0xFFFF


def _stream(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` numbers of up to 32 bits out of a stream along the last dimension, low bits first, as int64."""
    start = torch.arange(count, device=words.device) * bits
    words = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    word, shift = start // 32, start % 32
    return (words[..., word] >> shift | words[..., word + 1] << (32 - shift)) & (2**bits - 1)
