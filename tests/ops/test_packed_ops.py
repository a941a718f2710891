"""``packed_matmul`` and ``repack``: what they compute, element by element, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from lowering import ops

LOW = torch.ops.lowering


def operands(bits: int, dtype=torch.bfloat16, scale=torch.float16):
    a = torch.randn(2, 3, 64).to(dtype)
    codes = torch.randint(0, 256, (5, 64 * bits // 8), dtype=torch.uint8)
    zero = torch.randint(0, 1 << bits, (5, 2), dtype=torch.uint8)
    return a, codes, torch.randn(5, 2).to(scale), zero, torch.randn(5).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_each_weight_is_what_its_code_says(bits: int, zeros: bool) -> None:
    _, codes, scale, zero, _ = operands(bits)
    weight = ops.unpacked_weight(codes, scale, zero if zeros else None, bits)
    for n in range(5):
        for k in range(64):
            byte = codes[n, k * bits // 8].item()
            code = byte >> (k % (8 // bits) * bits) & ((1 << bits) - 1)
            least = zero[n, k // 32].item() if zeros else 1 << (bits - 1)
            # An integer of 9 bits times a scale of 11 is exact in float64: one rounding.
            assert weight[n, k] == torch.tensor((code - least) * scale[n, k // 32].item()).half()


def test_the_weight_is_rounded_to_the_activation_and_the_sum_once() -> None:
    a, codes, scale, zero, bias = operands(4)
    weight = ops.unpacked_weight(codes, scale, zero, 4).to(torch.bfloat16).double()
    found = LOW.packed_matmul(a, codes, scale, zero, bias).double()
    exact = a.double() @ weight.t() + bias.double()
    magnitude = a.double().abs() @ weight.abs().t() + bias.double().abs()
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 66 * 2**-24 * magnitude).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_repack(bits: int, axis: int, transposed: bool, monkeypatch) -> None:
    """Words along either axis, in any order, more than are taken; in pieces as at once."""
    count = 32 // bits
    order = torch.randperm(count, generator=torch.Generator().manual_seed(bits)).tolist()
    words = torch.randint(-(2**31), 2**31 - 1, (6, 8), dtype=torch.int64).to(torch.int32)
    size = words.shape[axis] * count - 2
    columns = torch.randperm(size if axis != int(transposed) else words.shape[1 - axis])
    codes = torch.stack([(words.long() >> (bits * place)) & ((1 << bits) - 1) for place in order], axis + 1)
    codes = codes.flatten(axis, axis + 1).narrow(axis, 0, size)
    codes = (codes.t() if transposed else codes)[:, columns]
    for piece in (1, 4 << 20):
        monkeypatch.setitem(ops.unpacked_weight.__globals__, "_PIECE", piece)
        found = LOW.repack(words, bits, axis, order, size, columns, transposed=transposed, to_bits=bits)
        unpacked = found if bits == 8 else torch.stack([found & 15, found >> 4], -1).flatten(1)
        assert torch.equal(unpacked.long(), codes)
        more = LOW.repack(words, bits, axis, order, size, transposed=transposed, above=1, to_bits=8)
        assert torch.equal(more[:, columns].long(), (codes + 1) % 256)


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (LOW.packed_matmul, operands(4), {}),
        (LOW.packed_matmul, (operands(8)[0].transpose(0, 1), *operands(8)[1:3]), {"bits": 8}),
        (LOW.repack, (torch.ones(4, 6, dtype=torch.int32), 4, 1, list(range(8)), 42), {}),
        (
            LOW.repack,
            (torch.ones(4, 6, dtype=torch.int32), 8, 0, [3, 1, 0, 2], 14, torch.arange(6)),
            {"to_bits": 8, "above": 1},
        ),
    ],
)
def test_fake_kernels_agree(op, args, kwargs) -> None:
    opcheck(op.default, args, kwargs, test_utils=["test_schema", "test_faketensor"])


A, CODES, SCALE, ZERO, BIAS = operands(4)
WORDS = torch.ones(4, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LOW.packed_matmul(A.double(), CODES, SCALE), "a: expected .*, got float64"),
        (lambda: LOW.packed_matmul(A, CODES.char(), SCALE), "codes: expected uint8, got int8"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE, bits=8), r"codes: expected bytes \[N, 64 \* 8 / 8\]"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE, bits=2), "bits: 2 is not available"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE.int()), "scale: expected .*, got int32"),
        (
            lambda: LOW.packed_matmul(A, CODES, SCALE[:4]),
            r"scale: expected shape \[5, groups\], got \[4, 2\]",
        ),
        (lambda: LOW.packed_matmul(A, CODES, torch.ones(5, 3)), "scale: 3 groups do not divide .*, 64"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE, ZERO.int()), "zero: expected uint8, got int32"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE, ZERO[:, :1]), r"zero: expected shape \[5, 2\]"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE, None, BIAS.float()), "bias: expected bfloat16"),
        (lambda: LOW.packed_matmul(A, CODES, SCALE, None, BIAS[:4]), r"bias: expected shape \[5\]"),
        (lambda: LOW.repack(WORDS.long(), 4, 1, list(range(8)), 48), "words: expected int32"),
        (lambda: LOW.repack(WORDS, 4, 1, list(range(7)), 48), "order: expected the places 0 to 7"),
        (lambda: LOW.repack(WORDS, 4, 1, list(range(8)), 40), "size: 40 codes do not fill 6 words of 8"),
        (lambda: LOW.repack(WORDS, 4, 1, list(range(8)), 47), "rows of 47 codes of 4 bits are no whole"),
        (
            lambda: LOW.repack(WORDS, 4, 1, list(range(8)), 48, torch.arange(6)),
            r"columns: expected shape \[48\], got \[6\]",
        ),
    ],
)
def test_errors_name_the_argument(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
