import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.quant.packing import PLANES, pack, row_bytes, unpack

WIDTHS = sorted(PLANES)


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 5), columns=st.integers(1, 400), seed=st.integers(0, 99))
def test_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    given_codes = codes(rows, columns, bits, seed)
    data = pack(given_codes, bits)
    assert data.dtype == torch.uint8
    assert data.shape == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack(data, bits, columns), given_codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 17, 128, 131])
def test_layout_is_the_documented_one(bits: int, columns: int) -> None:
    given_codes = codes(2, columns, bits)
    for row, data in zip(given_codes.tolist(), pack(given_codes, bits).tolist()):
        want, low = [], 0
        for width in PLANES[bits]:
            per_chunk = 16 * 8 // width
            for chunk in range(-(-columns // per_chunk)):
                block = [0] * 16
                for place, code in enumerate(row[chunk * per_chunk : (chunk + 1) * per_chunk]):
                    i, j = divmod(place, 16)
                    block[j] |= (code >> low & 2**width - 1) << i * width
                want += block
            low += width
        assert data == want


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [128, 256, 1536, 4096, 11008])
def test_a_code_costs_exactly_its_bits(bits: int, columns: int) -> None:
    assert row_bytes(columns, bits) * 8 == columns * bits


@pytest.mark.parametrize(
    ("columns", "bits", "want"),
    # Each plane ends with a whole chunk of 16 bytes: 128 codes of 1 bit, 64 of 2, 32 of 4, 16 of 8.
    [(576, 1, 80), (576, 2, 144), (576, 3, 224), (576, 4, 288), (576, 5, 368), (576, 6, 432), (576, 7, 512)]
    + [(576, 8, 576), (1, 1, 16), (1, 3, 32), (1, 7, 48), (2880, 3, 720 + 368), (960, 3, 240 + 128)],
)
def test_padding(columns: int, bits: int, want: int) -> None:
    assert row_bytes(columns, bits) == want


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_independent(bits: int) -> None:
    first, second = codes(3, 75, bits, 1), codes(2, 75, bits, 2)
    assert torch.equal(pack(torch.cat([first, second]), bits), torch.cat([pack(first, bits), pack(second, bits)]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_codes_and_data(bits: int) -> None:
    given_codes = codes(70, 6, bits).t()
    data = pack(given_codes, bits)
    wide = torch.cat([data, data], dim=1)
    assert torch.equal(unpack(wide[:, : data.shape[1]], bits, 70), given_codes)
