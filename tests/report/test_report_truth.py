"""What the report says beyond kernels: split chains, and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering

FP8 = torch.float8_e4m3fn
SPELLING = Callable[..., Any]

# -- chains that are two kernels -------------------------------------------------------------------------


class Split(nn.Module):
    """A norm or activation, something else, and a quantization."""

    def __init__(self, between: SPELLING):
        super().__init__()
        self.between = between
        self.weight = nn.Parameter(torch.rand(256) + 0.5, requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        normed = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        return torch.ops.lowering.group_quant(self.between(normed, y), 128)


SPLITS: dict[str, tuple[SPELLING, str, str]] = {
    "the gate of one": (lambda n, y: F.silu(n) * y, "rms_norm", "multiplies what it normalises with"),
    "a product": (lambda n, y: n * y, "group_quant", "between them is aten.mul.Tensor"),
    "a sigmoid": (lambda n, y: n * torch.sigmoid(y), "group_quant", "between them is aten.mul.Tensor"),
    "a number": (lambda n, y: (n * 2.0).relu(), "group_quant", "between them is aten.mul.Scalar"),
    "a longer row": (lambda n, y: F.pad(n, (0, 128)), "group_quant", "between them is aten.constant_pad_nd"),
    "a gate and a longer row": (
        lambda n, y: F.pad(F.silu(y) * y, (0, 128)),
        "group_quant",
        "between them is aten.constant_pad_nd",
    ),
    "an activation": (lambda n, y: F.gelu(y), "group_quant", "activates the one factor of a product"),
}


def test_a_norm_or_gate_that_is_split_from_its_quantization_says_so() -> None:
    for between, op, reason in SPLITS.values():
        sites = lowering.explain(Split(between), (torch.randn(4, 256), torch.randn(4, 256))).sites
        (split,) = [site for site in sites if not site.fused]
        assert split.op == op and reason in (split.reason or ""), split


def test_a_residual_stream_splits_nothing() -> None:
    sites = lowering.explain(Split(lambda n, y: n + y), (torch.randn(4, 256), torch.randn(4, 256))).sites
    assert [site.op for site in sites if site.fused] == ["rms_norm", "group_quant"]


# -- weights -----------------------------------------------------------------------------------------------


class Dequantized(nn.Module):
    """A linear layer whose weight is codes times scales; attention, whose products have none."""

    codes: Tensor
    scales: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(256, 256).to(FP8))
        self.register_buffer("scales", torch.rand(2, 2) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.codes.float().view(2, 128, 2, 128) * self.scales[:, None, :, None]
        y = F.linear(x, blocks.view(256, 256).bfloat16())
        return torch.softmax(y @ x.T, -1) @ x


def test_a_dequantized_weight_is_remarked() -> None:
    report = lowering.explain(Dequantized(), (torch.randn(4, 256).bfloat16(),))
    (remark,) = report.remarks
    assert report.sites == () and remark.op == "linear"
    assert "its weight 'codes' is float8_e4m3fn and is dequantized" in remark.text


class Loaded(nn.Module):
    """A model that transformers has loaded from a quantized checkpoint, without a kernel for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.inner.is_quantized = False  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_checkpoint_that_was_dequantized_when_it_was_loaded_is_remarked() -> None:
    (remark,) = lowering.explain(Loaded(), (torch.randn(2, 8),)).remarks
    assert (
        remark.op == "checkpoint" and "inner (Linear) was loaded from a quantized checkpoint" in remark.text
    )
    assert lowering.explain(nn.Linear(8, 8), (torch.randn(2, 8),)).remarks == ()


class Scaled(nn.Module):
    def __init__(self, scale: float, code: float = 0.0):
        super().__init__()
        weight, scales = torch.randn(256, 256), torch.full((2, 2), 0.5)
        weight[128:], scales[1] = code, scale
        self.register_buffer("codes", weight.to(FP8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        q, s = torch.ops.lowering.group_quant(x, 128)
        return torch.ops.lowering.block_scaled_matmul(q, self.codes, s, self.scales, torch.bfloat16)


def test_a_block_of_zeros_may_have_a_scale_of_zero() -> None:
    module, x = Scaled(0.0), torch.randn(3, 256).bfloat16()
    got = lowering.load(lowering.compile(module, (x,)).vmfb)(x)
    assert not got[:, 128:].any() and got[:, :128].any()
    torch.testing.assert_close(got, module(x), rtol=2**-8, atol=0.0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Scaled(-1.0),
            r"'scales' of a product's weight is -1.0 at \[1, 0\]; 2 of its 4 elements",
        ),
        (Scaled(float("nan")), r"is nan at \[1, 0\]"),
        (Scaled(0.0, float("nan")), "has zeros, and the codes 'codes' hold NaN"),
    ],
    ids=["negative", "nan", "nan times zero"],
)
def test_a_scale_that_makes_no_numbers_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(lowering.CompileError, match=message):
        lowering.compile(module, (torch.randn(3, 256).bfloat16(),))
