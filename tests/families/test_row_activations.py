"""The gated activations of the row kernel: within their bounds, and what is quantized is what is written."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lowering.families.row import instance
from lowering.targets import Target
from patterns.contracts import GatedActivation, RowSpec
from tests.families.host_kernels import assert_same, run
from tests.families.row_cases import CPU, GFX950, SCHEMES, SM90, spec
from tests.families.row_reference import ACTIVATIONS, reference


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation: str, target: Target, launcher) -> None:
    """Against float64, within the bounds that contracts.py and activation.h state."""
    case = RowSpec(512, "float32", gate=GatedActivation(activation, packed=False), writes_y=True)
    kernel = instance(case, target)
    rows = 1024 if target is CPU else 64
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 1.0, 6.0, 88.0]).repeat(rows // 4)
    g = (torch.rand(rows, 512, generator=generator) * 2 - 1) * spread.unsqueeze(1)
    (y,) = run(kernel, launcher(kernel), [g, torch.ones_like(g)], rows)
    exact = _exact_activation(activation, g.double())
    error = (y.double() - exact).abs()
    size = exact.abs().float().clamp(min=2.0**-126)
    last_place = (torch.nextafter(size, torch.tensor(torch.inf)) - size).double()
    within = error <= (2.1 if activation == "gelu_tanh" else 2.0) * last_place
    cancels = (g < 0) & (activation != "silu")
    assert torch.where(cancels, error <= g.abs() * 2.0**-23, within).all()


def _exact_activation(activation: str, g: torch.Tensor) -> torch.Tensor:
    if activation == "gelu":
        return g * torch.special.erfc(g * -math.sqrt(0.5)) / 2
    return ACTIVATIONS[activation](g)


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_special_gates(activation: str, target: Target, launcher) -> None:
    case = RowSpec(512, "float32", gate=GatedActivation(activation, packed=False), writes_y=True)
    kernel = instance(case, target)
    finite = [0.0, -0.0, 1e-40, -1e-40, -89.0, 1e20, -1e20, 3e38, -3e38]
    g = torch.tensor([torch.nan, torch.inf, -torch.inf, *finite])
    g = torch.nn.functional.pad(g, (0, 512 - len(g))).unsqueeze(0)
    (y,) = run(kernel, launcher(kernel), [g, torch.ones_like(g)], 1)
    assert_same([y], [ACTIVATIONS[activation](g)])


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
def test_quantizations_of_a_random_gate(target: Target, launcher) -> None:
    """Whatever the activation's last bit, what is quantized is the y that is written."""
    case = spec(384, quants=SCHEMES["layouts"], gate=GatedActivation("silu"), writes_y=True)
    kernel = instance(case, target)
    x = torch.randn(7, 768, generator=torch.Generator().manual_seed(4)).bfloat16() * 4
    y, *rest = run(kernel, launcher(kernel), [x], 7)
    torch.testing.assert_close(y, reference(case, [x])[0], rtol=2**-8, atol=0)
    plain = dataclasses.replace(case, gate=None, writes_y=False)
    assert_same(rest, reference(plain, [y]))
