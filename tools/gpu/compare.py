"""Tell how far a compiled result may be from eager PyTorch, and why.

A row's statistic is a sum whose order is free, so the kernel's 1/rms and torch's differ by a few units
in the last place of float32 (torch's own CPU and CUDA results differ as much, and so do square roots and
divisions where those are not correctly rounded).  That moves a few in 100,000 values across a rounding
boundary of bfloat16:

sum     no statistic in it: equal, bit for bit.
y       equal but for some values, which are off by one unit in the last place of bfloat16.
scale   within one unit in the last place of float32, except in groups whose largest value is one of
        those that moved: there it is off by one unit of bfloat16, 2^-7 of its value at most.
q       at most one fp8 step off, in fewer than 1 of 10,000 elements (or in the elements of one group).
logits  two different roundings of one function: no further from the same model in float32 than three
        times what eager bfloat16 is.
tokens  the greedy choice is float32's wherever that leads by more than twice eager's largest error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
MOVED_VALUES = 1e-3  # a generous bound on that one in 20,000, for y and scale
MOVED_CODES = 1e-4  # an fp8 step is 16 times as wide as bfloat16's, so fewer codes move
BF16_STEP = 2.0**-7
LOGITS_FACTOR = 3.0

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INTEGERS |= {torch.float8_e4m3fn: torch.int8}


@dataclass(frozen=True)
class Difference:
    """One output beside its reference.

    different: elements that are not equal.  largest: how far apart, in ``unit``.
    problem: None when within limits.
    """

    name: str
    elements: int
    different: int
    largest: float
    unit: str
    problem: str | None = None

    def __str__(self) -> str:
        amount = f" by {self.largest:.3g} {self.unit}" if self.different else ""
        return f"{self.name} {self.different}/{self.elements}{amount}"


def steps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values lie between the elements of ``a`` and ``b``; +0 and -0 are the same."""
    return (_ordinal(a) - _ordinal(b)).abs()


def _ordinal(values: Tensor) -> Tensor:
    """Integers that order as the floats do."""
    bits = values.contiguous().view(_INTEGERS[values.dtype]).to(torch.int64)
    magnitude = bits & (2 ** (8 * values.element_size() - 1) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def compare(name: str, actual: Tensor, expected: Tensor) -> Difference:
    """Compare one output of a norm + quantization; ``name`` (less its digits) says which limits hold."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        found = f"{actual.dtype}{list(actual.shape)} instead of {expected.dtype}{list(expected.shape)}"
        return Difference(name, expected.numel(), expected.numel(), float("inf"), "steps", found)
    if expected.numel() == 0:
        return Difference(name, 0, 0, 0.0, "steps")
    distance = steps(actual, expected)
    different, largest = int((distance != 0).sum()), float(distance.max())
    problem = _nan_problem(actual, expected) or _LIMITS[name.rstrip("0123456789")](actual, expected, distance)
    return Difference(name, expected.numel(), different, largest, "steps", problem)


def _nan_problem(actual: Tensor, expected: Tensor) -> str | None:
    different = int((actual.float().isnan() != expected.float().isnan()).sum())
    return f"NaN in {different} places where only one side has it" if different else None


def _sum_problem(actual: Tensor, expected: Tensor, distance: Tensor) -> str | None:
    return None if int(distance.max()) == 0 else "the residual sum is not equal"


def _y_problem(actual: Tensor, expected: Tensor, distance: Tensor) -> str | None:
    return _few_and_near(distance, 1, max(1.0, MOVED_VALUES * distance.numel()))


def _q_problem(actual: Tensor, expected: Tensor, distance: Tensor) -> str | None:
    return _few_and_near(distance, 1, max(GROUP, MOVED_CODES * distance.numel()))


def _few_and_near(distance: Tensor, nearest: int, most: float) -> str | None:
    different, largest = int((distance != 0).sum()), int(distance.max())
    if largest > nearest:
        return f"{largest} steps apart"
    return f"{different} elements differ, {most:.0f} may" if different > most else None


def _scale_problem(actual: Tensor, expected: Tensor, distance: Tensor) -> str | None:
    moved = distance > 1
    count, most = int(moved.sum()), max(1.0, MOVED_VALUES * distance.numel())
    if count > most:
        return f"{count} scales differ by more than one unit in the last place, {most:.0f} may"
    relative = ((actual - expected).abs() / expected)[moved]
    if count and float(relative.max()) > BF16_STEP:
        return f"a scale is off by {float(relative.max()):.2g} of its value"
    return None


_LIMITS = {"sum": _sum_problem, "y": _y_problem, "q": _q_problem, "scale": _scale_problem}
# Moved, or rounded once.
_LIMITS |= dict.fromkeys(("moved", "cleared", "filled", "scaled", "first", "second"), _sum_problem)


def compare_all(
    names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor]
) -> list[Difference]:
    """One Difference per output, and one more where outputs that must be the same are not."""
    found = [compare(name, a, e) for name, a, e in zip(names, actual, expected, strict=True)]
    first: Mapping[str, int] = {name: index for index, name in reversed(list(enumerate(names)))}
    for index, name in enumerate(names):
        twin = actual[first[name]]
        if index != first[name] and int(steps(actual[index], twin).sum() if twin.numel() else 0):
            count = twin.numel()
            found.append(Difference(f"{name} twice", count, count, 0.0, "steps", "the two copies differ"))
    return found


def compare_logits(actual: Tensor, eager: Tensor, exact: Tensor) -> list[Difference]:
    """Logits of the program and of eager, both beside the same model in float32."""
    actual, eager = actual.float(), eager.float()
    if not bool(actual.isfinite().all()):
        return [Difference("logits", actual.numel(), actual.numel(), float("inf"), "", "not all finite")]
    ours, theirs = (actual - exact).abs().max().item(), (eager - exact).abs().max().item()
    rms_ours, rms_theirs = (_rms(values - exact) for values in (actual, eager))
    problem = None
    if ours > LOGITS_FACTOR * theirs or rms_ours > LOGITS_FACTOR * rms_theirs:
        problem = f"off by {ours:.3g} (rms {rms_ours:.3g}), eager only by {theirs:.3g} (rms {rms_theirs:.3g})"
    best = exact.topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > 2 * theirs
    chosen = actual.argmax(-1)
    missed = int((clear & (chosen != exact.argmax(-1))).sum())
    unequal = int((chosen != eager.argmax(-1)).sum())
    wrong = f"{missed} of {int(clear.sum())} clear choices are wrong" if missed else None
    ratio = ours / max(theirs, 1e-30)
    return [
        Difference("logits", actual.numel(), int((actual != eager).sum()), ratio, "x eager", problem),
        Difference("tokens", chosen.numel(), unequal, 0.0, f"where {int(clear.sum())} are clear", wrong),
    ]


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
