"""The ledger of sites: every norm and quantization found, and what became of it.

No site can leave the ledger: it ends fused, with the pattern and kernel that took it, or unfused
with a reason.  The report is made from this.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NOT_REACHED = "no fusion pattern looked at this operation"


@dataclass
class SiteRecord:
    """``op`` is the canonical name, ``location`` file:line of the model's source."""

    op: str
    location: str
    pattern: str | None = None
    kernel: str | None = None
    reason: str | None = NOT_REACHED

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass
class Ledger:
    """All sites of one program, by number."""

    records: list[SiteRecord] = field(default_factory=list)

    def add(self, op: str, location: str) -> int:
        """Open a site and return its number."""
        self.records.append(SiteRecord(op, location))
        return len(self.records) - 1

    def fuse(self, site: int, pattern: str) -> None:
        self.records[site].pattern = pattern
        self.records[site].reason = None

    def refuse(self, site: int, reason: str) -> None:
        self.records[site].pattern = None
        self.records[site].reason = reason

    def assign_kernel(self, site: int, kernel: str) -> None:
        self.records[site].kernel = kernel
