"""The figure and the tables of a benchmark, from the JSON that ``bench_kernels.py run`` wrote.

    python -m tools.bench.plot_kernels docs/kernels.json docs/kernels.svg     # tables on standard output

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Point = dict[str, Any]
FAMILIES = ("norm, quant", "add, norm, quant, y")
HIDDEN = (1536, 4096, 7168)
WAYS = {
    "fused": ("this kernel", "C0", "o"),
    "flashinfer": ("FlashInfer", "C1", "s"),
    "inductor": ("torch.compile", "C2", "^"),
    "unfused": ("one kernel each", "C3", "v"),
    "copy": ("a copy of as many bytes", "0.6", "x"),
}
TABLE_ROWS = (1, 16, 128, 1024, 4096, 16384)


def draw(points: Sequence[Point], file: Path, title: str) -> None:
    """The share of the copy bandwidth by number of rows, a panel for each family and length."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vmfuse"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(FAMILIES), len(HIDDEN), figsize=(12, 7), sharex=True, sharey=True)
    for row, family in zip(axes, FAMILIES, strict=True):
        for axis, hidden in zip(row, HIDDEN, strict=True):
            chosen = [point for point in points if (point["family"], point["hidden"]) == (family, hidden)]
            for way, (label, color, marker) in WAYS.items():
                timed = [point for point in chosen if way in point["times"]]
                shares = [100 * point["floor"] / point["times"][way] for point in timed]
                rows = [point["rows"] for point in timed]
                axis.plot(rows, shares, color=color, marker=marker, label=label, linewidth=1, markersize=4)
            axis.set(xscale="log", title=f"{family}: T x {hidden}", ylim=(0, 105))
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("% of the copy bandwidth")
    for axis in axes[-1]:
        axis.set_xlabel("T")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def tables(points: Sequence[Point]) -> Iterator[str]:
    """Markdown: a table for every family, times in microseconds."""
    for family in dict.fromkeys(point["family"] for point in points):
        yield f"\n{family}:\n"
        ways = list(dict.fromkeys(way for p in points if p["family"] == family for way in p["times"]))
        yield "| T x H | bytes at copy bandwidth | of it | " + " | ".join(ways) + " |"
        yield "|---" * (len(ways) + 3) + "|"
        for point in points:
            if point["family"] == family and point["hidden"] in HIDDEN and point["rows"] in TABLE_ROWS:
                times = [point["times"].get(way) for way in ways]
                cells = [f"{time:.2f}" if time else "" for time in times]
                share = f"{100 * point['floor'] / point['times']['fused']:.1f}%"
                where = f"{point['rows']} x {point['hidden']}"
                yield f"| {where} | {point['floor']:.2f} | {share} | " + " | ".join(cells) + " |"


def main() -> int:
    """Draw and print; returns the exit code."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    bandwidth = found["copy_bandwidth"] / 1e9
    draw(found["points"], Path(sys.argv[2]), f"{found['gpu']}, copy bandwidth {bandwidth:.0f} GB/s")
    print("\n".join(tables(found["points"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
