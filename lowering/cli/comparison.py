"""Say how far one tensor is from another, and whether that is more than it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_E8M0 = torch.float8_e8m0fnu

LIMIT = 4.0
"""Times what was measured: two differences of a size differ by sqrt(2) of it, and samples are few."""

# Beside that, as fractions of the largest value: a few hundred roundings of 2^-24, some in sequence, and one
# step of a 16-bit type, which a sum that lies on its boundary takes.
_FLOOR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Of the elements of a type with few bits this many may move: the last bit of a sum before the rounding is on
# a boundary once in thousands of elements.
_MOVED = 2e-3


@dataclass(frozen=True)
class Output:
    """Hold how one output compares; ``problem`` is a sentence when it does not hold up, else None."""

    index: int
    dtype: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    differing: float
    allowed: str
    problem: str | None
    call: str = ""


@dataclass(frozen=True)
class Comparison:
    """All outputs of all calls, compiled beside eager."""

    outputs: tuple[Output, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Tell whether every output is within its tolerance."""
        return all(output.problem is None for output in self.outputs)

    def table(self) -> str:
        """The comparison as text, one line per output."""
        head = ("output", "type", "shape", "max abs", "max rel", "differ", "allowed", "")
        rows = [head, *(_cells(output) for output in self.outputs)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        worst = max((output.max_rel for output in self.outputs), default=0.0)
        same = sum(output.differing == 0 for output in self.outputs)
        found = f"{len(self.outputs)} outputs agree ({same} bit for bit, largest relative error {worst:.1e})"
        return "; ".join((found, *self.notes))


@dataclass(frozen=True)
class _Distance:
    """Measure how far two tensors are apart, over the elements that are finite in both."""

    largest: float
    typical: float  # root mean square
    differing: float
    steps: int

    def most(self, other: _Distance) -> _Distance:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Distance(*(max(one, more) for one, more in pairs))


def compare(
    index: int, actual: torch.Tensor, expected: torch.Tensor, yardsticks: Sequence[torch.Tensor] = ()
) -> Output:
    """One output beside eager's; ``yardsticks``: what else is right, the exact evaluation first."""
    kind, shape = _name(expected.dtype), tuple(expected.shape)
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        problem = f"is {_name(actual.dtype)} {list(actual.shape)}, eager gives {kind} {list(shape)}"
        return Output(index, kind, shape, 0.0, 0.0, 0.0, "", problem)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    others = [tensor.detach().cpu() for tensor in yardsticks if tensor.shape == expected.shape]
    found, measured = _distance(actual, expected), _Distance(0.0, 0.0, 0.0, 0)
    for other in others:
        measured = measured.most(_distance(other, expected))
    if others and (nearer := _distance(actual, others[0])).typical < found.typical:
        found = replace(nearer, differing=min(found.differing, nearer.differing))
    allowed = _allowed(expected, measured)
    largest = _largest(expected) or 1.0
    problem = _strange(actual, [expected, *others]) or _problem(expected.dtype, found, allowed, largest)
    if problem and expected.numel():
        problem += f"; the furthest at {_where(actual, expected)}"
    relative, words = found.largest / largest, _words(expected.dtype, allowed, largest)
    return Output(index, kind, shape, found.largest, relative, found.differing, words, problem)


def _allowed(expected: torch.Tensor, measured: _Distance) -> _Distance:
    floor = _FLOOR.get(expected.dtype, 0.0)
    largest, typical = _largest(expected), _distance(expected, torch.zeros_like(expected)).typical
    return _Distance(
        floor * largest + LIMIT * measured.largest,
        floor * typical + LIMIT * measured.typical,
        # One element that moves is never a verdict.
        max(_MOVED, LIMIT * measured.differing, 1.5 / max(expected.numel(), 1)),
        max(1, 2 * measured.steps),
    )


def _problem(dtype: torch.dtype, found: _Distance, allowed: _Distance, largest: float) -> str | None:
    """Say what is too much, errors as fractions of the largest value; None if nothing is."""
    few_bits = _is_small(dtype) or dtype in (torch.bfloat16, torch.float16)
    if not dtype.is_floating_point:
        over = found.differing > (allowed.differing if allowed.largest else 0.0)
        return f"{found.differing:.2%} of the elements differ" if over else None
    if _is_small(dtype) and found.steps > allowed.steps:
        return f"differs by up to {found.steps} representable values, {allowed.steps} allowed"
    if few_bits and found.differing > allowed.differing:
        return f"{found.differing:.2%} of the elements differ, {allowed.differing:.2%} allowed"
    if _is_small(dtype):
        return None
    if found.largest > allowed.largest:
        return f"relative error {found.largest / largest:.1e}, {allowed.largest / largest:.1e} allowed"
    if found.typical > allowed.typical:
        typical, most = found.typical / largest, allowed.typical / largest
        return f"relative error {typical:.1e} (root mean square), {most:.1e} allowed"
    return None


def _strange(actual: torch.Tensor, right: Sequence[torch.Tensor]) -> str | None:
    """Say where ``actual`` is NaN or infinite and no right evaluation is the same, or the other way round."""
    if not actual.is_floating_point():
        return None
    unlike = torch.ones(actual.shape, dtype=torch.bool)
    for other in right:
        unlike &= _differ(actual, other) & ~(_isfinite(actual) & _isfinite(other))
    share = _fraction(unlike)
    return f"{share:.2%} of the elements are infinite or NaN on one side only" if share else None


def _where(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """The element that is furthest off: its place and the two values."""
    differ = _differ(actual, expected)
    if not bool(differ.any()):
        return "no element"
    off = (_plain(actual) - _plain(expected)).abs().nan_to_num(torch.inf, torch.inf)
    flat = int(torch.where(differ, off, -1.0).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape)]
    one, other = (float(_plain(t).reshape(-1)[flat]) for t in (actual, expected))
    return f"{place}: {one:.6g}, eager {other:.6g}"


def _words(dtype: torch.dtype, allowed: _Distance, largest: float) -> str:
    if _is_small(dtype):
        return f"{allowed.steps} step, in {allowed.differing:.2%}"
    if not dtype.is_floating_point:
        return f"{allowed.differing:.2%}" if allowed.largest else "equal"
    return f"{allowed.largest / largest:.1e}"


# Arithmetic -------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit, any NaN being as good as another."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return not bool(_differ(one, other.to(one.device)).any())


def _differ(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mark where the values are not the same; a NaN is the same as a NaN."""
    if _is_small(expected.dtype):
        return _bits(actual) != _bits(expected)
    return (actual != expected) & ~((actual != actual) & (expected != expected))


def _isfinite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor.float() if _is_small(tensor.dtype) else tensor)


def _is_small(dtype: torch.dtype) -> bool:
    return dtype in _FP8 or dtype == _E8M0


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _ordinal(tensor: torch.Tensor) -> torch.Tensor:
    """The index of each value among those its type can represent: neighbours differ by one."""
    bits = _bits(tensor).to(torch.int16)
    if tensor.dtype == _E8M0:  # no sign
        return bits
    magnitude = bits & 0x7F
    return torch.where(bits >= 0x80, -magnitude, magnitude)


def _fraction(mask: torch.Tensor) -> float:
    return float(mask.float().mean()) if mask.numel() else 0.0


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Widen to float64; of e8m0, take the exponents."""
    return (_bits(tensor) if tensor.dtype == _E8M0 else tensor).double()


def _largest(tensor: torch.Tensor) -> float:
    return _distance(tensor, torch.zeros_like(tensor)).largest


def _distance(one: torch.Tensor, other: torch.Tensor) -> _Distance:
    if not one.numel():
        return _Distance(0.0, 0.0, 0.0, 0)
    a, b = _plain(one), _plain(other)
    off = torch.where(torch.isfinite(a) & torch.isfinite(b), (a - b).abs(), 0.0)
    steps = int((_ordinal(one) - _ordinal(other)).abs().max()) if _is_small(one.dtype) else 0
    typical = float(off.square().mean().sqrt())
    return _Distance(float(off.max()), typical, _fraction(_differ(one, other)), steps)


def _cells(output: Output) -> tuple[str, ...]:
    return (
        f"{output.index}{output.call}",
        output.dtype,
        "x".join(map(str, output.shape)) or "scalar",
        f"{output.max_abs:.2e}",
        f"{output.max_rel:.1e}",
        f"{output.differing:.3%}",
        output.allowed,
        "ok" if output.problem is None else "DIFFERS",
    )
