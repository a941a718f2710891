"""16-bit floats in generated code: every operation is PyTorch's own, bit for bit, one rounding for each.

Where one is not, it is a function that has no exact value (exp, tanh, ...) or a sum in another order:
there the result may be the neighbouring 16-bit number, in few places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lowering

EXACT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "add a number": lambda x, y: x + 0.1,
    "subtract from a number": lambda x, y: 0.7 - x,
    "times a number": lambda x, y: x * 0.1,
    "over a number": lambda x, y: x / 0.3,
    "number over": lambda x, y: 0.7 / x,
    "add a scaled": lambda x, y: torch.add(x, y, alpha=0.3),
    "subtract a scaled": lambda x, y: torch.sub(x, y, alpha=0.3),
    "add a tensor without axes": lambda x, y: x + torch.tensor(0.3),
    "times a tensor without axes": lambda x, y: x * torch.tensor(0.3),
    "remainder of a number": lambda x, y: x % 0.3,
    "above a number": lambda x, y: x > 0.1,
    "sum, widened": lambda x, y: (x + y).float(),
    "three factors": lambda x, y: x * y * x,
    "a chain": lambda x, y: (x + y) * y - x,
    "a number and a square": lambda x, y: 2.0 + x * x,
    "an update's sum, widened": lambda x, y: x.index_add(0, torch.tensor([0]), y[:1]).float(),
    "sums of an update, widened": lambda x, y: x.index_put((torch.tensor([1, 1]),), y[:2], True).float(),
    "multiples added": lambda x, y: x.index_add(0, torch.tensor([1, 0]), 3e4 * y[:2], alpha=3),
    "explicit rounding": lambda x, y: (x.float() * 1.3).to(x.dtype).float(),
    "square": lambda x, y: x**2,
    "cube": lambda x, y: x**3,
    "sqrt": lambda x, y: x.abs().sqrt(),
    "rsqrt": lambda x, y: torch.rsqrt(x.abs() + 1),
    "reciprocal": lambda x, y: x.reciprocal(),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "relu": lambda x, y: F.relu(x),
    "hardswish": lambda x, y: F.hardswish(x),
    "leaky_relu": lambda x, y: F.leaky_relu(x),
    "clamp": lambda x, y: x.clamp(-0.3, 0.3),
    "maximum": torch.maximum,
    "floor": lambda x, y: x.floor(),
    "round": lambda x, y: x.round(),
    "where": lambda x, y: torch.where(x > y, x, y),
    "cat": lambda x, y: torch.cat([x, y], -1),
    "gather": lambda x, y: x.gather(-1, y.argmax(-1, keepdim=True)),
    "amax": lambda x, y: x.amax(-1),
    "argmax": lambda x, y: x.argmax(-1),
    "mean of a few": lambda x, y: x[:, :4].mean(-1),
}

# Functions without an exact value, and sums in an order of their own.
NEAR: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "exp": lambda x, y: x.exp(),
    "log": lambda x, y: x.abs().log(),
    "tanh": lambda x, y: x.tanh(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "silu times": lambda x, y: F.silu(x) * y,
    "gelu": lambda x, y: F.gelu(x.clamp(-2, 9)),
    "gelu by tanh": lambda x, y: F.gelu(x.clamp(-2, 9), approximate="tanh"),
    "quick gelu": lambda x, y: x * torch.sigmoid(1.702 * x),
    "softplus": lambda x, y: F.softplus(x),
    "mish": lambda x, y: F.mish(x),
    "elu": lambda x, y: F.elu(x),
    "erf": lambda x, y: torch.erf(x),
    "sum": lambda x, y: x.sum(-1),
    "sum of all": lambda x, y: x.sum(),
    "mean": lambda x, y: x.mean(-1),
    "var": lambda x, y: x.var(-1),
    "std": lambda x, y: x.std(0),
    "norm": lambda x, y: x.norm(dim=-1),
    "softmax": lambda x, y: x.softmax(-1),
    "layer_norm": lambda x, y: F.layer_norm(x, (64,), y[0], y[1]),
    "group_norm": lambda x, y: F.group_norm(x[None], 4, x[:, 0], y[:, 1]),
    "rms_norm": lambda x, y: F.rms_norm(x, (64,), y[0]),
    "cumsum": lambda x, y: x.cumsum(-1),
    "mm": lambda x, y: x @ y.T,
    "linear with a bias": lambda x, y: F.linear(x, y, y[:, 0]),
    "addmm": lambda x, y: torch.addmm(x[:, :8], x, y.T, beta=0.5, alpha=0.25),
    "conv1d with a bias": lambda x, y: F.conv1d(x[None], y[:, :24].reshape(8, 8, 3), y[:, 0]),
    "mse": F.mse_loss,
}


class Each(torch.nn.Module):
    """Every function of a table, of the same two tensors."""

    def __init__(self, functions: dict[str, Callable[[Tensor, Tensor], Any]]):
        super().__init__()
        self.functions = list(functions.values())

    def forward(self, x: Tensor, y: Tensor) -> list[Any]:
        return [function(x, y) for function in self.functions]


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (2 * torch.randn(8, 64, generator=generator) for _ in range(2))
    return x.to(dtype), y.to(dtype)


@cache
def results(table: str, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """What the program and what PyTorch make of each function of the table."""
    functions = {"exact": EXACT, "near": NEAR}[table]
    module, args = Each(functions), operands(dtype)
    program = lowering.load(lowering.compile(module, args).vmfb)
    return dict(zip(functions, zip(program(*args), module(*args), strict=True), strict=True))


def steps(ours: Tensor, theirs: Tensor) -> Tensor:
    """How many 16-bit numbers apart: their bits, as integers that are in the order of the numbers."""

    def order(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(ours) - order(theirs)).abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", EXACT)
def test_an_operation_is_pytorchs_bit_for_bit(name, dtype):
    ours, theirs = results("exact", dtype)[name]
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NEAR)
def test_an_inexact_function_is_at_most_one_number_beside_pytorchs(name, dtype):
    ours, theirs = results("near", dtype)[name]
    assert ours.dtype == theirs.dtype == dtype
    apart = steps(ours, theirs)
    assert apart.max() <= 1
    assert (apart > 0).sum() <= max(1, 0.02 * apart.numel())


def test_a_sum_is_not_accumulated_in_16_bits():
    class Sums(torch.nn.Module):
        def forward(self, x):
            return x.sum(-1), x.mean(-1), (x * 200 * x).mean(-1), x.cumsum(-1)[:, -1]

    ones = torch.ones(2, 4096, dtype=torch.float16)
    total, mean, large, last = lowering.load(lowering.compile(Sums(), (ones,)).vmfb)(ones)
    assert total.tolist() == last.tolist() == [4096, 4096]
    assert mean.tolist() == [1, 1] and large.tolist() == [200, 200]


def test_a_python_number_is_the_nearest_float32():
    class Scaled(torch.nn.Module):
        def forward(self, x):
            return x * 0.1, x * (1.0 / 448.0), x - 0.3, x / 0.7, x.clamp(max=0.1)

    ones = torch.ones(1, 8)
    program = lowering.load(lowering.compile(Scaled(), (ones,)).vmfb)
    assert all(map(torch.equal, program(ones), Scaled()(ones)))


def test_every_code_of_every_float8_is_read_as_what_it_is():
    formats = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
    wide = torch.float32, torch.bfloat16, torch.float16, torch.float64

    class Read(torch.nn.Module):
        def forward(self, *codes):
            return [code.to(dtype) for code in codes for dtype in wide]

    codes = tuple(torch.arange(256, dtype=torch.uint8).view(dtype).reshape(2, 128) for dtype in formats)
    read = lowering.load(lowering.compile(Read(), codes).vmfb)(*codes)
    for ours, theirs in zip(read, Read()(*codes), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(7e4), theirs.nan_to_num(7e4))
        assert torch.equal(ours.isnan(), theirs.isnan())
