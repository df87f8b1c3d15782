"""Ways to choose the codes and scales of a weight: `(weight, spec) -> QTensor`, nothing about models or files."""

from collections.abc import Callable

from torch import Tensor

from qcompile.algorithms import hqq, rtn
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

ALGORITHMS: dict[str, Callable[[Tensor, QSpec], QTensor]] = {"hqq": hqq.quantize, "rtn": rtn.quantize}


def choose(spec: QSpec) -> str:
    """The algorithm for a spec if the user names none: HQQ where it can, else round to nearest."""
    return "rtn" if hqq.refuses(spec) else "hqq"


def quantize(weight: Tensor, spec: QSpec, algorithm: str | None = None) -> QTensor:
    """`weight` (…, columns) in codes of `spec`, by a key of ALGORITHMS or by `choose(spec)`.

    Raises WeightError for NaN, inf or no values, SpecError where the spec does not fit the weight or the algorithm.
    """
    return ALGORITHMS[algorithm or choose(spec)](weight, spec)
