"""Whether the results of a compiled program are those of eager PyTorch; one sentence where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch

from . import evaluate

# Sums in another order, a product and a sum rounded once, other approximations of functions, relative to a
# result in float32.  The larger shows what happens rarely, such as a code that is a step off.
_NOISES = (2.0**-21,) * 3 + (2.0**-19,) * 3
_LARGE_NOISES = (2.0**-14,) * 2  # show how far a flip moves a value, wherever it happens
_FACTOR = 6.0  # how often the largest error of these few draws
_STEP = {
    torch.float32: 2.0**-20,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}  # of an element's magnitude
_SHARE = (
    0.01  # of the elements may be further off, by no more than such a flip or eager's distance from float64
)
_CODES = 2e-3


class Reference:
    """Eager's results for some arguments and, where ours are others, what those may be off."""

    def __init__(self, module: Callable[..., Any], args: Sequence[torch.Tensor]) -> None:
        self.module, self.args = module, _copies(args)
        self.eager = _Eager(module, self.args)
        self.results = self.eager.results

    @cached_property
    def flushed(self) -> tuple[_Eager, _Eager]:
        """Eager where denormals are zero, as they are in a program on the CPU: all, and those given.

        The second since functions that add up in two parts, such as ``atan2``, need denormals inside.
        """
        args = _copies(self.args, evaluate.without_denormals)
        return _Eager(self.module, args, evaluate.flushing), _Eager(self.module, args)

    def problem(self, index: int, ours: torch.Tensor) -> str | None:
        """Give what is wrong with ``ours`` as result ``index``."""
        eager = self.results[index]
        if ours.shape != eager.shape:
            return f"shape: {tuple(ours.shape)} for {tuple(eager.shape)}"
        if ours.dtype != eager.dtype:
            return f"dtype: {ours.dtype} for {eager.dtype}"
        if same(ours, eager):
            return None
        zeros: list[tuple[torch.Tensor, _Eager]] = []
        for flushed in self.flushed:
            zero = _nearer(ours, flushed.results[index], eager)
            eager = _where(zero, flushed.results[index], eager)
            zeros += [(zero, flushed)] if bool(zero.any()) else []

        def chosen(runs: Callable[[_Eager], list[list[torch.Tensor]]]) -> list[torch.Tensor]:
            """Results of ``runs``, each element with denormals or without as ``ours`` seems to be."""
            made = [run[index] for run in runs(self.eager)]
            for zero, flushed in zeros:
                made = [_where(zero, run[index], m) for run, m in zip(runs(flushed), made, strict=True)]
            return made

        draws = chosen(lambda eager: eager.draws)
        if not eager.dtype.is_floating_point:
            return _integers(ours, eager, draws, chosen(lambda eager: eager.orders))
        one = _alone(ours, eager)
        if _share(one) > 4 * max(_share(_alone(draw, eager)) for draw in draws):
            return f"NaN: {_share(one):.2%} of the elements are NaN on one side alone"
        ours = _where(one, eager, ours)  # the others are still to be judged
        if eager.dtype.itemsize == 1:
            return _codes(ours, eager, draws)
        return _floats(ours, eager, draws, chosen(lambda eager: eager.far))


