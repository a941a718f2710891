"""Producers by schemes: each cell of the table in docs/patterns.md is compiled for the cpu and run.

A row is one program, compared with eager: its producer is fused with every scheme of the table.  Inputs are
small integers, whose squares have one sum in any order, so a norm's cells are equal to eager bit for bit; a
row's mean is zero, so that squares of deviations have too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lowering
from lowering.families.row_support import MAX_QUANTIZATIONS
from tests.patterns.test_quantization_spellings import SPELLINGS
from tests.raised import Function, bits

HIDDEN, HEAD = 512, 128
E5M2, FNUZ = torch.float8_e5m2, torch.float8_e4m3fnuz
ops = torch.ops.lowering

SCHEMES: dict[str, dict[str, Any]] = {
    "e4m3fn 128": {"group_size": 128},
    "64, column": {"group_size": 64, "scale_layout": "column"},
    "32, column_tma": {"group_size": 32, "scale_layout": "column_tma"},
    "row": {"group_size": 0},
    "reciprocals": {"group_size": 128, "scale_division": "reciprocal", "quotient": "reciprocal"},
    "bounds": {"group_size": 128, "amax_floor": 1e-4, "amax_ceiling": 2.0, "scale_floor": 1e-3},
    "e5m2": {"group_size": 128, "dtype": E5M2},
    "fnuz, 224": {"group_size": 128, "dtype": FNUZ, "limit": 224.0},
    "int8": {"group_size": 128, "dtype": torch.int8},
    "int8 row": {"group_size": 0, "dtype": torch.int8},
    "ue8m0": {"group_size": 128, "scale": "ue8m0", "scale_floor": 1e-10},
    "ue8m0 packed": {"group_size": 32, "scale": "ue8m0", "scale_layout": "ue8m0_packed"},
}


def once(x: Tensor, w: Tensor | None) -> Tensor:
    return ops.rms_norm(x, w, 1e-6)


def core(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True)


def exact_add(w: Tensor, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference paths of the serving stacks have it: the sum is not rounded before the statistic."""
    h = x.float() + r.float()
    return core(h).to(x.dtype) * w, h.to(x.dtype)


