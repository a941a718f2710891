"""Keep the ledger of sites: every norm and quantization found, and what became of it.

No site can leave the ledger: it ends fused, with the pattern and kernel that took it, or unfused
with a reason.  The report is made from this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from .contracts import Contract

NOT_REACHED = "no fusion pattern looked at this operation"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Hold what one call spends: bytes read and written (None if sizes are unknown), and kernel launches."""

    bytes: int | None
    dispatches: int

    def __add__(self, other: Cost) -> Cost:
        known = self.bytes is not None and other.bytes is not None
        total = (self.bytes or 0) + (other.bytes or 0) if known else None
        return Cost(total, self.dispatches + other.dispatches)


@dataclass
class SiteRecord:
    """Record one site: ``op`` is the canonical name, ``location`` file:line of the model's source.

    ``before`` is the cost of the source's operations, each as a kernel of its own; ``after`` what this
    site has of its kernel's cost, the same as before while it has none.  ``note`` says what a reader
    must know although nothing went wrong.
    """

    op: str
    location: str
    contract: Contract | None = None
    before: Cost = Cost(None, 1)
    after: Cost | None = None
    pattern: str | None = None
    kernel: str | None = None
    reason: str | None = NOT_REACHED
    note: str | None = None

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Remark:
    """Hold what a reader must know of an operation that is no site."""

    op: str
    location: str
    text: str


@dataclass
class Tally:
    """Count how often a pattern was tried and matched, and the seconds it took."""

    tried: int = 0
    matched: int = 0
    seconds: float = 0.0

    def call(self, pattern: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``pattern``; it matched unless it returns None."""
        start = time.perf_counter()
        found = pattern(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.tried += 1
        self.matched += found is not None
        return found


@dataclass
class Timing:
    """Seconds of each step, and the tally of each pattern, by name."""

    steps: dict[str, float] = field(default_factory=dict)
    patterns: dict[str, Tally] = field(default_factory=dict)

    def of(self, pattern: str) -> Tally:
        """The tally of ``pattern``, begun at the first call."""
        return self.patterns.setdefault(pattern, Tally())


@dataclass
class Ledger:
    """All sites of one program, by number; remarks on what is none; and what it took to find them."""

    records: list[SiteRecord] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing, compare=False)

    def add(
        self, op: str, location: str, contract: Contract | None = None, before: Cost = Cost(None, 1)
    ) -> int:
        """Open a site and return its number."""
        self.records.append(SiteRecord(op, location, contract, before))
        return len(self.records) - 1

    def absorb(self, site: int, contract: Contract | None, cost: Cost) -> None:
        """Record that an operation that is no site itself, and cost this much, became part of ``site``."""
        self.records[site].contract = contract
        self.records[site].before += cost

    def remark(self, op: str, location: str, text: str) -> None:
        self.remarks.append(Remark(op, location, text))

    def note(self, site: int, note: str) -> None:
        self.records[site].note = note

    def retarget(self, site: int, contract: Contract, note: str) -> None:
        self.records[site].contract = contract
        self.records[site].note = note

    def fuse(self, site: int, pattern: str) -> None:
        self.records[site].pattern = pattern
        self.records[site].reason = None

    def refuse(self, site: int, reason: str) -> None:
        self.records[site].pattern = None
        self.records[site].reason = reason

    def assign_kernel(self, site: int, kernel: str, cost: Cost) -> None:
        self.records[site].kernel = kernel
        self.records[site].after = cost
