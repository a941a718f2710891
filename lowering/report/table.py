"""Show a report in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from patterns.sites import Timing

from .words import (
    by_kernel,
    folding_text,
    headline,
    not_in_place,
    short_location,
    state_text,
    totals,
    with_counts,
)

if TYPE_CHECKING:
    from .report import Report


def timing_table(timing: Timing) -> RenderableType:
    """Tabulate what each step took, and each pattern with its hits and misses, the slowest first."""
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


def table_of(report: Report) -> RenderableType:
    """Unfused sites first, equal sites as one line with a count."""
    title = Text.assemble((headline(report), "bold"), "".join(f"  ·  {part}" for part in totals(report)))
    if folding := folding_text(report):
        title = Group(title, Text(folding, "dim"))
    for remark, count in with_counts(report.remarks):
        times = f" ({count} times)" if count > 1 else ""
        line = f"{remark.op} at {short_location(remark.location, 1)}{times}: {remark.text}"
        title = Group(title, Text(line, "yellow"))
    if state := state_text(report):
        title = Group(title, Text(state, "dim"))
    for text, count in not_in_place(report):
        title = Group(title, Text(f"{text} ({count} tensor{'s' * (count != 1)})", "yellow"))
    if not report.sites:
        return title
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("op", no_wrap=True)
    table.add_column("source", no_wrap=True)
    table.add_column("kernel, or why not", overflow="fold")
    for site, count in with_counts(report.unfused):
        where, reason = Text(short_location(site.location, parts=1)), Text(site.reason or "", "yellow")
        table.add_row(Text("✗", "bold red"), str(count), site.op, where, reason)
    for kernel, sites in by_kernel(report.fused).items():
        for index, (site, count) in enumerate(with_counts(sites)):
            name = Text(kernel, "cyan") if index == 0 else Text("〃", "dim")
            if site.note:
                name.append(f"\n{site.note}", "yellow")
            where = Text(short_location(site.location, parts=1))
            table.add_row(Text("✓", "green"), str(count), site.op, where, name)
        table.add_section()
    return Group(title, table)