# Given a weight and two tensors: what is quantized, and what else the program returns.
Producer = Callable[[Tensor, Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
NORMS: dict[str, Producer] = {
    "plain": lambda w, x, r: x,
    "rms_norm once": lambda w, x, r: once(x, w),
    "rms_norm once, written out": lambda w, x, r: (core(x.float()) * w.float()).to(x.dtype),
    "rms_norm twice": lambda w, x, r: w * core(x.float()).to(x.dtype),
    "rms_norm unrounded": lambda w, x, r: core(x.float()) * w.float(),
    "rms_norm, no weight": lambda w, x, r: once(x, None),
    "rms_norm, float32 weight": lambda w, x, r: once(x, w.float()),
    "rms_norm, 1 + weight": lambda w, x, r: (core(x.float()) * (1.0 + w.float())).to(x.dtype),
    "add, rms_norm": lambda w, x, r: once(x + r, w),
    "add the other way, sum returned": lambda w, x, r: (once(total := r + x, w), total),
    "add unrounded, sum returned": exact_add,
    "read besides": lambda w, x, r: (y := once(x, w), y * 2),
    "layer_norm, written out": lambda w, x, r: (core(centred(x.float())) * w.float()).to(x.dtype),
    "norm of groups": lambda w, x, r: w * core(x.float().unflatten(-1, (-1, HEAD))).flatten(-2).to(x.dtype),
    "norm of heads": lambda w, x, r: once(x.unflatten(-1, (-1, HEAD)), w[:HEAD]),
}
GATES: dict[str, Producer] = {
    "silu(gate) * up": lambda w, x, r: F.silu(x) * r,
    "silu, packed": lambda w, x, r: ops.silu_mul(torch.cat((x, r), -1)),
    "silu written out, unrounded": lambda w, x, r: x.float() * torch.sigmoid(x.float()) * r.float(),
    "gelu(gate) * up": lambda w, x, r: r * F.gelu(x),
    "gelu_tanh, rounded once": lambda w, x, r: (F.gelu(x.float(), approximate="tanh") * r.float()).to(
        x.dtype
    ),
}


def grouped(h: Tensor) -> Tensor:
    return core(h.unflatten(-1, (-1, HEAD))).flatten(-2)


# As exact as the statistics of both are: eager's LayerNorm finds a mean as it goes along.
OTHERS: dict[str, Producer] = {
    "layer_norm": lambda w, x, r: F.layer_norm(x, (HIDDEN,), w, w + 2, 1e-6),
    "norm of groups of silu(gate) * up": lambda w, x, r: (
        w * grouped(r.float() * F.silu(x.float())).to(x.dtype)
    ),
}
PRODUCERS = {**NORMS, **GATES, **OTHERS}


def row(producer: Producer) -> Function:
    """A program that quantizes what ``producer`` makes in every scheme, as many at a time as fit."""

    def function(w: Tensor, *tensors: Tensor) -> list[Tensor]:
        out, schemes = [], list(SCHEMES.values())
        for start in range(0, len(schemes), MAX_QUANTIZATIONS):
            number = start // MAX_QUANTIZATIONS
            made = producer(w[:HIDDEN], tensors[2 * number], tensors[2 * number + 1])
            y, *others = made if isinstance(made, tuple) else (made,)
            for scheme in schemes[start : start + MAX_QUANTIZATIONS]:
                out += ops.group_quant(y, **scheme)
            out += others
        return out

    module = Function(function)
    module.weight = torch.nn.Parameter(torch.randint(-8, 9, (HIDDEN,)).bfloat16() / 8, requires_grad=False)
    return module


@pytest.mark.parametrize("name", PRODUCERS)
def test_a_row_of_the_table(name: str) -> None:
    module = row(PRODUCERS[name])
    count = 2 * -(-len(SCHEMES) // MAX_QUANTIZATIONS)
    halves = [torch.randint(-8, 9, (5, HIDDEN // 2)).bfloat16() for _ in range(count)]
    tensors = [torch.cat((half, -half), -1) for half in halves]
    compiled = lowering.compile(module, tuple(tensors))
    assert compiled.report.unfused == ()
    quants = [site for site in compiled.report.sites if site.op == "group_quant"]
    assert len(quants) == len(SCHEMES)
    # One pattern: no cell is a kernel of its own beside its producer's.
    assert len({site.pattern for site in compiled.report.sites}) == 1
    outputs = zip(lowering.load(compiled.vmfb)(*tensors), module(*tensors), strict=True)
    for number, (got, expected) in enumerate(outputs):
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
        if name in NORMS:
            assert torch.equal(bits(got), bits(expected)), number
        else:
            assert_close(got, expected, number)


def assert_close(got: Tensor, expected: Tensor, number: int) -> None:
    """An activation is right to 2 units of float32's last place, and to as much of gate where it cancels.

    So are scales; rarely that decides how a value is rounded, which then is one step of its type off.
    """
    if expected.dtype.is_floating_point:
        info = torch.finfo(expected.dtype)
        relative, absolute = info.eps, info.eps * info.smallest_normal
    else:
        relative, absolute = 0.0, 1.0
    got, expected = got.double(), expected.double()
    error, least = (got - expected).abs(), 2.0**-18 * expected.abs().max()
    assert (error > least + 1e-6 * expected.abs()).float().mean() <= 0.01, number
    step = absolute + max(relative, 1e-6) * expected.abs()
    assert (error <= least + step).all(), (number, got[error > step], expected[error > step])


# -- the documentation -----------------------------------------------------------------------------------


def tables() -> list[str]:
    """The tables of docs/patterns.md: a tick is a cell of this file, a line a spelling of its neighbour."""
    matrix = ["| | " + " | ".join(SCHEMES) + " |", "|---" * (len(SCHEMES) + 1) + "|"]
    matrix += [f"| {name} |" + " ✓ |" * len(SCHEMES) for name in PRODUCERS]
    spellings = ["- " + "; ".join(SPELLINGS)]
    return ["\n".join(matrix), "\n".join(spellings)]


def test_the_documentation_has_these_tables(root: Path) -> None:
    text = (root / "docs" / "patterns.md").read_text()
    for table in tables():
        assert table in text, f"docs/patterns.md should hold:\n{table}"
