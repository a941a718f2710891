"""Run the compiled program beside the eager model and say how far apart they are, and how far they may be.

Both are the same sequence of roundings, but sums are taken in another order, so the last bit of a float may
differ, and a model makes of that what it makes: nothing, or another fp8 code, or another expert.  How much is
legitimate is therefore measured on the model itself (``sensitivity``).  The program may be at most ``LIMIT``
times as far from eager, or from the exact evaluation, as eager's other evaluations are from eager.

The program is called twice with the arguments given, and with other sizes where they may differ; it must
leave its arguments as they are and give the same results again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..containers import Names, register, select
from ..errors import LoweringError, UsageError, VerificationError
from ..importing.sizes import Call, other_arguments
from ..runtime.program import Program
from .sensitivity import exact, nudged, plain, state_kept

if TYPE_CHECKING:
    from ..targets import Target

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_E8M0 = torch.float8_e8m0fnu

LIMIT = 4.0
"""Times what was measured: two differences of a size differ by sqrt(2) of it, and samples are few."""
_SAMPLES = 4
_MORE_SAMPLES, _FURTHER = 8, 4.0
"""Before a program is called wrong: a value that lies close to a boundary crosses it in few samples."""

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


def verify(
    program: Callable[..., Any],
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    output: Names | None = None,
    function: str | None = None,
    beside: Sequence[torch.nn.Module] = (),
) -> Comparison:
    """Compare ``program`` with ``module`` on these arguments; raise VerificationError where they differ.

    dynamic_shapes: as for torch.export; where it leaves a size open, other sizes are tried as well.
    output: what the program keeps of the model's result, as for ``lowering.compile``.  function: the one that
    the module became, of several.  beside: the modules of the others, which name the state they share.
    """
    notes = []
    call = Call(tuple(args), dict(kwargs or {}))
    if isinstance(program, Program):
        program = _Function(program, function)
    part = _Part(module, output, _kept(program, [module, *beside]))
    with torch.no_grad():
        outputs = _compared(program, part, call, "")
        other = other_arguments(call.args, dynamic_shapes, call.kwargs)
        if other is not None:
            sizes, more = _with_other_sizes(program, part, other)
            notes.append(f"called with {sizes} too" if more else f"no other sizes: {sizes}")
            outputs += more
    comparison = Comparison(tuple(outputs), tuple(notes))
    if not comparison.ok:
        of = f"'s function {function}" if function else ""
        problems = "\n".join(
            f"  output {o.index}{o.call}: {o.problem}" for o in comparison.outputs if o.problem
        )
        raise VerificationError(
            f"the compiled program{of} and the eager model differ\n{problems}\n\n{comparison.table()}\n"
            f"allowed: {LIMIT:g} x what eager itself changes by when the last bits of its sums do"
        )
    return comparison


@dataclass(frozen=True)
class _Part:
    """A model, what is kept of its result, and its buffers that are the program's state, by name."""

    module: torch.nn.Module
    output: Names | None
    state: dict[str, torch.Tensor]

    def __call__(self, call: Call) -> Any:
        result = self.module(*call.args, **call.kwargs)
        return register(result if self.output is None else select(result, self.output))


class _Refused(VerificationError):
    """The program does not take these arguments."""


def _with_other_sizes(
    program: Callable[..., Any], model: _Part, candidates: Iterable[tuple[str, Call]]
) -> tuple[str, list[Output]]:
    """Compare the outputs for the first candidate that both take; sizes that eager refuses do not count."""
    refused = ""
    for sizes, call in candidates:
        try:
            with state_kept(model.module):
                model(_copies(call))
        except Exception as error:  # whatever the model says to arguments it was not written for
            refused = refused or f"with {sizes} eager fails ({_first_line(error)})"
            continue
        try:
            return sizes, _compared(program, model, call, f" with {sizes}")
        except _Refused as error:  # export found that not every size will do
            refused = refused or str(error)
    return refused, []


def _compared(program: Callable[..., Any], model: _Part, call: Call, sizes: str) -> list[Output]:
    """The outputs of a call beside eager's; VerificationError where a second one gives others."""
    looking = plain()
    expected, untouched = _run(model, call, looking)
    mine = _copies(call)
    actual = _called(program, mine, sizes)
    results = len(actual)
    labels = [sizes] * results + [f", the state {name}{sizes}" for name in model.state]
    actual += _values(program).values()
    if untouched:
        _check_arguments(mine, call, sizes)
    else:
        labels += [f", an argument after the call{sizes}"] * len(_tensors(mine))
        actual += _tensors(mine)
    if len(actual) != len(expected):
        raise VerificationError(
            f"the compiled program returns {len(actual)} tensors, the eager model {len(expected)}"
        )
    again = _called(program, _copies(call), sizes)
    for index, tensor in enumerate(again):
        if not _same(tensor, actual[index]):
            raise VerificationError(
                f"output {index}{sizes}: a second call with equal arguments gives other values"
            )
    actual = _in_order(actual, expected, looking.unsorted)
    yardsticks = [_run(model, call, mode)[0] for mode in (exact(), *map(nudged, range(_SAMPLES)))]
    found = _judged(actual, expected, yardsticks)
    if any(output.problem for output in found):
        more = (nudged(_SAMPLES + seed, _FURTHER) for seed in range(_MORE_SAMPLES))
        found = _judged(actual, expected, [*yardsticks, *(_run(model, call, mode)[0] for mode in more)])
    return [replace(output, call=label) for output, label in zip(found, labels, strict=True)]


