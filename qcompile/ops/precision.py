"""The dtype that an op computes in before it rounds once to the dtype of its input."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
