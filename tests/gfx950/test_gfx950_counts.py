"""What the gfx950 kernels execute per element keeps to its bounds, and tools/gfx950/counts.py says so."""

from __future__ import annotations

import pytest

from tools.gfx950 import counts as gfx950_counts
from tools.gfx950.counts import Machine, count, predicted, specs

# Most vector instructions per element: the goal where there is one that is met, else what there is today.
BOUNDS = {
    "norm + quant": 12.1,
    "norm (unrounded) + quant": 11.1,
    "add + norm + quant + bf16": 16.0,
    "quant": 5.8,
    "silu * up + quant": 25.1,
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("hidden", [1536, 7168, 16384])
def test_instructions_per_element(name: str, hidden: int) -> None:
    spec, _ = specs(hidden)[name]
    counts = count(spec)
    assert 0 < counts.vector <= BOUNDS[name]
    resources = counts.resources
    assert resources.scratch_bytes == 0 and resources.vgprs <= 128
    # Memory is touched in pieces of 16 bytes: a weight and a row are 2 bytes an element, codes one.
    least = counts.bytes_moved / 16 / 64
    assert least * 0.9 <= counts.by_work["load"] + counts.by_work["store"] <= least * 1.35


def test_times_follow_from_counts() -> None:
    spec, _ = specs(4096)["norm + quant"]
    counts = count(spec)
    bytes_of_a_row = 2 * 4096 + 4096 + 4 * 32
    seconds, bound = predicted(counts, 100_000, Machine())
    assert bound == "memory" and seconds == pytest.approx((100_000 * bytes_of_a_row + 2 * 4096) / 8e12)
    assert predicted(counts, 1, Machine())[1] == "latency"
    assert predicted(counts, 100_000, Machine(bytes_per_second=8e15))[1] == "vector"


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    missed = gfx950_counts.main(["--hidden", "1536", "--tokens", "1", "4096"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| norm + quant | 1536 |")]
    assert len(rows) == 2 and rows[1].count("|") == 5
    assert missed == int(any("missed" in line for line in lines))