class _Eager:
    """Eager's results for some arguments in a ``setting`` of the processor, and others it could give."""

    def __init__(
        self,
        module: Callable[..., Any],
        args: Sequence[torch.Tensor],
        setting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.module, self.args, self.setting = module, args, setting
        with torch.no_grad(), setting():
            self.results: list[torch.Tensor] = list(module(*_copies(args)))

    @cached_property
    def draws(self) -> list[list[torch.Tensor]]:
        """With other roundings."""
        return self._disturbed(_NOISES)

    @cached_property
    def orders(self) -> list[list[torch.Tensor]]:
        """With another order of equal elements."""
        return self._disturbed((0.0,) * len(_NOISES))

    @cached_property
    def far(self) -> list[list[torch.Tensor]]:
        """Tell where a rounding leads that goes another way, and float64."""
        exact = evaluate.in_float64(self.module, _copies(self.args))
        return [*self._disturbed(_LARGE_NOISES), *([exact] if exact is not None else [])]

    def _disturbed(self, noises: Sequence[float]) -> list[list[torch.Tensor]]:
        with self.setting():
            return [
                evaluate.disturbed(self.module, _copies(self.args), seed, noise)
                for seed, noise in enumerate(noises)
            ]


def _copies(
    args: Sequence[torch.Tensor], copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> list[torch.Tensor]:
    """Copies; a tensor that is given twice is one tensor again."""
    made: dict[int, torch.Tensor] = {}
    return [made.setdefault(id(a), copy(a)) for a in args]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether all values are equal, a NaN being equal to a NaN."""
    if a.dtype.is_floating_point:
        a, b = a.double(), b.double()
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def _where(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elements of ``a`` where ``mask`` is, also of the types that PyTorch does not choose among."""
    if a.dtype.itemsize > 1:
        return torch.where(mask, a, b)
    return torch.where(mask, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)


def _nearer(ours: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The elements of ``ours`` that are nearer to ``a`` than to ``b``."""
    return _distance(ours.double(), a.double()) < _distance(ours.double(), b.double())


def _alone(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tell where one of the two is NaN and the other is not."""
    return a.float().isnan() != b.float().isnan()


def _share(mask: torch.Tensor) -> float:
    return float(mask.float().mean()) if mask.numel() else 0.0


def _integers(
    ours: torch.Tensor, eager: torch.Tensor, draws: list[torch.Tensor], orders: list[torch.Tensor]
) -> str | None:
    """int8 may be a code, and anything may come from a comparison: what other roundings move may move, and
    what another order of equal elements does.
    """
    if eager.dtype == torch.int8:
        return _codes(ours, eager, draws)
    moved = torch.stack([draw != eager for draw in draws]).any(0)
    wrong = (ours != eager) & ~moved & ~torch.stack([order != eager for order in orders]).any(0)
    allowed = 4 * _share(moved)
    if _share(wrong) > allowed:
        return f"integers: {int(wrong.sum())} of {eager.numel()} differ"
    return None


def _ordinals(t: torch.Tensor) -> torch.Tensor:
    """The place of each value among those of its type."""
    if t.dtype == torch.int8:
        return t.to(torch.int16)
    bits = t.contiguous().view(torch.uint8).to(torch.int16)
    magnitude = torch.where(t.float().isnan(), 0, bits & 0x7F)  # a NaN has no place, nor a sign
    return torch.where(bits >= 0x80, -magnitude, magnitude)


def _codes(ours: torch.Tensor, eager: torch.Tensor, draws: list[torch.Tensor]) -> str | None:
    """One step, in few elements, unless other roundings of eager itself do more."""
    steps = (_ordinals(ours) - _ordinals(eager)).abs()
    drawn = [(_ordinals(draw) - _ordinals(eager)).abs() for draw in draws]
    allowed = max(1, *(2 * int(d.max()) for d in drawn))
    share, usual = _share(steps > 0), max(_share(d > 0) for d in drawn)
    if int(steps.max()) > allowed:
        return f"codes: {int(steps.max())} steps, {allowed} allowed, in {share:.2%}"
    if share > max(_CODES, 4 * usual) and int((steps > 0).sum()) > 1:
        return f"codes: {share:.2%} differ, {max(_CODES, 4 * usual):.2%} allowed"
    return None


def _floats(
    ours: torch.Tensor, eager: torch.Tensor, draws: list[torch.Tensor], far: list[torch.Tensor]
) -> str | None:
    """The error against what other roundings do to eager; in few elements against how ``far`` they lead.

    The first knows of the roundings that the model asks for: one that is left out moves many elements.
    """
    a, e = ours.double(), eager.double()
    away = torch.stack([_distance(draw.double(), e) for draw in draws])
    settled = away.isfinite().all(0)
    off = torch.where(settled, _distance(a, e), 0.0)
    if not bool(off.isfinite().all()):
        return f"infinite: {_share(~off.isfinite()):.2%} of the elements are, on one side alone"
    reach, largest = _finite(away).amax(0), float(_finite(e).abs().max())
    tiny = torch.finfo(torch.float32).tiny
    allowed = _FACTOR * torch.maximum(reach, _mean_of_row(reach)) + tiny
    allowed += _STEP[torch.float32] * e.abs()  # below the step of a 16-bit result
    usual = max(_share(away[n] > _FACTOR * _others(away, n) + allowed) for n in range(len(draws)))
    share, most = _share(off > allowed), max(_SHARE, 4 * usual)
    if share > most and int((off > allowed).sum()) > 4:
        return f"values: {share:.2%} off by more than roundings, {most:.2%} allowed; {_by(off, largest)}"
    for other in far:
        reach = torch.maximum(reach, _finite(_distance(other.double(), e)))
    limit = _FACTOR * _largest_of_row(reach) + 2 * _STEP.get(eager.dtype, 0.0) * e.abs() + tiny
    if bool((off > limit).any()):
        return f"values: {_share(off > limit):.2%} further off than a flip or float64; {_by(off, largest)}"
    return None


def _others(away: torch.Tensor, number: int) -> torch.Tensor:
    """The largest of all draws but one."""
    return torch.cat([away[:number], away[number + 1 :]]).nan_to_num(0.0, 0.0).amax(0)


def _by(off: torch.Tensor, largest: float) -> str:
    return f"by up to {float(off.max()):.1e} of {largest:.1e}"


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b|, of equal infinities and of two NaN zero; infinite where only one is finite."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(torch.inf, torch.inf))


def _finite(t: torch.Tensor) -> torch.Tensor:
    return torch.where(t.isfinite(), t, 0.0)


def _mean_of_row(t: torch.Tensor) -> torch.Tensor:
    return t.mean(-1, keepdim=True) if t.dim() else t


def _largest_of_row(t: torch.Tensor) -> torch.Tensor:
    return t.amax(-1, keepdim=True) if t.dim() else t


def strides_problem(ours: torch.Tensor, eager: torch.Tensor, *, strided: bool) -> str | None:
    """Compare strides: eager's where eager is contiguous, and where the model asked for a layout."""
    if not strided and not eager.is_contiguous():
        return None
    pairs = zip(ours.shape, ours.stride(), eager.stride(), strict=True)
    if any(size > 1 and a != b for size, a, b in pairs) and eager.numel():
        return f"strides: {ours.stride()} for {eager.stride()} of {tuple(eager.shape)}"
    return None
