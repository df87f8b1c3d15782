"""gguf: llama.cpp's own files; every type of blocks; every architecture that is read."""

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "name",
    [
        *("gguf-f16", "gguf-q4_0", "gguf-q5_0", "gguf-q8_0", "gguf-iq4_nl", "gguf-q2_k", "gguf-q4_k", "gguf-q5_k"),
        "gguf-mix-q4_k_m",
    ],
)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name)
