"""Show a report as one self-contained page: no script, style or font comes from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from patterns.contracts import in_words

from .sites import Site
from .words import (
    by_kernel,
    folding_text,
    headline,
    short_location,
    size_text,
    state_text,
    traffic_text,
    with_counts,
)

if TYPE_CHECKING:
    from .report import Report

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


def page(report: Report) -> str:
    """The page: what did not fuse, each kernel with its sites, remarks, what was folded, and the state."""
    sections = []
    if report.unfused:
        sections.append(_section("Left unfused", report.unfused, last_column="reason"))
    for kernel, sites in by_kernel(report.fused).items():
        sections.append(_section(kernel, sites, last_column="pattern"))
    if report.remarks:
        sections.append(_remarks_section(report))
    if report.folded:
        sections.append(_folded_section(report))
    if report.state:
        sections.append(_state_section(report))
    controls = _CONTROLS if report.sites else ""
    script = f"<script>{_SCRIPT}</script>" if report.sites else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Fusion report: {html.escape(report.target)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n<h1>{html.escape(headline(report)).capitalize()}</h1>\n"
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
    kernels = len(by_kernel(report.fused))
    unfused = len(report.unfused)
    tiles: list[tuple[str, int | str, str]] = [
        ("good", len(report.fused), "sites fused"),
        ("bad" if unfused else "", unfused, "sites unfused"),
        ("", kernels, "distinct kernels"),
        ("", report.dispatches, "custom dispatches per call"),
        ("", report.launches().before, "operations without fusion"),
    ]
    if (traffic := report.traffic()) is not None:
        tiles.append(("", size_text(traffic.after), f"read and written, not {size_text(traffic.before)}"))
    strip = "".join(
        f'<div class="tile {kind}"><b>{n}</b><span>{what}</span></div>' for kind, n, what in tiles
    )
    share = 100 * len(report.fused) / len(report.sites) if report.sites else 100
    return f'<div class="strip">{strip}</div>\n<div class="bar"><i style="width:{share:.1f}%"></i></div>'


def _section(title: str, sites: Iterable[Site], *, last_column: Literal["reason", "pattern"]) -> str:
    counted = with_counts(sites)
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
    return f'<code title="{html.escape(location)}">{html.escape(short_location(location))}</code>'


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
        f'<td>{html.escape(last or "")}{note}</td><td class="bytes">{traffic_text(site.bytes)}</td>'
        f'<td class="is"><span class="pill">{site.status}</span></td></tr>'
    )


def _aside(title: str, heads: Iterable[str], rows: Iterable[str]) -> str:
    """Not one of the filtered sections: its rows are no sites."""
    return (
        f'<aside><h2>{title}</h2>\n<div class="wrap"><table><thead><tr>{"".join(heads)}</tr></thead>'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div></aside>"
    )


def _remarks_section(report: Report) -> str:
    rows = (
        f'<tr><td class="n">{count}</td><td class="op"><code>{html.escape(remark.op)}</code></td>'
        f'<td class="at">{_source(remark.location)}</td><td>{html.escape(remark.text)}</td></tr>'
        for remark, count in with_counts(report.remarks)
    )
    heads = ('<th class="n"></th>', "<th>operation</th>", "<th>source</th>", "<th>remark</th>")
    return _aside("Remarks", heads, rows)


def _folded_section(report: Report) -> str:
    rows = (
        f"<tr><td><code>{html.escape(value.name)}</code></td>"
        f'<td class="at">{_source(value.location)}</td>'
        f"<td><code>{html.escape(' → '.join(value.operations))}</code></td>"
        f"<td><code>{html.escape(', '.join(value.sources))}</code></td>"
        f'<td class="bytes">{traffic_text(value.bytes)}</td>'
        f'<td class="bytes">{size_text(value.saved)}</td></tr>'
        for value in report.folded
    )
    heads = ("parameter", "source", "operations", "made from", "stored", "saved per call")
    title = f"Folded<small>{html.escape(folding_text(report))}</small>"
    return _aside(title, (f"<th>{head}</th>" for head in heads), rows)


def _state_section(report: Report) -> str:
    rows = (
        f"<tr><td><code>{html.escape(kept.name)}</code></td>"
        f"<td><code>{html.escape(kept.dtype)}{list(kept.shape)}</code></td>"
        f'<td class="bytes">{size_text(kept.bytes)}</td><td>'
        + "<br>".join(html.escape(f"{function}: {how}") for function, how in kept.functions.items())
        + "</td></tr>"
        for kept in report.state
    )
    heads = ("<th>tensor</th>", "<th>type</th>", "<th>bytes</th>", "<th>written</th>")
    return _aside(f"State<small>{html.escape(state_text(report))}</small>", heads, rows)
