"""A norm times an activation of another tensor, as in Qwen3-Next: one kernel, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lowering
from patterns.contracts import GatedActivation, Norm, Quantization
from tests.raised import Function, contracts, integers, sites

ops = torch.ops.lowering
HEAD = 128


def normed(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def qwen3_next(w: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (normed(x, w[:HEAD]) * F.silu(z.float())).to(x.dtype)


X, Z = integers(5, 4, HEAD), torch.randn(5, 4, HEAD).bfloat16()
SPELLINGS: dict[str, tuple[Callable[..., Tensor], Norm, GatedActivation]] = {
    "Qwen3-Next": (qwen3_next, Norm(1e-6, "twice"), GatedActivation("silu", "once", packed=False)),
    "torch's norm, eager product": (
        lambda w, x, z: F.rms_norm(x, (HEAD,), w[:HEAD], 1e-6) * F.silu(z),
        Norm(1e-6),
        GatedActivation("silu", "twice", packed=False),
    ),
    "gelu": (
        lambda w, x, z: F.gelu(z, approximate="tanh") * ops.rms_norm(x, w[:HEAD], 1e-6),
        Norm(1e-6),
        GatedActivation("gelu_tanh", "twice", packed=False),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_it_is_raised_to_and_that_it_is_one_kernel(name: str) -> None:
    function, norm, gate = SPELLINGS[name]
    module = Function(lambda w, x, z: ops.group_quant(function(w, x, z).reshape(5, -1), 128))
    assert contracts(module, X, Z) == [norm, gate, Quantization(128)]
    (pattern,) = {record.pattern for record in sites(module, X, Z).records}
    assert pattern == f"norm_{gate.activation}_mul_quant"


def test_they_compute_what_eager_computes() -> None:
    """The norm is exact here; an activation may be two units of float32 off, which moves a value one step."""

    def function(w: Tensor, x: Tensor, z: Tensor) -> Any:
        y = [spelling(w, x, z) for spelling, _, _ in SPELLINGS.values()]
        return [
            *ops.group_quant(y[0].reshape(5, -1), 128),
            y[0],
            *ops.group_quant(y[1], 0),
            *ops.group_quant(y[2], 64),
        ]

    module = Function(function)
    compiled = lowering.compile(module, (X, Z))
    assert compiled.report.summary() == {"fused": 9, "unfused": 0, "dispatches": 3}
    for got, expected in zip(lowering.load(compiled.vmfb)(X, Z), module(X, Z), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        step = 2**-3 if got.itemsize == 1 else 2**-7
        error = (got.float() - expected.float()).abs()
        assert (error <= step * expected.float().abs() + 1e-6).all() and (error > 0).float().mean() < 0.02


SPLITS: dict[str, tuple[Callable[..., Any], str]] = {
    "read besides": (
        lambda w, x, z: ((n := normed(x, w[:HEAD])) * F.silu(z), n),
        "where nothing else reads it",
    ),
    "a residual before": (
        lambda w, x, z: ((n := ops.add_rms_norm(x, z, w[:HEAD], 1e-6))[0] * F.silu(z), n[1]),
        "nothing is added before",
    ),
    "activated itself": (
        lambda w, x, z: (F.silu(normed(x, w[:HEAD])) * z, z),
        "multiplies what it normalises",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_two_kernels_says_why(name: str) -> None:
    function, reason = SPLITS[name]

    def quantized(w: Tensor, x: Tensor, z: Tensor) -> Any:
        y, other = function(w, x, z)
        return *ops.group_quant(y, 128), other * 2

    norm, gate, quant = lowering.explain(Function(quantized), (X, Z)).sites
    assert (gate.pattern, quant.pattern) == ("silu_mul_quant", "silu_mul_quant")
    assert norm.status == "unfused" and reason in (norm.reason or ""), norm.reason
