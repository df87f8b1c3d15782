import torch

from qcompile.ops.codebook import dequantize_codebook
from qcompile.quant.codebook import CodebookTensor


def test_dequantize_codebook() -> None:
    weight = CodebookTensor(
        (7, 11),
        (torch.randint(0, 300, (3, 8)).to(torch.int16), torch.randint(0, 4, (3, 8), dtype=torch.uint8)),
        (torch.randn(2, 300, 3, 1), torch.randn(1, 4, 3, 1)),
        torch.randint(0, 5, (4, 3), dtype=torch.uint8),
        torch.randn(1, 5, 2, 1),
        torch.rand(1, 11),
        torch.randn(1, 11),
        torch.randperm(11),
    )
    sides = weight.outlier_codes, weight.outlier_book, weight.scale, weight.shift, weight.order
    args = list(weight.codes), list(weight.books), *sides, weight.spec, [7, 11], torch.float16
    torch.library.opcheck(dequantize_codebook.overload, args)
    assert torch.equal(dequantize_codebook(*args), weight.dequantize(torch.float16))
    compiled = torch.compile(lambda: dequantize_codebook.meaning(*args))
    torch.testing.assert_close(compiled(), weight.dequantize(torch.float16), rtol=2**-10, atol=1e-6)
