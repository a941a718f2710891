"""Say what fused, what did not, and why: the answer a compilation gives about itself.

A report is plain data.  It is written by the compiler, printed by the command line, and read by
people and by other programs; nothing here knows about IR.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patterns.contracts import GatedActivation, GroupedTopk, Norm, Quantization
from patterns.sites import Remark, Timing

from ..errors import UsageError
from .sites import Change, Folded, Kept, Site

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Report:
    """Every site of one compilation, in the order of the program.

    ``dispatches`` counts the custom kernel launches of one call; what IREE generates itself is not
    counted, since IREE decides about it after the report is made.  ``remarks`` are on operations that are no
    sites, such as a product that no kernel computes.  ``state`` is what the program keeps from call to call,
    and how each of its functions writes it.  ``timing`` is what finding and fusing took; it differs from run
    to run and is not part of what is written.
    """

    target: str
    sites: tuple[Site, ...] = ()
    dispatches: int = 0
    timing: Timing | None = field(default=None, compare=False)
    folded: tuple[Folded, ...] = ()
    remarks: tuple[Remark, ...] = ()
    state: tuple[Kept, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sites", "folded", "remarks", "state"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def fused(self) -> tuple[Site, ...]:
        """The sites that became part of a kernel."""
        return tuple(site for site in self.sites if site.fused)

    @property
    def unfused(self) -> tuple[Site, ...]:
        """The sites that were left to IREE's own code generation."""
        return tuple(site for site in self.sites if not site.fused)

    def traffic(self) -> Change | None:
        """Bytes of all sites for the example arguments; None where one of them is unknown."""
        known = [site.bytes for site in self.sites if site.bytes is not None]
        return sum(known, Change(0, 0)) if known and len(known) == len(self.sites) else None

    def launches(self) -> Change:
        """Kernel launches of all sites."""
        return sum((site.dispatches for site in self.sites), Change(0, 0))

    def summary(self) -> dict[str, int]:
        """``{"fused": ..., "unfused": ..., "dispatches": ...}``."""
        return {"fused": len(self.fused), "unfused": len(self.unfused), "dispatches": self.dispatches}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values: target, sites, summary, folded, remarks, state."""
        return {
            "target": self.target,
            "sites": [{**asdict(site), "contract": _contract(site)} for site in self.sites],
            "summary": self.summary(),
            "folded": [asdict(value) for value in self.folded],
            "remarks": [asdict(remark) for remark in self.remarks],
            "state": [{**asdict(kept), "shape": list(kept.shape)} for kept in self.state],
        }

    def to_json(self) -> str:
        """The report as JSON text; ``json.loads`` of it is ``to_dict()``."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote."""
        data = json.loads(text)
        sites = tuple(map(_site, data["sites"]))
        folded = tuple(map(_folded, data["folded"]))
        remarks = tuple(Remark(**remark) for remark in data["remarks"])
        state = tuple(Kept(**{**kept, "shape": tuple(kept["shape"])}) for kept in data.get("state", ()))
        dispatches = data["summary"]["dispatches"]
        return cls(data["target"], sites, dispatches, folded=folded, remarks=remarks, state=state)

    def to_html(self) -> str:
        """The report as one self-contained page: no script, style or font comes from elsewhere."""
        from .page import page

        return page(self)

    def write(self, path: str | Path) -> None:
        """Write the report as ``path``'s suffix says: ``.json`` or ``.html``."""
        path = Path(path)
        path.write_text(self.to_html() if path.suffix == ".html" else self.to_json(), encoding="utf-8")

    def table(self) -> RenderableType:
        """The report for a terminal: unfused sites first, equal sites as one line with a count."""
        from .table import table_of

        return table_of(self)

    def timing_table(self) -> RenderableType:
        """Tabulate what each step took, and each pattern with its hits and misses, the slowest first."""
        from .table import timing_table

        return timing_table(self.timing or Timing())


# JSON -------------------------------------------------------------------------------------------

_CONTRACTS = {kind.__name__: kind for kind in (Norm, GatedActivation, Quantization, GroupedTopk)}


def _contract(site: Site) -> dict[str, Any] | None:
    """The contract's fields and, as ``kind``, which contract it is."""
    if site.contract is None:
        return None
    return {"kind": type(site.contract).__name__, **asdict(site.contract)}


def _site(written: dict[str, Any]) -> Site:
    """The site of which ``to_dict`` wrote this."""
    contract, size = written["contract"], written["bytes"]
    if contract is not None:
        kind = _contract_kind(contract["kind"])
        contract = kind(**{k: v for k, v in contract.items() if k != "kind"})
    return Site(
        **{
            **written,
            "contract": contract,
            "bytes": size and Change(**size),
            "dispatches": Change(**written["dispatches"]),
        }
    )


def _contract_kind(name: str) -> type:
    """The contract of that name.  Raises UsageError where no installed package has it."""
    if name in _CONTRACTS:
        return _CONTRACTS[name]
    from ..families.registry import contract_kind  # an outsider's; those above are read without the compiler

    kind = contract_kind(name)
    if kind is None:
        raise UsageError(f"the report has a contract {name}, of a package that is not installed here")
    return kind


def _folded(written: dict[str, Any]) -> Folded:
    """The folded value of which ``to_dict`` wrote this."""
    lists = {key: tuple(written[key]) for key in ("operations", "sources")}
    return Folded(**{**written, **lists, "bytes": Change(**written["bytes"])})
