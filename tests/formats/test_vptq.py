"""VPTQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.errors import CheckpointError


def test_weights_and_logits(check_compiled: Callable) -> None:
    check_compiled("vptq-v8-k256-r16")


def stream(numbers: list[int], bits: int) -> list[int]:
    """int32 words of a stream of numbers, low bits first."""
    whole = sum(number << bits * place for place, number in enumerate(numbers))
    words = [whole >> 32 * word & 0xFFFFFFFF for word in range(-(-len(numbers) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def sixteen(numbers: Tensor, dtype: torch.dtype = torch.int16) -> Tensor:
    return torch.where(numbers < 2**15, numbers, numbers - 2**16).to(torch.int16).view(dtype)


class Layer:
    """A random layer: its tensors, its configuration, and its weight."""

    def __init__(
        self,
        rows: int = 13,
        groups: int = 2,
        size: int = 6,
        height: int = 4,
        entries: int = 20,
        rest: int = 0,
        outliers: int = 0,
        packed: bool = True,
        dtype: torch.dtype = torch.int16,
        extras: bool = True,
        perm_dtype: torch.dtype = torch.int16,
    ):
        down, columns = -(-rows // height), outliers + groups * size
        main, second = (
            torch.randint(0, entries, (groups, down, size)),
            torch.randint(0, rest or 1, (groups, down, size)),
        )
        main[0, 0, 0], second[0, 0, 0] = entries - 1, max(rest - 1, 0)
        books, seconds = torch.randn(groups, entries, height).half(), torch.randn(groups, rest, height).half()
        self.tensors = {"centroids.weight": books.flatten(1)}
        if rest:
            self.tensors["res_centroids.weight"] = seconds.flatten(1)
        bits, more = (entries - 1).bit_length(), (rest - 1).bit_length() if rest else 0
        if packed:
            merged = (second << bits | main).tolist()
            words = [[stream(row, bits + more) for row in group] for group in merged]
            self.tensors["indices"] = torch.tensor(words, dtype=torch.int32)
        else:
            self.tensors["indices"] = sixteen(main, dtype)
            if rest:
                self.tensors["res_indices"] = sixteen(second, dtype)
        weight = torch.zeros(rows, columns, dtype=torch.float64)
        for row in range(rows):
            for column in range(groups * size):
                group, vector, place = column // size, row // height, column % size
                value = books[group, main[group, vector, place], row % height].double()
                if rest:
                    value = value + seconds[group, second[group, vector, place], row % height].double()
                weight[row, outliers + column] = value
        if outliers:
            far, book = torch.randint(0, 9, (1, -(-rows // 3), outliers)), torch.randn(9, 3).half()
            self.tensors |= {"outlier_indices": sixteen(far, dtype), "outlier_centroids.weight": book.reshape(1, -1)}
            for row in range(rows):
                for column in range(outliers):
                    weight[row, column] = book[far[0, row // 3, column], row % 3]
        if extras:
            perm, scale, bias = torch.randperm(columns), torch.rand(columns).half(), torch.randn(columns).half()
            weight = weight[:, torch.argsort(perm)] * scale.double() + bias.double()
            stored = perm if perm_dtype == torch.int64 else sixteen(perm)
            self.tensors |= {"perm": stored, "weight_scale": scale, "weight_bias": bias}
        self.weight = weight
        self.said: dict[str, Any] = {
            "vector_lens": [3 if outliers else -1, height],
            "num_centroids": [9 if outliers else -1, entries],
            "num_res_centroids": [-1, rest or -1],
            "group_num": groups,
            "group_size": size,
            "outlier_size": outliers,
            "in_features": columns,
            "out_features": rows,
        }

    def written(self) -> dict[str, Tensor]:
        return {f"m.{kind}": tensor for kind, tensor in self.tensors.items()}

    def config(self, **change: Any) -> dict[str, Any]:
        return {"quant_method": "vptq", "config_for_layers": {"m": self.said | change}}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rest": 7},
        {"outliers": 5, "rest": 7},
        {"entries": 300, "rest": 256},
        {"entries": 65536, "rest": 65536, "height": 2},
        {"entries": 65536, "groups": 1, "size": 5},
        {"packed": False},
        {"packed": False, "rest": 7, "outliers": 5, "dtype": torch.float16, "entries": 40000},
        {"packed": False, "rest": 7, "perm_dtype": torch.int64, "outliers": 2},
        {"extras": False, "outliers": 1},
        {"rows": 16, "height": 8},
    ],
    ids=str,
)
def test_layout(weights_of: Callable, sizes: dict[str, Any]) -> None:
    layer = Layer(**sizes)
    got = weights_of(layer.written(), layer.config())["m.weight"].dequantize(torch.float64)
    torch.testing.assert_close(got, layer.weight, rtol=1e-12, atol=0)


def test_one_configuration_for_all(weights_of: Callable) -> None:
    layer = Layer()
    config = {"quant_method": "vptq", "config_for_layers": {}, "shared_layer_config": layer.said}
    assert torch.equal(weights_of(layer.written(), config)["m.weight"].dequantize(torch.float64), layer.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vector_lens": 4}, "m: vector_lens is 4, not two numbers"),
        ({"group_size": None}, "m: group_size is None, not a size"),
        ({"group_size": 13}, r"m.indices is \(2, 4, 2\), not \(2, 4, 3\)"),
        ({"num_centroids": [-1, 21]}, r"m.centroids.weight is \(2, 80\), not \(2, 84\)"),
        ({"num_centroids": [-1, 0]}, "has 0 centroids of 4 numbers"),
        ({"out_features": 17}, "m.indices has 4 rows of vectors; 17 outputs need 5"),
        ({"num_res_centroids": [-1, 4]}, "m.res_centroids.weight is missing"),
    ],
)
def test_configurations_that_do_not_fit(weights_of: Callable, change: dict[str, Any], says: str) -> None:
    layer = Layer(groups=2, size=12)
    with pytest.raises(CheckpointError, match=says):
        weights_of(layer.written(), layer.config(**change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"indices": torch.full((2, 4, 6), 20, dtype=torch.int16)}, "m.indices names entry 20 of 20"),
        ({"indices": torch.zeros(2, 4, 6)}, "m.indices is float32, not int16"),
        ({"indices": torch.zeros(2, 4, 5, dtype=torch.int16)}, r"m.indices is \(2, 4, 5\), not \(2, 4, 6\)"),
        ({"outlier_indices": torch.full((1, 5, 5), 9, dtype=torch.int16)}, "m.outlier_indices names entry 9 of 9"),
        (
            {"outlier_indices": torch.zeros(1, 4, 5, dtype=torch.int16)},
            r"m.outlier_indices is \(1, 4, 5\), not \(1, 5, 5\)",
        ),
        ({"perm": torch.zeros(17, dtype=torch.int16)}, "m.perm is no permutation of 17 columns"),
        ({"perm": torch.zeros(16, dtype=torch.int16)}, r"m.perm is \(16,\), not \(17,\)"),
        ({"weight_scale": torch.full((17,), torch.nan)}, "m.weight_scale holds numbers that are infinite or NaN"),
        ({"centroids.weight": torch.full((2, 80), torch.inf)}, "m.centroids.weight holds numbers"),
    ],
)
def test_tensors_that_do_not_fit(weights_of: Callable, change: dict[str, Tensor], says: str) -> None:
    layer = Layer(packed=False, outliers=5)
    layer.tensors |= change
    with pytest.raises(CheckpointError, match=says):
        weights_of(layer.written(), layer.config())


def test_no_configuration(weights_of: Callable) -> None:
    with pytest.raises(CheckpointError, match="config_for_layers says nothing of m"):
        weights_of(Layer().written(), {"quant_method": "vptq"})
