"""tools/gfx950/products.py: a unit of work counted, and what an MI355X is predicted to take."""

from __future__ import annotations

import pytest

from tools.gfx950 import products as gfx950_products
from tools.gfx950.counts import Machine
from tools.gfx950.products import ComputeUnit, predicted, unit_of


def test_counts_of_units() -> None:
    """A block is one matrix instruction for 16 x 16 results; each byte comes once; LDS has no conflicts."""
    few, many = unit_of(64, 2048, 1024), unit_of(4096, 2048, 1024)
    assert (few.rows, few.columns, many.rows, many.columns) == (64, 16, 128, 128)
    assert few.counts.by_work["matrix"] == 4 * 8 and many.counts.by_work["matrix"] == 64 * 8
    for unit in (few, many):
        codes = (unit.rows + unit.columns) * 1024
        assert codes <= unit.counts.bytes_loaded <= 1.15 * codes
        assert unit.counts.bank_conflicts == {} and unit.resources.scratch_bytes == 0
    # The sums of four waves, written once and read once; a, written once and read by four waves.
    assert few.lds_bytes == 2 * 4 * 64 * 16 * 4
    assert many.lds_bytes > 5 * 128 * 1024


def test_times_follow_from_counts() -> None:
    machine, compute = Machine(), ComputeUnit()
    one = unit_of(1, 7168, 1024)
    seconds, bound = predicted(one, 1, 7168, 1024, machine, compute)
    assert bound == "latency" and seconds == pytest.approx(0.8e-6 * (1 + 2 / 6))
    fast = Machine(memory_latency=0.0)
    seconds, bound = predicted(one, 1, 7168, 1024, fast, compute)
    assert bound == "memory" and seconds == pytest.approx(
        (7168 * 1024 + 1024 + 4 * 8 + 2 * 7168) / 8e12, rel=1e-6
    )
    many = unit_of(4096, 7168, 1024)
    slow = ComputeUnit(matrix_cycles=64)
    seconds, bound = predicted(many, 4096, 7168, 1024, machine, slow)
    # 1792 units, 7 for each compute unit.
    assert bound == "matrix" and seconds == pytest.approx(7 * 64 * 8 * 64 / 4 / 2.4e9)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert gfx950_products.main(["--shapes", "1x128x256", "64x7168x2048"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("| 64 x 32 | 2048 | ")]
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| 64 | 7168 | 2048 |")] == [
        "8.05"
    ]
