"""NaN, infinity and integers in generated code: what PyTorch gives, element for element."""

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

Table = dict[str, Callable[[Tensor, Tensor], Any]]

# A bound, a comparison, a maximum or its place, of numbers among which there are NaN and infinities.
UNORDERED: Table = {
    "clamp": lambda x, y: x.clamp(-1, 1),
    "clamp from below": lambda x, y: x.clamp(min=0),
    "clamp from above": lambda x, y: x.clamp(max=0.3),
    "clamp between tensors": lambda x, y: torch.clamp(x, y, y.abs()),
    "clamp before float8": lambda x, y: x.clamp(-448, 448).to(torch.float8_e4m3fn).float(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "maximum with a number": lambda x, y: torch.maximum(x, torch.tensor(-2.0)),
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "relu": lambda x, y: F.relu(x),
    "relu6": lambda x, y: F.relu6(x),
    "hardtanh": lambda x, y: F.hardtanh(x),
    "hardsigmoid": lambda x, y: F.hardsigmoid(x),
    "hardswish": lambda x, y: F.hardswish(x),
    "leaky_relu": lambda x, y: F.leaky_relu(x),
    "threshold": lambda x, y: F.threshold(x, 0.1, 20.0),
    "equal": lambda x, y: x == y,
    "equal to itself": lambda x, y: x == x,
    "not equal to itself": lambda x, y: x != x,
    "at most itself": lambda x, y: x <= x,
    "less": lambda x, y: x < y,
    "at least": lambda x, y: x >= y,
    "isfinite": lambda x, y: x.isfinite(),
    "isnan": lambda x, y: x.isnan(),
    "isclose": torch.isclose,
    "nan_to_num": lambda x, y: x.nan_to_num(),
    "sign": lambda x, y: x.sign(),
    "where": lambda x, y: torch.where(x > y, x, y),
    "amax": lambda x, y: x.amax(-1),
    "amin": lambda x, y: x.amin(-1),
    "max": lambda x, y: tuple(x.max(-1)),
    "min of columns": lambda x, y: tuple(y.min(0)),
    "argmax": lambda x, y: y.argmax(-1),
    "argmin of columns": lambda x, y: x.argmin(0),
    "any": lambda x, y: x.any(-1),
    "all": lambda x, y: x.all(-1),
    "softmax of nothing": lambda x, y: torch.full_like(x, -math.inf).softmax(-1),
    "logical_and": torch.logical_and,
}

INTEGER: Table = {
    "add": lambda x, y: x + y,
    "subtract a number": lambda x, y: x - 10,
    "subtract from a number": lambda x, y: 10 - x,
    "mul": lambda x, y: x * y,
    "negative": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "floor division by a number": lambda x, y: x // 3,
    "floor division": lambda x, y: x // y,
    "remainder of a number": lambda x, y: x % 3,
    "remainder": lambda x, y: x % y,
    "division toward zero": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "fmod": torch.fmod,
    "fmod of a number": lambda x, y: torch.fmod(x, 3),
    "true division": lambda x, y: x / y,
    "square": lambda x, y: x**2,
    "fifth power": lambda x, y: x**5,
    "as float": lambda x, y: x.float() * 0.5,
    "as bfloat16": lambda x, y: x.bfloat16(),
    "as int64": lambda x, y: x.long(),
    "as uint8": lambda x, y: x.to(torch.uint8),
    "as int8": lambda x, y: x.to(torch.int8),
    "from float to uint8": lambda x, y: (x.float() * 0.9).abs().clamp(0, 255).to(torch.uint8),
    "less": lambda x, y: x < y,
    "maximum": torch.maximum,
    "clamp": lambda x, y: x.clamp(3, 50),
    "clamp to less than zero": lambda x, y: (x.clamp(-3, 50), x.clamp(min=-3), x.clamp(max=-3)),
    "bitwise": lambda x, y: (x & y) | (x ^ 5),
    "not": lambda x, y: ~x,
    "nibbles": lambda x, y: (x >> 4) + ((x & 15) << 4),
    "sum": lambda x, y: x.sum(-1),
    "product of a few": lambda x, y: x[:, :3].prod(-1),
    "cumsum": lambda x, y: x.cumsum(-1),
    "amax": lambda x, y: x.amax(-1),
    "argmin": lambda x, y: x.argmin(-1),
    "any": lambda x, y: x.any(-1),
    "where": lambda x, y: torch.where(x > y, x, y),
    "add booleans": lambda x, y: x + (x > 3),
}
TABLES = {"unordered": UNORDERED, "integer": INTEGER}


class Each(torch.nn.Module):
    """Every function of a table, of the same two tensors."""

    def __init__(self, functions: Table):
        super().__init__()
        self.functions = list(functions.values())

    def forward(self, x: Tensor, y: Tensor) -> list[Any]:
        return [function(x, y) for function in self.functions]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype.is_floating_point:
        numbers = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-4, 3e4, -3e4, 0.5, 2.5, -0.3, 100]
        special = torch.tensor(numbers, dtype=dtype)
        return special.repeat(14, 1).T.contiguous(), special.repeat(14, 1)
    info, generator = torch.iinfo(dtype), torch.Generator().manual_seed(0)
    x, y = (torch.randint(info.min, info.max, (8, 16), generator=generator).to(dtype) for _ in range(2))
    y[:, :8] %= 9
    y[y == 0] = 1
    x[0, 0] = info.min
    return x, y


@cache
def results(table: str, dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    """What the program and what PyTorch make of each function of the table."""
    module, args = Each(TABLES[table]), pairs(dtype)
    program = lowering.load(lowering.compile(module, args).vmfb)
    return dict(zip(TABLES[table], zip(program(*args), module(*args), strict=True), strict=True))


def assert_the_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(
        torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", UNORDERED)
def test_a_nan_is_what_it_is_in_pytorch(name, dtype):
    assert_the_same(*results("unordered", dtype)[name])


INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=["uint8", "int8", "int32", "int64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integers_are_exact(name, dtype):
    assert_the_same(*results("integer", dtype)[name])


def test_an_integer_division_by_zero_does_not_end_the_process():
    class Divided(torch.nn.Module):
        def forward(self, x, y):
            return x // y, x % y, torch.div(x, y, rounding_mode="trunc")

    x, y = (
        torch.tensor([7, -(2**31), -7, 9], dtype=torch.int32),
        torch.tensor([0, -1, 3, -2], dtype=torch.int32),
    )
    program = lowering.load(lowering.compile(Divided(), (x, y)).vmfb)
    floor, rest, trunc = program(x, y)  # PyTorch raises for the zero, so the first element may be anything
    assert floor.tolist()[1:] == [-(2**31), -3, -5]
    assert rest.tolist()[1:] == [0, 2, -1]
    assert trunc.tolist()[1:] == [-(2**31), -2, -4]
