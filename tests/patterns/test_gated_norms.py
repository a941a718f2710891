"""A norm times an activation of another tensor, as in Qwen3-Next: one kernel, or the reason why not."""

from __future__ import annotations

import importlib
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


def in_groups(w: Tensor, h: Tensor) -> Tensor:
    """Groups of 32 normed, and multiplied by the parts of a weight."""
    groups = normed32(h.unflatten(-1, (4, 32)))
    return (w[:HEAD].view(4, 32) * groups).flatten(-2)


def normed32(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


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


def of_gated(group: int, act: Callable[[Tensor], Tensor] = F.silu) -> Callable[..., Tensor]:
    """What transformers' MambaRMSNormGated, and those of its kin, compute."""

    def function(w: Tensor, x: Tensor, z: Tensor) -> Tensor:
        h = x.float() * act(z.float())
        groups = h.view(*h.shape[:-1], h.shape[-1] // group, group)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w[: x.shape[-1]] * groups.view(h.shape).to(x.dtype)

    return function


def rounded_gate(w: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return F.rms_norm(x * F.silu(z), (HEAD,), w[:HEAD], 1e-6)


UNROUNDED = GatedActivation("silu", "none", packed=False)
BEFORE: dict[str, tuple[Callable[..., Tensor], Norm]] = {
    "Mamba2": (of_gated(HEAD), Norm(1e-6, "twice", gate=UNROUNDED)),
    "Mamba2, groups": (of_gated(32), Norm(1e-6, "twice", group=32, gate=UNROUNDED)),
    "gelu": (
        of_gated(64, F.gelu),
        Norm(1e-6, "twice", group=64, gate=GatedActivation("gelu", "none", packed=False)),
    ),
    "Falcon-H1": (
        lambda w, x, z: (normed32(x * F.silu(z.float())) * w[:HEAD]).to(x.dtype),
        Norm(1e-6, gate=UNROUNDED),
    ),
    # The mixers of transformers' state-space models: float32 all along, with a gate of 16 bits.
    "float32, rounded behind": (
        lambda w, x, z: of_gated(32)(w, x.float(), z).to(x.dtype),
        Norm(1e-6, "once", group=32, gate=UNROUNDED),
    ),
    "float32 x": (
        lambda w, x, z: of_gated(32)(w, x.float() * 3.0, z).to(x.dtype),
        Norm(1e-6, "once", group=32, gate=GatedActivation("silu", "once", packed=False), dtype="bfloat16"),
    ),
    "Falcon-H1, groups": (
        lambda w, x, z: in_groups(w, x * F.silu(z.float())).to(x.dtype) * 1.0,
        Norm(1e-6, group=32, gate=UNROUNDED),
    ),
    "rounded": (rounded_gate, Norm(1e-6, gate=GatedActivation("silu", "twice", packed=False))),
}


MODULES = {
    "mamba2": "MambaRMSNormGated",
    "zamba2": "Zamba2RMSNormGated",
    "nemotron_h": "NemotronHRMSNormGated",
    "granitemoehybrid": "GraniteMoeHybridRMSNormGated",
    "bamba": "BambaRMSNormGated",
}


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_of_transformers(name: str) -> None:
    """As their mixers call them: y of float32, a gate of 16 bits, and a linear layer of 16 bits behind."""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    norm = getattr(modeling, MODULES[name])(256, 64, eps=1e-5).bfloat16()

    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, y: Tensor, gate: Tensor) -> Any:
            return ops.group_quant(self.norm(y, gate).to(torch.bfloat16), 128)

    y, gate = torch.randn(3, 5, 256), torch.randn(3, 5, 256).bfloat16()
    wide = GatedActivation("silu", "once", packed=False)
    contract = Norm(1e-5, group=64, gate=wide, dtype="bfloat16")
    assert contracts(Mixer(), y, gate) == [contract, Quantization(128)]
    (pattern,) = {record.pattern for record in sites(Mixer(), y, gate).records}
    assert pattern == "silu_mul_norm_quant"


@pytest.mark.parametrize("name", BEFORE)
def test_a_gate_before_the_norm_is_part_of_it(name: str) -> None:
    function, norm = BEFORE[name]
    module = Function(lambda w, x, z: ops.group_quant(function(w, x, z), 64))
    assert contracts(module, X, Z) == [norm, Quantization(64)]
    (pattern,) = {record.pattern for record in sites(module, X, Z).records}
    assert norm.gate is not None and pattern == f"{norm.gate.activation}_mul_norm_quant"


def test_norms_of_gates_compute_what_eager_computes() -> None:
    """With whole rows, groups and a given scale behind them, of any number of rows, read where they lie."""

    def function(w: Tensor, xz: Tensor) -> Any:
        x, z = xz.chunk(2, -1)
        y = [spelling(w, x, z) for spelling, _ in BEFORE.values()]
        static = ops.static_quant(y[1], torch.tensor(0.02))
        return [*y, *ops.group_quant(y[0], 0), *ops.group_quant(y[1], 32, dtype=torch.int8), static]

    module, xz = Function(function), torch.cat((X, Z), -1)
    sizes = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)},)
    compiled = lowering.compile(module, (xz,), dynamic_shapes=(sizes,))
    assert compiled.report.unfused == () and compiled.report.dispatches == len(BEFORE)
    for rows in (xz, torch.cat((integers(3, 1, HEAD), torch.randn(3, 1, HEAD).bfloat16()), -1)):
        for got, expected in zip(lowering.load(compiled.vmfb)(rows), module(rows), strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            step = {1: 2**-3, 2: 2**-7, 4: 2**-7}[got.itemsize]
            error = (got.float() - expected.float()).abs()
            whole = 1.0 if got.dtype == torch.int8 else 1e-6
            assert (error <= step * expected.float().abs() + whole).all() and (
                error > 0
            ).float().mean() < 0.02
