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
from .comparison import LIMIT, Comparison, Output, compare, same
from .sensitivity import exact, nudged, plain, state_kept

if TYPE_CHECKING:
    from ..targets import Target

_SAMPLES = 4
_MORE_SAMPLES, _FURTHER = 8, 4.0
"""Before a program is called wrong: a value that lies close to a boundary crosses it in few samples."""


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
        if not same(tensor, actual[index]):
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
    untouched = all(map(same, _tensors(copies), _tensors(call)))
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
        if not same(one, other):
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
        if same(mine, theirs) or not torch.equal(mine.sort(-1).values, theirs.sort(-1).values):
            continue
        order = mine.argsort(-1).gather(-1, theirs.argsort(-1).argsort(-1))
        actual = [t.gather(-1, order) if t.shape == order.shape else t for t in actual]
        assert same(actual[index], theirs)
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


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _copies(call: Call) -> Call:
    return pytree.tree_map(lambda a: a.detach().clone() if isinstance(a, torch.Tensor) else a, call)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
