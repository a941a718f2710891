"""Say what a report says in a few words, and group its sites: for the table and the page alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from .sites import IN_PLACE, READ, Change, Site

if TYPE_CHECKING:
    from .report import Report

Item = TypeVar("Item")


def with_counts(items: Iterable[Item]) -> list[tuple[Item, int]]:
    """Equal ones once with their number: a model's layers share the source line they come from."""
    return list(Counter(items).items())


def by_kernel(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Fused sites under the kernel they became part of, in order of first appearance."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.kernel or "", []).append(site)
    return groups


def size_text(count: int) -> str:
    """``1.5 MB``"""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def traffic_text(traffic: Change | None) -> str:
    """``1.5 MB → 500 kB``; empty where it is not known."""
    return f"{size_text(traffic.before)} → {size_text(traffic.after)}" if traffic else ""


def short_location(location: str, parts: int = 2) -> str:
    """The last parts of a location's path: enough to recognise, short enough for a column."""
    path, colon, line = location.rpartition(":")
    if not (colon and line.isdigit()):
        path, line = location, ""
    tail = "/".join(PurePath(path).parts[-parts:]).lstrip("/")
    return f"{tail}:{line}" if line else tail


def headline(report: Report) -> str:
    """Say how many sites fused, in a sentence."""
    total = len(report.sites)
    if not total:
        return "no operation of this program is one that fuses"
    return f"{len(report.fused)} of {total} site{'s' * (total != 1)} fused"


def folding_text(report: Report) -> str:
    """Say what was folded, in a sentence; empty if nothing was."""
    count = len(report.folded)
    if not count:
        return ""
    stored = sum((value.bytes for value in report.folded), Change(0, 0))
    saved = size_text(sum(value.saved for value in report.folded))
    values = f"{count} value{'s' * (count != 1)} that depend{'s' * (count == 1)} on parameters alone"
    return f"{values} computed once: {saved} less to read and write per call, {traffic_text(stored)} stored"


def totals(report: Report) -> list[str]:
    """List what stands beside the headline: the target, the launches of one call, and what fusion changed."""
    launches, traffic = report.launches(), report.traffic()
    return [
        f"target {report.target}",
        f"{report.dispatches} custom dispatch{'es' * (report.dispatches != 1)} per call",
        f"launches of all sites {launches.before} → {launches.after}",
        *([f"bytes {traffic_text(traffic)}"] if traffic else []),
    ]


def state_text(report: Report) -> str:
    """Say how much the program keeps; '' for nothing."""
    if not report.state:
        return ""
    count, size = len(report.state), size_text(sum(kept.bytes for kept in report.state))
    return f"state: {count} tensor{'s' * (count != 1)}, {size}"


def not_in_place(report: Report) -> list[tuple[str, int]]:
    """What of the state is written otherwise than in place, and how many tensors are."""
    said = [
        f"state{f' in {function}' if len(kept.functions) > 1 else ''}: {how}"
        for kept in report.state
        for function, how in kept.functions.items()
        if how not in (IN_PLACE, READ)
    ]
    return list(Counter(said).items())
