"""The sites of a report, and what became of each: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patterns.contracts import Contract

Status = Literal["fused", "unfused"]

IN_PLACE, READ = "in place", "read"
"""What a function does with a tensor of the state that it is passed."""


@dataclass(frozen=True)
class Change:
    """A number without fusion and with it."""

    before: int
    after: int

    def __add__(self, other: Change) -> Change:
        return Change(self.before + other.before, self.after + other.after)


@dataclass(frozen=True)
class Site:
    """One operation that could be part of a fused kernel, and what became of it.

    op
        canonical name: ``rms_norm``, ``group_quant``, ...
    location
        ``file:line`` of the model's source.
    pattern, kernel
        the pattern that took the site and the kernel it became part of; None when unfused (a
        pattern that looked at the site and refused may still be named).
    reason
        a sentence saying why the site did not fuse; None exactly when it did.
    contract
        what the site computes, bit for bit; None where it was not understood.
    bytes, dispatches
        what one call for the example arguments reads and writes, and launches.  Before: each operation of the
        source, the residual add included, as a kernel of its own that reads its operands and writes its
        results once.  After: the site's share of its kernel; the first site of a kernel has all that is not
        another's result, so that the shares add up.  bytes is None where sizes are unknown.
    note
        what a reader must know although the site is as it should be, such as a changed element type.
    """

    op: str
    location: str
    status: Status
    pattern: str | None = None
    kernel: str | None = None
    reason: str | None = None
    contract: Contract | None = None
    bytes: Change | None = None
    dispatches: Change = Change(1, 1)
    note: str | None = None

    def __post_init__(self) -> None:
        where = f"site {self.op} at {self.location}"
        if self.status not in ("fused", "unfused"):
            raise ValueError(f'{where}: status is "fused" or "unfused", not {self.status!r}')
        if self.status == "fused" and self.reason is not None:
            raise ValueError(f"{where} is fused, so it cannot have a reason for not fusing: {self.reason!r}")
        if self.status == "fused" and (self.pattern is None or self.kernel is None):
            raise ValueError(f"{where} is fused, so its pattern and its kernel must be named")
        if self.status == "unfused" and not self.reason:
            raise ValueError(f"{where} did not fuse, so it needs a reason")

    @property
    def fused(self) -> bool:
        """Tell whether the site became part of a kernel."""
        return self.status == "fused"


@dataclass(frozen=True)
class Folded:
    """One value that depends on parameters alone, and was computed when compiling.

    name
        the parameter that holds it.
    location
        ``file:line`` of the model's source, of the last operation.
    operations, sources
        what it took, in order, and the parameters it is made from.
    bytes
        of the parameters: before, those that nothing else reads and that are dropped (one that several values
        are made from counts with the first); after, the value.
    saved
        bytes that one call no longer reads and writes, each operation counted as a kernel of its own.
    """

    name: str
    location: str
    operations: tuple[str, ...]
    sources: tuple[str, ...]
    bytes: Change
    saved: int


@dataclass(frozen=True)
class Kept:
    """One tensor that the program keeps from call to call.

    name, dtype, shape, bytes
        as ``Program.state()`` has them.
    functions
        by the name of each function that is passed the tensor, what a call does with it: ``in place``,
        ``read``, or a sentence saying why it is written anew or copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    functions: dict[str, str]
