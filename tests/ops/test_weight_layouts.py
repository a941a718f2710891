"""The layouts of weights as operations: each against its formula, element by element, and back."""

from __future__ import annotations

import sys

import pytest
import torch

from lowering.ops import block_scaled_matmul_reference
from lowering.ops.shuffle_weight import shuffle_weight_reference, unshuffle_weight_reference

LOW = torch.ops.lowering

# The module: the package has a function of that name.
PIECES = sys.modules["lowering.ops.shuffle_weight"]


def weight(rows: int, depth: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Every code, so that a byte in the wrong place shows."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 256, (rows, depth), generator=generator, dtype=torch.uint8).view(dtype)


def offset(layout: str, n: torch.Tensor, k: torch.Tensor, depth: int) -> torch.Tensor:
    """Where element (n, k) lies: the index formulas as they are written down for the kernels."""
    if layout == "shuffled_16x16":
        return (n // 16) * 16 * depth + (k // 16) * 256 + (n % 16) * 16 + k % 16
    if layout == "swizzled_128":
        tile = (n // 128) * 128 * depth + (k // 128) * 16384
        return tile + (n % 128) * 128 + (((k % 128) // 16) ^ (n % 8)) * 16 + k % 16
    return n * depth + k


@pytest.mark.parametrize(
    ("layout", "rows", "depth", "stored"),
    [
        ("row", 5, 96, 5),
        ("shuffled_16x16", 16, 32, 16),
        ("shuffled_16x16", 48, 160, 48),
        ("shuffled_16x16", 200, 96, 208),
        ("swizzled_128", 128, 128, 128),
        ("swizzled_128", 384, 256, 384),
        ("swizzled_128", 130, 384, 256),
        ("swizzled_128", 0, 128, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8], ids=str)
def test_each_element_lies_where_the_formula_says(
    layout: str, rows: int, depth: int, stored: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PIECES, "_PIECE", 128 * depth)  # several pieces of one weight
    w = weight(rows, depth, dtype)
    shuffled = LOW.shuffle_weight(w, layout)
    assert shuffled.shape == (stored, depth) and shuffled.dtype == dtype and shuffled.is_contiguous()
    places = offset(layout, torch.arange(rows)[:, None], torch.arange(depth)[None, :], depth)
    data = shuffled.view(torch.uint8).flatten()
    assert torch.equal(data[places], w.view(torch.uint8))
    rest = torch.ones(stored * depth, dtype=torch.bool)
    rest[places.flatten()] = False
    assert rest.sum() == (stored - rows) * depth and not data[rest].any()
    back = LOW.unshuffle_weight(shuffled, layout)
    assert torch.equal(back[:rows].view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("layout", ["shuffled_16x16", "swizzled_128"])
def test_the_operation_in_pieces_is_the_reference(layout, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(300, 256)
    whole = shuffle_weight_reference(w, layout)
    monkeypatch.setattr(PIECES, "_PIECE", 1)
    assert torch.equal(LOW.shuffle_weight(w, layout).view(torch.uint8), whole.view(torch.uint8))
    back = unshuffle_weight_reference(whole, layout)
    assert torch.equal(LOW.unshuffle_weight(whole, layout).view(torch.uint8), back.view(torch.uint8))


def test_a_view_of_a_wider_weight_is_shuffled_as_it_reads() -> None:
    wide = weight(64, 192)
    part = wide[16:48, 64:160]
    expected = LOW.shuffle_weight(part.contiguous(), "shuffled_16x16")
    assert torch.equal(
        LOW.shuffle_weight(part, "shuffled_16x16").view(torch.uint8), expected.view(torch.uint8)
    )


@pytest.mark.parametrize("op", [LOW.shuffle_weight, LOW.unshuffle_weight], ids=str)
@pytest.mark.parametrize("layout", ["row", "shuffled_16x16", "swizzled_128"])
def test_operations_follow_torch_s_rules(op, layout: str) -> None:
    torch.library.opcheck(op, (weight(128, 128).view(torch.int8), layout))


@pytest.mark.parametrize("layout", ["shuffled_16x16", "swizzled_128"])
def test_a_product_of_a_shuffled_weight_is_that_of_the_weight(layout: str) -> None:
    a, a_scale = LOW.group_quant(torch.randn(2, 3, 256), 128)
    b = torch.randn(128, 256).to(torch.float8_e4m3fn)
    b_scale, bias = torch.rand(1, 2), torch.randn(128).bfloat16()
    expected = LOW.block_scaled_matmul(a, b, a_scale, b_scale, torch.bfloat16, bias=bias)
    shuffled = LOW.shuffle_weight(b, layout)
    found = LOW.block_scaled_matmul(a, shuffled, a_scale, b_scale, torch.bfloat16, bias=bias, b_layout=layout)
    assert torch.equal(found, expected)
    assert not torch.equal(
        LOW.block_scaled_matmul(a, shuffled, a_scale, b_scale, torch.bfloat16, bias), expected
    )


def test_the_bias_is_added_before_the_one_rounding() -> None:
    """257 + 0.5 is 258 in bfloat16; 257 alone would be 256, and 256.5 is 256 again."""
    one = torch.ones(1, 32).to(torch.float8_e4m3fn)
    a_scale, b_scale, bias = torch.full((1, 1), 257 / 32), torch.ones(1, 1), torch.tensor([0.5]).bfloat16()
    found = LOW.block_scaled_matmul(one, one, a_scale, b_scale, torch.bfloat16, bias=bias)
    assert found.item() == 258
    assert (LOW.block_scaled_matmul(one, one, a_scale, b_scale, torch.bfloat16) + bias).item() == 256
    assert torch.equal(block_scaled_matmul_reference(one, one, a_scale, b_scale, torch.bfloat16, bias), found)


W = weight(64, 64)
Q, S, BS = torch.zeros(2, 64).to(torch.float8_e4m3fn), torch.ones(2, 1), torch.ones(1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LOW.shuffle_weight(W, "shuffled_32x16"),
            "layout: 'shuffled_32x16' is not available; choose",
        ),
        (lambda: LOW.shuffle_weight(W.float(), "row"), "w: expected .*, got float32"),
        (lambda: LOW.shuffle_weight(W[0], "row"), r"w: expected a weight \[N, K\], got \[64\]"),
        (
            lambda: LOW.shuffle_weight(W, "swizzled_128"),
            r"w: layout 'swizzled_128' has rows of a multiple of 128, and this is \[64, 64\]",
        ),
        (
            lambda: LOW.unshuffle_weight(W[:20], "shuffled_16x16"),
            r"stored: layout 'shuffled_16x16' has a multiple of 16 rows, and this is \[20, 64\]",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q, W[:20], S, BS, torch.float32, b_layout="shuffled_16x16"),
            r"b: layout 'shuffled_16x16' has a multiple of 16 rows, and this is \[20, 64\]",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q, W, S, BS, torch.float32, b_layout="16x16"),
            "b_layout: '16x16' is",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q, W, S, BS, torch.float32, torch.ones(64).half()),
            "bias: expected float32, got float16",
        ),
        (
            lambda: LOW.block_scaled_matmul(Q, W, S, BS, torch.float32, torch.ones(63)),
            r"bias: expected shape \[64\], got \[63\]",
        ),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
