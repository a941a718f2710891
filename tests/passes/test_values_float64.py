"""float64 is computed in float64 wherever it is, an argument, a weight or a result; or it is refused."""

from __future__ import annotations

import pytest
import torch

import lowering
from lowering.errors import CompileError


class Doubles(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.linspace(0, 1, 64, dtype=torch.float64))

    def forward(self, x, d):
        return (
            (x.double() + 1e8 - 1e8).float(),
            d.float() * 2,
            d + self.shift,
            0.7 - d,
            d * 0.1 + 1 / 3,
            (d * d).sum(-1),
            d.mean(),
            d.exp(),
            d.abs().log2(),
            d.tanh(),
            d.sin() + d.cos(),
            d // 0.3,
            d.amax(-1),
            (d * 1e10).long(),
            torch.nn.functional.layer_norm(d * 0.01, (64,), self.shift, 1 - self.shift),
            torch.nn.functional.rms_norm(d * 0.01, (64,), eps=1e-5),
        )


def test_float64_is_computed_as_such():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator) + 1000
    d = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    program = lowering.load(lowering.compile(Doubles(), (x, d)).vmfb)
    for ours, theirs in zip(program(x, d), Doubles()(x, d), strict=True):
        assert ours.dtype == theirs.dtype
        # A few last bits: sums in another order, functions of other authors.
        tolerance = 1e-14 if theirs.dtype == torch.float64 else 0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_function_that_float64_lacks_is_refused_with_its_line():
    class Erf(torch.nn.Module):
        def forward(self, x):
            return torch.erf(x)

    with pytest.raises(CompileError, match=r"test_values_float64.py:\d+: erf of float64"):
        lowering.compile(Erf(), (torch.randn(4, dtype=torch.float64),))


def test_large_angles_keep_their_digits():
    class Waves(torch.nn.Module):
        def forward(self, x):
            return x.sin(), x.cos(), x.tan()

    x = torch.cat([torch.linspace(-(10**k), 10**k, 500) for k in range(8)])
    program = lowering.load(lowering.compile(Waves(), (x,)).vmfb)
    for ours, theirs in zip(program(x), Waves()(x.double()), strict=True):
        # The nearest float32, but where float64 itself has rounded.
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-7, atol=1e-12)
