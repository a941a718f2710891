"""Functions of float32 in generated code: the nearest float32 of each, special values as PyTorch has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lowering

NEAREST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp2": lambda x, y: torch.exp2(x),
    "log2": lambda x, y: torch.log2(x),
    "power": torch.pow,
    "power with an exponent": lambda x, y: x**2.5,
    "power of a number": lambda x, y: 3.0**x,
    "sin": lambda x, y: torch.sin(x),
    "cos": lambda x, y: torch.cos(x),
    "tan": lambda x, y: torch.tan(x),
    "sinh": lambda x, y: torch.sinh(x),
    "asinh": lambda x, y: torch.asinh(x),
    "acosh": lambda x, y: torch.acosh(x),
    "atanh": lambda x, y: torch.atanh(x),
    "atan": lambda x, y: torch.atan(x),
    "atan2": torch.atan2,
    "atan2 of one": lambda x, y: torch.atan2(x, x),
}
OTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu by tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "power of two above": lambda x, y: torch.exp2(torch.ceil(torch.log2(x))),
}
TABLE = {**NEAREST, **OTHER}
SPECIAL = (math.nan, math.inf, 0.0, 0.5, 1.0, 2.0, 3.0, 2.5, 1e-30, 1e-7, 6e4, 1e36, 3e38)


class Each(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [function(x, y) for function in TABLE.values()]


def arguments() -> tuple[Tensor, Tensor]:
    """Each pair of special values, and numbers of every magnitude; no denormals, they are zero on the CPU."""
    special = torch.tensor([*SPECIAL, *(-value for value in SPECIAL)])
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=generator).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.randn(4000, generator=generator) * 8])
    y = torch.randn(len(x), generator=generator) * 4
    y[::3] = y[::3].round()
    x = torch.cat([special.repeat_interleave(len(special)), torch.exp2(torch.arange(-126.0, 128)), x])
    y = torch.cat([special.repeat(len(special)), torch.ones(254), y])
    normal = ~(x.abs() < torch.finfo(torch.float32).tiny) | (x == 0)
    return x[normal], y[normal]


@cache
def results() -> dict[str, tuple[Tensor, Tensor, Any]]:
    """What the program gives, what float64 gives, and what float32 makes of that."""
    args = arguments()
    ours = lowering.load(lowering.compile(Each(), args).vmfb)(*args)
    exact = Each()(*(a.double() for a in args))
    return {name: (a, e, e.float()) for name, a, e in zip(TABLE, ours, exact, strict=True)}


def normal(t: Tensor) -> Tensor:
    return t.isfinite() & (t.abs() >= torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("name", NEAREST)
def test_a_function_is_the_nearest_float32(name: str) -> None:
    ours, exact, rounded = results()[name]
    assert torch.equal(ours.isnan(), rounded.isnan())
    there = normal(rounded)
    step = torch.nextafter(rounded.abs(), torch.tensor(math.inf)).double() - rounded.abs().double()
    assert float(((ours.double() - exact).abs() / step)[there].max()) < 0.501
    # Zeros and infinities, of their sign; below the normal numbers ours are zero.
    rest = ~there & ~rounded.isnan()
    flushed = torch.where(rounded.isinf(), rounded, rounded * 0)
    assert torch.equal(ours[rest], flushed[rest])
    assert torch.equal(ours[rest].signbit(), flushed[rest].signbit())


def test_a_gelu_keeps_its_digits_where_it_is_nearly_zero() -> None:
    """PyTorch's own has none left there; float64 in the same formula has."""
    ours, exact, rounded = results()["gelu by tanh"]
    assert torch.equal(ours.isnan(), rounded.isnan())
    there = normal(rounded) & (arguments()[0] > -6)
    torch.testing.assert_close(ours.double()[there], exact[there], rtol=5e-6, atol=0)


def test_the_power_of_two_above_a_power_of_two_is_itself() -> None:
    x, _ = arguments()
    ours, _, rounded = results()["power of two above"]
    powers = torch.isin(x, torch.exp2(torch.arange(-126.0, 128)))
    assert torch.equal(ours[powers], x[powers])
    assert torch.equal(ours[x.isinf()].nan_to_num(), rounded[x.isinf()].nan_to_num())
