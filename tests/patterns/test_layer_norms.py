"""LayerNorm, by name and written out: what it is raised to, what is in its kernel, eager's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering
from patterns.contracts import Norm, Quantization
from tests.raised import Function, contracts, sites

ops = torch.ops.lowering
HIDDEN, EPS = 256, 1e-5
WRITTEN = Norm(EPS, statistic="variance")


class Affine(Function):
    """A function of a weight, a bias and other tensors."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        self.bias = nn.Parameter(torch.randn(HIDDEN).bfloat16(), requires_grad=False)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self.weight, self.bias, *args)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def cohere(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Deviations taken twice, as Hugging Face's CohereLayerNorm has them."""
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((h - mean) * torch.rsqrt(variance + EPS))).to(x.dtype)


def of_variance(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    h = x.float()
    return centred(h) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + EPS)


def twice(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    d = centred(x.float())
    return w * (d * torch.rsqrt((d * d).mean(-1, keepdim=True) + EPS)).to(x.dtype) + b


SPELLINGS: dict[str, tuple[Callable[..., Tensor], Norm]] = {
    "torch's": (
        lambda w, b, x: F.layer_norm(x, (HIDDEN,), w, b, EPS),
        Norm(EPS, statistic="variance", bias="once"),
    ),
    "torch's, float32 vectors": (
        lambda w, b, x: F.layer_norm(x, (HIDDEN,), w.float(), b.float(), EPS),
        Norm(EPS, statistic="variance", bias="once"),
    ),
    "torch's, no bias": (lambda w, b, x: F.layer_norm(x, (HIDDEN,), w, None, EPS), WRITTEN),
    "torch's, no vectors": (lambda w, b, x: F.layer_norm(x, (HIDDEN,), None, None, EPS), WRITTEN),
    "torch's, weight + 1": (
        lambda w, b, x: F.layer_norm(x, (HIDDEN,), w + 1, b, EPS),
        Norm(EPS, statistic="variance", bias="once"),
    ),
    "torch's, of float32 (OLMo)": (
        lambda w, b, x: F.layer_norm(x.float(), (HIDDEN,), None, None, EPS).to(x.dtype),
        WRITTEN,
    ),
    "torch's, of a float32 stream": (
        lambda w, b, x: F.layer_norm(x.float() * 3.0, (HIDDEN,), w.float(), b.float(), EPS).half(),
        Norm(EPS, statistic="variance", bias="once", dtype="float16"),
    ),
    "Cohere's": (cohere, WRITTEN),
    "of a variance": (lambda w, b, x: of_variance(w, b, x).to(x.dtype), WRITTEN),
    "of a variance, weight and bias": (
        lambda w, b, x: (of_variance(w, b, x) * w.float() + b.float()).to(x.dtype),
        Norm(EPS, statistic="variance", bias="twice"),
    ),
    "rounded at each step": (twice, Norm(EPS, "twice", statistic="variance", bias="twice")),
    "not rounded": (
        lambda w, b, x: b.float() + of_variance(w, b, x) * w.float(),
        Norm(EPS, "none", statistic="variance", bias="twice"),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_it_is_raised_to(name: str) -> None:
    function, norm = SPELLINGS[name]
    module = Affine(lambda *args: ops.group_quant(function(*args), 128))
    x = torch.randn(3, 5, HIDDEN).bfloat16()
    assert contracts(module, x) == [norm, Quantization(128)]
    records = sites(module, x).records
    assert [(record.op, record.pattern) for record in records] == [
        ("layer_norm", "norm_quant"),
        ("group_quant", "norm_quant"),
    ]


def rows() -> Tensor:
    """Far off zero and near it, large and small, and constant."""
    x = torch.randn(24, HIDDEN) * torch.logspace(-2, 2, 24)[:, None] + torch.arange(24)[:, None]
    x[3] = 7.0
    return x.bfloat16()


def test_they_compute_what_eager_computes() -> None:
    """Statistics may differ by units of float32's last place, which moves a value by a step: seldom."""
    spellings = {name: function for name, (function, _) in SPELLINGS.items() if name != "not rounded"}

    def function(w: Tensor, b: Tensor, x: Tensor) -> Any:
        normed = [spelling(w, b, x) for spelling in spellings.values()]
        return [*normed, *ops.group_quant(normed[0], 64), *ops.group_quant(normed[0], 0, dtype=torch.int8)]

    module, x = Affine(function), rows()
    compiled = lowering.compile(module, (x,))
    assert compiled.report.unfused == () and compiled.report.dispatches == len(spellings)
    for got, expected in zip(lowering.load(compiled.vmfb)(x), module(x), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        error = (got.float() - expected.float()).abs()
        step = {
            torch.float16: 2**-10,
            torch.bfloat16: 2**-7,
            torch.float32: 2**-7,
            torch.float8_e4m3fn: 2**-3,
            torch.int8: 1.0,
        }
        assert (error <= step[got.dtype] * expected.float().abs() + 2e-6 + (got.dtype == torch.int8)).all()
        assert (error > 2e-6).float().mean() < 2e-3


class Block(nn.Module):
    """A residual add, a LayerNorm, per-token, static and group quantizations, and the plain value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)
        self.scale = nn.Buffer(torch.tensor(0.02))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        stream = x + residual
        y = self.norm(stream)
        quantized = [*ops.group_quant(y, 128), *ops.group_quant(y, 0, dtype=torch.int8)]
        return *quantized, ops.static_quant(y, self.scale), y, stream


@pytest.mark.parametrize("target", ["cpu", "sm_90", "sm_100", "gfx950"])
def test_all_around_it_is_one_kernel(target: str) -> None:
    sizes = {0: torch.export.Dim("tokens")}
    x, residual = torch.randn(2, 8, HIDDEN).bfloat16().unbind(0)
    report = lowering.explain(Block(), (x, residual), target=target, dynamic_shapes=(sizes, sizes))
    assert {(site.op, site.pattern) for site in report.sites} == {
        ("layer_norm", "add_norm_quant"),
        ("group_quant", "add_norm_quant"),
    }
    assert report.summary() == {"fused": 4, "unfused": 0, "dispatches": 1}


NEAR: dict[str, tuple[Callable[..., Any], str]] = {
    "two axes": (
        lambda w, b, x: F.layer_norm(x, (5, HIDDEN), None, None, EPS),
        "a kernel norms the last axis alone",
    ),
    "statistics read": (
        lambda w, b, x: torch.native_layer_norm(x, (HIDDEN,), w, b, EPS)[:2],
        "its mean or its rstd is read",
    ),
    "variance of a sample": (
        lambda w, b, x: centred(x.float()) * torch.rsqrt(x.float().var(-1, keepdim=True) + EPS),
        "unbiased=False",
    ),
    "not the deviations": (
        lambda w, b, x: x.float() * torch.rsqrt(x.float().var(-1, keepdim=True, unbiased=False) + EPS),
        "is not the tensor less its mean",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_none_says_why(name: str) -> None:
    function, reason = NEAR[name]
    (record,) = sites(Affine(function), torch.randn(3, 5, HIDDEN).bfloat16()).records
    assert (record.op, record.fused) == ("layer_norm", False)
    assert reason in (record.reason or ""), record.reason
