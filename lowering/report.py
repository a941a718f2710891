"""What fused, what did not, and why: the answer a compilation gives about itself.

A report is plain data.  It is written by the compiler, printed by the command line, and read by
people and by other programs; nothing here knows about IR.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from patterns.contracts import Contract, GatedActivation, GroupedTopk, Quantization, RmsNorm, in_words
from patterns.sites import Remark, Timing

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["fused", "unfused"]


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
        """Whether the site became part of a kernel."""
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
class Report:
    """Every site of one compilation, in the order of the program.

    ``dispatches`` counts the custom kernel launches of one call; what IREE generates itself is not
    counted, since IREE decides about it after the report is made.  ``remarks`` are on operations that are no
    sites, such as a product that no kernel computes.  ``timing`` is what finding and fusing took; it differs
    from run to run and is not part of what is written.
    """

    target: str
    sites: tuple[Site, ...] = ()
    dispatches: int = 0
    timing: Timing | None = field(default=None, compare=False)
    folded: tuple[Folded, ...] = ()
    remarks: tuple[Remark, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sites", "folded", "remarks"):
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
        """The report as plain values: target, sites, summary, folded, remarks."""
        return {
            "target": self.target,
            "sites": [{**asdict(site), "contract": _contract(site)} for site in self.sites],
            "summary": self.summary(),
            "folded": [asdict(value) for value in self.folded],
            "remarks": [asdict(remark) for remark in self.remarks],
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
        return cls(data["target"], sites, data["summary"]["dispatches"], folded=folded, remarks=remarks)

    def to_html(self) -> str:
        """The report as one self-contained page: no script, style or font comes from elsewhere."""
        return _page(self)

    def write(self, path: str | Path) -> None:
        """Write the report as ``path``'s suffix says: ``.json`` or ``.html``."""
        path = Path(path)
        path.write_text(self.to_html() if path.suffix == ".html" else self.to_json(), encoding="utf-8")

    def table(self) -> RenderableType:
        """The report for a terminal: unfused sites first, equal sites as one line with a count."""
        return _terminal_table(self)

    def timing_table(self) -> RenderableType:
        """What each step took, and each pattern with its hits and misses, the slowest first."""
        return _timing_table(self.timing or Timing())


# JSON -------------------------------------------------------------------------------------------

_CONTRACTS = {kind.__name__: kind for kind in (RmsNorm, GatedActivation, Quantization, GroupedTopk)}


def _contract(site: Site) -> dict[str, Any] | None:
    """The contract's fields and, as ``kind``, which contract it is."""
    return site.contract and {"kind": type(site.contract).__name__, **asdict(site.contract)}


def _site(written: dict[str, Any]) -> Site:
    """The site of which ``to_dict`` wrote this."""
    contract, size = written["contract"], written["bytes"]
    if contract is not None:
        contract = _CONTRACTS[contract["kind"]](**{k: v for k, v in contract.items() if k != "kind"})
    return Site(
        **{
            **written,
            "contract": contract,
            "bytes": size and Change(**size),
            "dispatches": Change(**written["dispatches"]),
        }
    )


def _folded(written: dict[str, Any]) -> Folded:
    """The folded value of which ``to_dict`` wrote this."""
    lists = {key: tuple(written[key]) for key in ("operations", "sources")}
    return Folded(**{**written, **lists, "bytes": Change(**written["bytes"])})


# Grouping ---------------------------------------------------------------------------------------


def _counted(sites: Iterable[Site]) -> list[tuple[Site, int]]:
    """Equal sites once with their number: a model's layers share the source line they come from."""
    return list(Counter(sites).items())


