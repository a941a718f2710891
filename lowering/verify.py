"""Run the compiled program and the eager model on the same arguments and say how far apart they are.

Both are the same sequence of roundings, but sums are taken in another order, so the last bit of a
float may differ.  Where a quantization follows, such a bit can move a value across a rounding boundary: that
is one whole fp8 step, and it is legitimate as long as it is rare.  The tolerances below say how
much of that is accepted; anything beyond is a wrong program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .errors import UsageError, VerificationError

if TYPE_CHECKING:
    from .report import Report
    from .targets import Target

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Tolerance:
    """What two outputs may differ by.

    error
        largest |compiled - eager| as a fraction of the largest |eager| in the output.
    steps, fraction
        for element types of a few bits: no element further than ``steps`` representable values, and
        at most this fraction of elements different at all.
    """

    error: float = 0.0
    steps: int = 0
    fraction: float = 0.0

    def __str__(self) -> str:
        if self.steps:
            return f"{self.steps} step, in {self.fraction:.2%}"
        return f"{self.error:.1e}" if self.error else "equal"


# Another order of the same float32 sums: a few hundred roundings of 2^-24, some in sequence.
# 16-bit types round at every operation, so an output is allowed two steps at the largest magnitude.
_FLOAT = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 2 * 2.0**-8,
    torch.float16: 2 * 2.0**-10,
}
# With quantizations inside the model an input on a rounding boundary moves by a whole fp8 step, 2^-3
# of its value at most; a sum over a row of such values averages that down, by how much depends on the
# model.  A kernel that is wrong in a group, a scale or a row is off by the magnitude itself.
_AFTER_QUANTIZATION = 0.05
# A quantized value moves when the last bit of the norm before it does, which is a matter of once in
# thousands of elements, or together with its group when that bit belongs to the group's largest.
_QUANTIZED = Tolerance(steps=1, fraction=1e-3)


def tolerance(dtype: torch.dtype, *, quantized: bool) -> Tolerance:
    """The tolerance for an output of ``dtype``; ``quantized``: the model quantizes somewhere inside."""
    if dtype in _FP8:
        return _QUANTIZED
    if dtype == _E8M0:
        return Tolerance(steps=1, fraction=1e-3)
    if dtype in _FLOAT:
        return Tolerance(error=max(_FLOAT[dtype], _AFTER_QUANTIZATION if quantized else 0.0))
    return Tolerance()


@dataclass(frozen=True)
class Output:
    """How one output compares; ``problem`` is a sentence when it does not hold up, else None."""

    index: int
    dtype: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    differing: float
    allowed: str
    problem: str | None


@dataclass(frozen=True)
class Comparison:
    """All outputs of one run, compiled beside eager."""

    outputs: tuple[Output, ...]

    @property
    def ok(self) -> bool:
        """Whether every output is within its tolerance."""
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
        return f"{len(self.outputs)} outputs agree ({same} bit for bit, largest relative error {worst:.1e})"


def verify(
    program: Callable[..., Any],
    module: torch.nn.Module,
    args: Sequence[Any],
    *,
    quantized: bool | None = None,
) -> Comparison:
    """Compare ``program(*args)`` with ``module(*args)``; raise VerificationError where they differ.

    ``quantized`` says whether the model quantizes activations inside, which decides the tolerance
    of float outputs; None looks for fp8 weights and outputs.
    """
    with torch.no_grad():
        # Each run gets its own copy: a model may write into its arguments.
        expected = _tensors(module(*_copies(args)))
        actual = _tensors(program(*_copies(args)))
    if quantized is None:
        held = (*module.state_dict().values(), *expected)
        quantized = any(isinstance(t, torch.Tensor) and t.dtype in _FP8 for t in held)
    if len(actual) != len(expected):
        raise VerificationError(
            f"the compiled program returns {len(actual)} tensors, the eager model {len(expected)}"
        )
    pairs = enumerate(zip(actual, expected, strict=True))
    comparison = Comparison(tuple(compare(i, a, e, quantized=quantized) for i, (a, e) in pairs))
    if not comparison.ok:
        problems = "\n".join(f"  output {o.index}: {o.problem}" for o in comparison.outputs if o.problem)
        raise VerificationError(
            f"the compiled program and the eager model differ\n{problems}\n\n{comparison.table()}"
        )
    return comparison


def is_quantized(report: Report) -> bool:
    """Whether the program quantizes activations, as its report tells."""
    return any(site.op.endswith("quant") for site in report.sites)


def require_device(target: Target) -> torch.device:
    """The torch device a program for ``target`` runs on; UsageError if this machine has none.

    Verification is a request this machine may be unable to serve, so that is an error of usage
    (exit 2), known before anything is compiled, and not a failed verification (exit 4).
    """
    if target.backend == "cpu":
        return torch.device("cpu")
    is_hip = torch.version.hip is not None
    if torch.cuda.is_available() and is_hip == (target.backend == "hip"):
        return torch.device("cuda")
    kind = "AMD GPU that PyTorch for ROCm" if target.backend == "hip" else "NVIDIA GPU that PyTorch for CUDA"
    raise UsageError(
        f"--verify runs the program, and this machine has no {kind} can use; "
        f"compile for {target.name} without --verify, or run the command where the device is"
    )


def compare(index: int, actual: torch.Tensor, expected: torch.Tensor, *, quantized: bool) -> Output:
    """One output beside its reference."""
    allowed = tolerance(expected.dtype, quantized=quantized)
    kind, shape = _name(expected.dtype), tuple(expected.shape)
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        problem = f"is {_name(actual.dtype)} {list(actual.shape)}, eager gives {kind} {list(shape)}"
        return Output(index, kind, shape, 0.0, 0.0, 0.0, str(allowed), problem)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    max_abs, max_rel = _errors(actual, expected)
    differing = _fraction(_differ(actual, expected))
    problem = _problem(actual, expected, allowed, max_rel, differing)
    return Output(index, kind, shape, max_abs, max_rel, differing, str(allowed), problem)


def _problem(
    actual: torch.Tensor, expected: torch.Tensor, allowed: Tolerance, max_rel: float, differing: float
) -> str | None:
    if not expected.is_floating_point():
        return f"{differing:.2%} of the elements differ; they must be equal" if differing else None
    strange = _fraction(_differ(actual, expected) & ~(_isfinite(actual) & _isfinite(expected)))
    if strange:
        return f"{strange:.2%} of the elements are infinite or NaN on one side only"
    if not _is_small(expected.dtype):
        over = max_rel > allowed.error
        return f"relative error {max_rel:.1e}, {allowed.error:.1e} allowed" if over else None
    steps = int((_ordinal(actual) - _ordinal(expected)).abs().max()) if expected.numel() else 0
    if steps > allowed.steps:
        return f"differs by up to {steps} representable values, {allowed.steps} allowed"
    if differing > allowed.fraction and differing * expected.numel() > 1:  # one flip is never a verdict
        return f"{differing:.2%} of the elements differ, {allowed.fraction:.2%} allowed"
    return None


# Arithmetic -------------------------------------------------------------------------------------


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _copies(args: Iterable[Any]) -> list[Any]:
    return pytree.tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, list(args))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _differ(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where the values are not the same; a NaN is the same as a NaN."""
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


def _errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Largest |difference|, and the same as a fraction of the largest |expected|, over finite values."""
    if not expected.numel():
        return 0.0, 0.0
    if expected.dtype == _E8M0:  # exponents: compare them as such
        actual, expected = _bits(actual), _bits(expected)
    a, e = actual.double(), expected.double()
    finite = torch.isfinite(a) & torch.isfinite(e)
    zero = torch.zeros((), dtype=torch.float64)
    difference = float(torch.where(finite, (a - e).abs(), zero).max())
    largest = float(torch.where(finite, e.abs(), zero).max())
    return difference, difference / largest if largest else difference


def _cells(output: Output) -> tuple[str, ...]:
    return (
        str(output.index),
        output.dtype,
        "x".join(map(str, output.shape)) or "scalar",
        f"{output.max_abs:.2e}",
        f"{output.max_rel:.1e}",
        f"{output.differing:.3%}",
        output.allowed,
        "ok" if output.problem is None else "DIFFERS",
    )