def _judged(
    actual: list[torch.Tensor], expected: list[torch.Tensor], yardsticks: list[list[torch.Tensor]]
) -> list[Output]:
    pairs = zip(actual, expected, strict=True)
    return [
        compare(index, mine, theirs, [right[index] for right in yardsticks])
        for index, (mine, theirs) in enumerate(pairs)
    ]


def _run(model: _Part, call: Call, mode: Any) -> tuple[list[torch.Tensor], bool]:
    """Evaluate the model as ``mode`` does it, and tell whether it left its arguments alone.

    Gives its results, what it keeps, and its arguments unless it left them alone.
    """
    copies = _copies(call)
    with state_kept(model.module), mode:
        # Cloned: a model may return an argument, a parameter, or a buffer that it writes to.
        results = [tensor.detach().clone() for tensor in _tensors(model(copies))]
        results += [tensor.detach().clone() for tensor in model.state.values()]
    untouched = all(map(_same, _tensors(copies), _tensors(call)))
    return results + ([] if untouched else _tensors(copies)), untouched


@dataclass(frozen=True)
class _Function:
    """A function of a program, called from the state that the program begins with."""

    program: Program
    name: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.program.reset()
        return (self.program if self.name is None else self.program[self.name])(*args, **kwargs)


def _kept(program: Callable[..., Any], modules: Iterable[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The buffers that are the state of a program."""
    named: dict[str, torch.Tensor] = {}
    for module in modules:
        for tensors in (module.named_parameters, module.named_buffers):
            named = {**dict(tensors(remove_duplicate=False)), **named}
    return {name: named[name] for name in _values(program)}


def _values(program: Callable[..., Any]) -> dict[str, torch.Tensor]:
    return program.program.state_dict() if isinstance(program, _Function) else {}


def _called(program: Callable[..., Any], call: Call, sizes: str) -> list[torch.Tensor]:
    try:
        return _tensors(program(*call.args, **call.kwargs))
    except LoweringError as error:
        kind = _Refused if str(error).startswith("argument ") else VerificationError
        raise kind(f"the compiled program cannot be called{sizes}: {error}") from error


def _check_arguments(after: Call, before: Call, sizes: str) -> None:
    for number, (one, other) in enumerate(zip(_tensors(after), _tensors(before), strict=True)):
        if not _same(one, other):
            raise VerificationError(
                f"the compiled program writes into its argument {number}{sizes}, and eager does not"
            )


def _in_order(
    actual: list[torch.Tensor], expected: list[torch.Tensor], unsorted: set[int]
) -> list[torch.Tensor]:
    """Put the results of a top-k that is not sorted, which are a set, in eager's order.

    The indices say which of the program's is which of eager's; what else has their shape, as weights have, is
    brought in the same order.
    """
    for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        last = theirs.shape[-1] if theirs.dim() else 0
        if last not in unsorted or theirs.is_floating_point() or mine.shape != theirs.shape:
            continue
        if _same(mine, theirs) or not torch.equal(mine.sort(-1).values, theirs.sort(-1).values):
            continue
        order = mine.argsort(-1).gather(-1, theirs.argsort(-1).argsort(-1))
        actual = [t.gather(-1, order) if t.shape == order.shape else t for t in actual]
        assert _same(actual[index], theirs)
    return actual


_MAKERS = {"CUDA": "NVIDIA", "ROCm": "AMD"}


def require_device(target: Target) -> torch.device:
    """The torch device a program for ``target`` runs on; UsageError if this machine has none.

    Verification is a request this machine may be unable to serve, so that is an error of usage
    (exit 2), known before anything is compiled, and not a failed verification (exit 4).
    """
    if target.torch_build is None:
        return torch.device("cpu")
    here = "ROCm" if torch.version.hip else "CUDA"
    if torch.cuda.is_available() and target.torch_build == here:
        return torch.device("cuda")
    kind = f"{_MAKERS[target.torch_build]} GPU that PyTorch for {target.torch_build}"
    raise UsageError(
        f"--verify runs the program, and this machine has no {kind} can use; "
        f"compile for {target.name} without --verify, or run the command where the device is"
    )


# One output -------------------------------------------------------------------------------------


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


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _copies(call: Call) -> Call:
    return pytree.tree_map(lambda a: a.detach().clone() if isinstance(a, torch.Tensor) else a, call)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
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