def _by_kernel(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Fused sites under the kernel they became part of, in order of first appearance."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.kernel or "", []).append(site)
    return groups


def _size(count: int) -> str:
    """``1.5 MB``"""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _traffic(traffic: Change | None) -> str:
    return f"{_size(traffic.before)} → {_size(traffic.after)}" if traffic else ""


def _short(location: str, parts: int = 2) -> str:
    """The last parts of a location's path: enough to recognise, short enough for a column."""
    path, colon, line = location.rpartition(":")
    if not (colon and line.isdigit()):
        path, line = location, ""
    tail = "/".join(PurePath(path).parts[-parts:]).lstrip("/")
    return f"{tail}:{line}" if line else tail


def _headline(report: Report) -> str:
    total = len(report.sites)
    if not total:
        return "no operation of this program is one that fuses"
    return f"{len(report.fused)} of {total} site{'s' * (total != 1)} fused"


def _folding(report: Report) -> str:
    """What was folded, in a sentence; empty if nothing was."""
    count = len(report.folded)
    if not count:
        return ""
    stored = sum((value.bytes for value in report.folded), Change(0, 0))
    saved = _size(sum(value.saved for value in report.folded))
    values = f"{count} value{'s' * (count != 1)} that depend{'s' * (count == 1)} on parameters alone"
    return f"{values} computed once: {saved} less to read and write per call, {_traffic(stored)} stored"


def _remarked(report: Report) -> list[tuple[Remark, int]]:
    """Equal remarks once with their number."""
    return list(Counter(report.remarks).items())


def _totals(report: Report) -> list[str]:
    """What is said beside the headline: the target, the launches of one call, and what fusion changed."""
    launches, traffic = report.launches(), report.traffic()
    return [
        f"target {report.target}",
        f"{report.dispatches} custom dispatch{'es' * (report.dispatches != 1)} per call",
        f"launches of all sites {launches.before} → {launches.after}",
        *([f"bytes {_traffic(traffic)}"] if traffic else []),
    ]


# Terminal ---------------------------------------------------------------------------------------


def _timing_table(timing: Timing) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    steps = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    steps.add_column("step", no_wrap=True)
    steps.add_column("ms", justify="right")
    for name, seconds in timing.steps.items():
        steps.add_row(name, f"{seconds * 1e3:.1f}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("pattern", overflow="fold")
    for column in ("hits", "misses", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, tally in sorted(timing.patterns.items(), key=lambda item: -item[1].seconds):
        table.add_row(
            name, str(tally.matched), str(tally.tried - tally.matched), f"{tally.seconds * 1e3:.1f}"
        )
    return Group(steps, table)


def _terminal_table(report: Report) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text.assemble((_headline(report), "bold"), "".join(f"  ·  {part}" for part in _totals(report)))
    if folding := _folding(report):
        title = Group(title, Text(folding, "dim"))
    for remark, count in _remarked(report):
        times = f" ({count} times)" if count > 1 else ""
        line = f"{remark.op} at {_short(remark.location, 1)}{times}: {remark.text}"
        title = Group(title, Text(line, "yellow"))
    if not report.sites:
        return title
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("op", no_wrap=True)
    table.add_column("source", no_wrap=True)
    table.add_column("kernel, or why not", overflow="fold")
    for site, count in _counted(report.unfused):
        reason = Text(site.reason or "", "yellow")
        table.add_row(Text("✗", "bold red"), str(count), site.op, Text(_short(site.location, 1)), reason)
    for kernel, sites in _by_kernel(report.fused).items():
        for index, (site, count) in enumerate(_counted(sites)):
            name = Text(kernel, "cyan") if index == 0 else Text("〃", "dim")
            if site.note:
                name.append(f"\n{site.note}", "yellow")
            table.add_row(Text("✓", "green"), str(count), site.op, Text(_short(site.location, 1)), name)
        table.add_section()
    return Group(title, table)


# Page -------------------------------------------------------------------------------------------

_STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --page: #f6f7f9; --card: #fff;
        --good: #137a4b; --good-bg: #e5f5ec; --bad: #b4380f; --bad-bg: #fdeee7; --mark: #3056d3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --soft: #97a1b2; --line: #2b3340; --page: #12161c; --card: #1a2029;
          --good: #5dcb95; --good-bg: #173326; --bad: #ff9a6c; --bad-bg: #3a2117; --mark: #8aa6ff; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1280px; margin: 0 auto; padding: 40px 24px 80px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em }
h2 { font-size: 17px; margin: 36px 0 10px; overflow-wrap: anywhere }
h2 small { color: var(--soft); font-weight: 400; font-size: 14px; margin-left: 8px }
.sub { color: var(--soft); margin: 0 0 24px }
.strip { display: flex; flex-wrap: wrap; gap: 12px }
.tile { flex: 1 1 130px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: 12px 16px }
.tile b { display: block; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
.good b { color: var(--good) } .bad b { color: var(--bad) }
.bar { height: 8px; border-radius: 4px; background: var(--bad-bg); margin: 16px 0 24px; overflow: hidden }
.bar i { display: block; height: 100%; background: var(--good) }
.controls { display: flex; gap: 10px; align-items: center; position: sticky; top: 0; padding: 10px 0;
            background: var(--page) }
input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
                border-radius: 8px; padding: 7px 12px }
input { flex: 1; min-width: 0 }
:is(input, select):focus-visible { outline: 2px solid var(--mark); outline-offset: 1px }
.wrap { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: 12px; font-weight: 600; color: var(--soft); padding: 8px 14px }
td { border-top: 1px solid var(--line); padding: 8px 14px; vertical-align: top }
td.n, th.n { text-align: right; width: 64px; font-variant-numeric: tabular-nums }
td.op { width: 130px } td.at { width: 230px } td.is { width: 90px; text-align: right }
td.contract code { color: var(--soft) } td.bytes { white-space: nowrap; font-variant-numeric: tabular-nums }
.note { color: var(--bad) }
h2 code { font-size: 15px; font-weight: 600 }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere }
.pill { display: inline-block; font-size: 12px; font-weight: 600; border-radius: 99px; padding: 0 9px }
.fused .pill { background: var(--good-bg); color: var(--good) }
.unfused .pill { background: var(--bad-bg); color: var(--bad) }
.none { color: var(--soft); padding: 24px 0 }
[hidden] { display: none !important }
"""

_SCRIPT = """
const text = document.querySelector('#text'), status = document.querySelector('#status');
function show() {
  const words = text.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let any = false;
  for (const section of document.querySelectorAll('section')) {
    let some = false;
    for (const row of section.querySelectorAll('tbody tr')) {
      const content = (section.dataset.kernel + ' ' + row.dataset.all).toLowerCase();
      row.hidden = !(words.every(w => content.includes(w)) &&
                     (!status.value || row.classList.contains(status.value)));
      some ||= !row.hidden;
    }
    section.hidden = !some;
    any ||= some;
  }
  document.querySelector('.none').hidden = any;
}
text.addEventListener('input', show); status.addEventListener('change', show); show();
"""


def _page(report: Report) -> str:
    sections = []
    if report.unfused:
        sections.append(_section("Left unfused", report.unfused, last_column="reason"))
    for kernel, sites in _by_kernel(report.fused).items():
        sections.append(_section(kernel, sites, last_column="pattern"))
    if report.remarks:
        sections.append(_remarks_section(report))
    if report.folded:
        sections.append(_folded_section(report))
    controls = _CONTROLS if report.sites else ""
    script = f"<script>{_SCRIPT}</script>" if report.sites else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Fusion report: {html.escape(report.target)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n<h1>{html.escape(_headline(report)).capitalize()}</h1>\n"
        f'<p class="sub">Compiled for {html.escape(report.target)}</p>\n'
        f"{_strip(report)}\n{controls}\n" + "\n".join(sections) + f"\n</main>{script}</body></html>\n"
    )


_CONTROLS = """<div class="controls">
<input id="text" type="search" aria-label="Filter sites"
       placeholder="Filter: operation, file, kernel, reason">
<select id="status" aria-label="Status"><option value="">all sites</option>
<option value="unfused">unfused</option><option value="fused">fused</option></select></div>
<p class="none" hidden>No site matches.</p>"""


def _strip(report: Report) -> str:
    kernels = len(_by_kernel(report.fused))
    unfused = len(report.unfused)
    tiles: list[tuple[str, int | str, str]] = [
        ("good", len(report.fused), "sites fused"),
        ("bad" if unfused else "", unfused, "sites unfused"),
        ("", kernels, "distinct kernels"),
        ("", report.dispatches, "custom dispatches per call"),
        ("", report.launches().before, "operations without fusion"),
    ]
    if (traffic := report.traffic()) is not None:
        tiles.append(("", _size(traffic.after), f"read and written, not {_size(traffic.before)}"))
    strip = "".join(
        f'<div class="tile {kind}"><b>{n}</b><span>{what}</span></div>' for kind, n, what in tiles
    )
    share = 100 * len(report.fused) / len(report.sites) if report.sites else 100
    return f'<div class="strip">{strip}</div>\n<div class="bar"><i style="width:{share:.1f}%"></i></div>'


def _section(title: str, sites: Iterable[Site], *, last_column: Literal["reason", "pattern"]) -> str:
    counted = _counted(sites)
    total = sum(count for _, count in counted)
    rows = "\n".join(_row(site, count, last_column) for site, count in counted)
    heading = html.escape(title) if last_column == "reason" else f"<code>{html.escape(title)}</code>"
    return (
        f'<section data-kernel="{html.escape(title)}"><h2>{heading}'
        f"<small>{total} site{'s' * (total != 1)}</small></h2>\n"
        f'<div class="wrap"><table><thead><tr><th class="n">sites</th><th>operation</th><th>source</th>'
        f"<th>contract</th><th>{last_column}</th><th>bytes</th><th></th></tr></thead><tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _source(location: str) -> str:
    return f'<code title="{html.escape(location)}">{html.escape(_short(location))}</code>'


def _row(site: Site, count: int, last_column: str) -> str:
    last = site.reason if last_column == "reason" else site.pattern
    contract = in_words(site.contract) if site.contract else ""
    note = f'<div class="note">{html.escape(site.note)}</div>' if site.note else ""
    everything = " ".join(
        filter(None, (site.op, site.location, site.pattern, site.reason, contract, site.note))
    )
    return (
        f'<tr class="{site.status}" data-all="{html.escape(everything)}"><td class="n">{count}</td>'
        f'<td class="op"><code>{html.escape(site.op)}</code></td>'
        f'<td class="at">{_source(site.location)}</td>'
        f'<td class="contract"><code>{html.escape(contract)}</code></td>'
        f'<td>{html.escape(last or "")}{note}</td><td class="bytes">{_traffic(site.bytes)}</td>'
        f'<td class="is"><span class="pill">{site.status}</span></td></tr>'
    )


def _remarks_section(report: Report) -> str:
    """Not one of the filtered sections: its rows are no sites."""
    rows = "\n".join(
        f'<tr><td class="n">{count}</td><td class="op"><code>{html.escape(remark.op)}</code></td>'
        f'<td class="at">{_source(remark.location)}</td><td>{html.escape(remark.text)}</td></tr>'
        for remark, count in _remarked(report)
    )
    heads = '<th class="n"></th><th>operation</th><th>source</th><th>remark</th>'
    return (
        f'<aside><h2>Remarks</h2>\n<div class="wrap"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div></aside>"
    )


def _folded_section(report: Report) -> str:
    """Not one of the filtered sections: its rows are values, not sites."""
    rows = "\n".join(
        f"<tr><td><code>{html.escape(value.name)}</code></td>"
        f'<td class="at">{_source(value.location)}</td>'
        f"<td><code>{html.escape(' → '.join(value.operations))}</code></td>"
        f"<td><code>{html.escape(', '.join(value.sources))}</code></td>"
        f'<td class="bytes">{_traffic(value.bytes)}</td><td class="bytes">{_size(value.saved)}</td></tr>'
        for value in report.folded
    )
    heads = ("parameter", "source", "operations", "made from", "stored", "saved per call")
    return (
        f"<aside><h2>Folded<small>{html.escape(_folding(report))}</small></h2>\n"
        f'<div class="wrap"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div></aside>"
    )
