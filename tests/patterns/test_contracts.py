"""The promise of a fused site: its unfused graph's numbers, bit for bit, given the same row statistic.

Only the order in which squares are added is free.  Where it cannot show, everything is equal; where it
can, the statistic moves by an ulp or so, and with it few values by one step of what they are rounded to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowering

HIDDEN = 1536
ROUNDINGS = ("once", "twice", "none")


class Spelled(nn.Module):
    """A norm written out with the rounding asked for, then two quantizations of it."""

    def __init__(self, rounding: str, *, add: bool):
        super().__init__()
        weight = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        self.rounding, self.add = rounding, add

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        x = x + residual if self.add else x
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.rounding == "twice":
            y = self.weight * h.to(x.dtype)
        else:
            y = h * self.weight.float()
            y = y.to(x.dtype) if self.rounding == "once" else y
        quantized = torch.ops.lowering.group_quant(y, 128)
        powers = torch.ops.lowering.group_quant(y, 64, scale="ue8m0")
        return (*quantized, *powers, x) if self.add else (*quantized, *powers)


def outputs(rounding: str, add: bool, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the compiled program computes, and what eager does; every site fused into one kernel."""
    model = Spelled(rounding, add=add)
    compiled = lowering.compile(model, inputs)
    assert compiled.report.summary() == {"fused": 3, "unfused": 0, "dispatches": 1}
    assert compiled.report.sites[0].contract.rounding == rounding  # pyright: ignore
    return list(lowering.load(compiled.vmfb)(*inputs)), list(model(*inputs))


def steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable values apart two tensors of finite floats are."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]

    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.contiguous().view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return (ordered(a) - ordered(b)).abs()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add norm"])
def test_equal_where_every_order_of_summation_gives_the_same_statistic(rounding: str, add: bool) -> None:
    x, residual = (torch.randint(-8, 9, (64, HIDDEN)).bfloat16() for _ in range(2))
    for ours, eager in zip(*outputs(rounding, add, x, residual), strict=True):
        assert torch.equal(ours.view(torch.uint8), eager.view(torch.uint8))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bounds_where_the_order_can_show(rounding: str) -> None:
    """Scales within an ulp of the type y was rounded to; codes within a step, and fewer than 1 in 10,000."""
    x, residual = torch.randn(1024, HIDDEN).bfloat16(), torch.randn(1024, HIDDEN).bfloat16()
    ours, eager = outputs(rounding, True, x, residual)
    assert torch.equal(ours.pop(), eager.pop())  # the sum
    # A bfloat16 y hides the statistic's last bits, or moves by a whole ulp.  An unrounded one shows them:
    # eager's own sum of 1536 squares is up to 3 ulps of the scale off the exact one, as is the kernel's.
    ulp = 6 if rounding == "none" else 2**16
    for codes, scales in ((0, 1), (2, 3)):
        moved = steps(ours[codes], eager[codes])
        same_scale = (steps(ours[scales], eager[scales]) == 0).repeat_interleave(
            HIDDEN // ours[scales].shape[-1], -1
        )
        assert moved[same_scale].max() <= 1 and (moved > 0).float().mean() < 1e-4
        apart = steps(ours[scales], eager[scales])
        assert apart.max() <= ulp if codes == 0 else (apart > 0).sum() <= 1
