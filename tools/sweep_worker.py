"""The child of tools/sweep.py: an operation with PyTorch's own samples of it, compiled and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import lowering
from tools.child import serve

SAMPLES = 4  # of an operation and dtype; the first ones are the ordinary uses
_STEP = 2.0**-20  # of the largest element: sums in another order
_LOOKED_AT = 40  # until there are so many that are not empty

# The order of equal elements is not defined, and among few bfloat16 numbers many are equal.
_UNORDERED = ("topk", "sort", "argsort", "msort", "kthvalue", "median", "nanmedian", "mode")

# What a verdict of several samples is, of those that each has: the worst.
ORDER = ("exact", "close", "compiled", "refused", "late", "raw", "differs", "changed")


@dataclass
class Sample:
    """One use of an operation: its arguments, of which the tensors are the program's."""

    name: str
    op: Callable[..., Any]
    leaves: list[Any]
    tree: pytree.TreeSpec

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of the result."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        first, args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        result = self.op(first, *args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


class Samples(torch.nn.Module):
    """Several of them in one program."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self.samples = samples

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given, results = iter(tensors), []
        for sample in self.samples:
            results += sample.call([next(given) for _ in sample.tensors])
        return results


def samples_of(name: str, dtype: torch.dtype) -> list[Sample]:
    """Those that eager PyTorch runs, twice alike, with a tensor among their arguments and results."""
    info = _operations()[name]
    torch.manual_seed(0)
    found: list[Sample] = []
    for given in itertools.islice(info.sample_inputs("cpu", dtype), _LOOKED_AT):
        leaves, tree = pytree.tree_flatten((given.input, given.args, given.kwargs))
        leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        sample = Sample(name, info.op, leaves, tree)
        try:
            results, again = (sample.call([t.clone() for t in sample.tensors]) for _ in range(2))
        except Exception:  # whatever eager PyTorch raises: it has no kernel for this sample
            continue
        is_random = not all(map(_equal, results, again))
        if sample.tensors and sum(result.numel() for result in results) and not is_random:
            found.append(sample)
        if len(found) == SAMPLES:
            break
    return found


def dtypes_of(name: str) -> list[torch.dtype]:
    """The dtypes that an operation is tried with: floats, or else integers."""
    supported = _operations()[name].dtypes
    floats = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype in supported]
    return floats or [dtype for dtype in (torch.int64, torch.bool, torch.complex64) if dtype in supported][:1]


def _operations() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return {".".join(filter(None, (info.name, info.variant_test_name))): info for info in op_db}


def judged(samples: Sequence[Sample], target: str) -> list[tuple[str, str]]:
    """A verdict and a sentence for each sample; those of one program, where that is not right, alone too."""
    verdict = _verdict(samples, target)
    if len(samples) == 1 or verdict[0] in ("exact", "close", "compiled"):
        return [verdict] * len(samples)
    return [_verdict([sample], target) for sample in samples]


def _verdict(samples: Sequence[Sample], target: str) -> tuple[str, str]:
    module = Samples(samples)
    args = tuple(tensor.clone() for sample in samples for tensor in sample.tensors)
    try:
        compiled = lowering.compile(module, args, target=target)
    except lowering.LoweringError as error:
        return "refused", str(error)
    except Exception as error:  # that is not ours, and a finding
        return "raw", f"{type(error).__name__}: {error}"
    backend = compiled.target.backend
    if backend != "cpu" and not (backend == "cuda" and torch.cuda.is_available()):
        return "compiled", ""
    left = [arg.clone() for arg in args]  # with what eager PyTorch writes to them, such as running means
    wanted = module(*left)
    placed = [arg.to(backend) for arg in args]
    try:
        results = [result.cpu() for result in pytree.tree_leaves(lowering.load(compiled.vmfb)(*placed))]
    except lowering.LoweringError as error:
        return "late", str(error)
    given = [tensor for sample in samples for tensor in sample.tensors]
    after = [_compared(ours.cpu(), eager) for ours, eager in zip(placed, left, strict=True)]
    if any(verdict == "differs" for verdict, _ in after):
        return "changed", "an argument is not what eager leaves of it"
    pairs = list(zip(results, wanted, strict=True))
    if samples[0].name in _UNORDERED and torch.bfloat16 in (tensor.dtype for tensor in given):
        pairs = [(ours, eager) for ours, eager in pairs if eager.is_floating_point()]
    verdicts = [_compared(ours, eager) for ours, eager in pairs]
    if any(verdict == "differs" for verdict, _ in verdicts) and _is_as_near(module, given, results, wanted):
        return "close", ""
    return max(verdicts, key=lambda v: ORDER.index(v[0]), default=("exact", ""))


def _is_as_near(
    module: Samples, args: list[torch.Tensor], ours: list[torch.Tensor], eager: list[torch.Tensor]
) -> bool:
    """Tell whether results of 16 bits are as near to those in float64 as eager's own are."""
    if not any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in args):
        return False
    try:
        exact = module(*(arg.double() if arg.is_floating_point() else arg.clone() for arg in args))
    except RuntimeError:  # an operation of other dtypes
        return False
    return all(_distance(a, e) <= 2 * _distance(b, e) for a, b, e in zip(ours, eager, exact, strict=True))


def _distance(a: torch.Tensor, exact: torch.Tensor) -> float:
    if a.shape != exact.shape:
        return float("inf")
    same = (a == exact) | (a.isnan() & exact.isnan())
    off = torch.where(same, 0.0, (a.double() - exact.double()).abs())
    return float(off.nan_to_num(torch.inf).max()) if off.numel() else 0.0


def _compared(ours: torch.Tensor, eager: torch.Tensor) -> tuple[str, str]:
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return "differs", f"{ours.dtype}{tuple(ours.shape)} for {eager.dtype}{tuple(eager.shape)}"
    if _equal(ours, eager):
        return "exact", ""
    try:
        torch.testing.assert_close(ours, eager, equal_nan=True)
        return "close", ""
    except AssertionError:  # of an element that comes of larger ones
        largest = eager.abs().nan_to_num(0, 0, 0).max().item() if eager.dtype == torch.float32 else 0.0
    try:
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1.3e-6, atol=max(1e-5, largest * _STEP))
    except AssertionError as error:
        return "differs", " ".join(str(error).split())
    return "close", ""


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x if x.layout is torch.strided else x.to_dense() for x in (a, b))
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The verdicts of an operation by dtype, or the names of all."""
    if "op" not in job:
        return {"ops": list(_operations())}
    found = {}
    for dtype in dtypes_of(job["op"]):
        samples = samples_of(job["op"], dtype)
        found[str(dtype).removeprefix("torch.")] = judged(samples, job["target"]) if samples else []
    return {"found": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(answer)
