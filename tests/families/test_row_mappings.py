"""How lanes and workgroups lie over rows: no bit depends on it, and every row is covered."""

from __future__ import annotations

import itertools

import pytest

from lowering.families.instance import GridRule
from lowering.families.row import instance
from lowering.families.row_mapping import Mapping, Tile, choose_mapping
from lowering.targets import Target
from patterns.contracts import Quantization
from tests.families.host_kernels import assert_same, run
from tests.families.row_cases import CASES, Q128, SM90, SM100, integer_inputs, layer_norm, spec
from tests.families.row_reference import reference


def test_other_tiles(launcher) -> None:
    """A mapping is only a choice: idle lanes, many vectors a lane, several rows a block: the same bits."""
    case = CASES["add_exact_all"]  # 96 vectors of 16
    inputs = integer_inputs(case, 5)
    for lanes, vectors, rows in [(64, 2, 1), (96, 1, 1), (32, 4, 2), (16, 6, 8), (128, 1, 1)]:
        kernel = instance(case, SM90, Mapping(Tile(lanes, vectors, 16, rows)))
        assert_same(run(kernel, launcher(kernel), inputs, 5), reference(case, inputs), (lanes, vectors, rows))


# Workgroups that loop over rows, slices of one row, vectors of 8, several rows a workgroup; few and many.
MAPPINGS = {
    "looped": (
        spec(1536, quants=[Q128]),
        Mapping(Tile(96, 1, 16, blocks=3), Tile(96, 2, 8, slices=2), 3, 4),
        [0, 1, 2, 3, 4, 9, 17],
    ),
    "waves_looped": (
        spec(1536, residual="exact", writes_sum=True, offset=1.0, quants=[Q128]),
        Mapping(Tile(32, 3, 16, rows=4, blocks=2), Tile(128, 1, 16, slices=2), 3, 4),
        [1, 3, 5, 9, 31],
    ),
    "sliced": (
        spec(7168, residual="exact", writes_sum=True, writes_y=True, quants=[Q128, Quantization(None)]),
        Mapping(Tile(224, 2, 16), Tile(224, 4, 8, slices=4), 4, 8),
        [1, 2, 3, 4, 5],
    ),
    "layer_looped": (
        layer_norm(1536, quants=[Q128, Quantization(None)]),
        Mapping(Tile(96, 1, 16, blocks=3), Tile(96, 2, 8, slices=2), 3, 4),
        [1, 2, 4, 9],
    ),
    # Groups that a wave folds by itself, and those of several waves, idle lanes behind the last.
    "groups_looped": (
        spec(1536, rounding="twice", group=512, quants=[Q128]),
        Mapping(Tile(96, 1, 16, blocks=3), Tile(96, 2, 8, slices=2), 3, 4),
        [1, 2, 4, 9],
    ),
    "groups_sliced": (
        layer_norm(3200, group=800, writes_y=True, quants=[Q128]),
        Mapping(Tile(224, 1, 16, blocks=2), Tile(224, 2, 8, slices=2), 2, 2),
        [1, 2, 3, 5],
    ),
    "idle_lanes": (
        spec(3200, quants=[Q128, Quantization(32, layout="column_tma")]),
        Mapping(Tile(224, 1, 16, blocks=2), Tile(224, 2, 8, slices=2), 2, 2),
        [1, 2, 3, 5],
    ),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_changes_no_bit(name: str, launcher) -> None:
    case, mapping, sizes = MAPPINGS[name]
    kernel = instance(case, SM90, mapping)
    for rows, shift in itertools.product(sizes, (0, 3)):
        inputs = integer_inputs(case, rows, seed=rows)
        assert_same(
            run(kernel, launcher(kernel), inputs, rows, shift), reference(case, inputs), (rows, shift)
        )


def test_grid_rule() -> None:
    rule = Mapping(Tile(64, 2, 16, rows=2, blocks=10), Tile(128, 1, 16, slices=4), 6, 16).grid_rule
    grids = {0: 1, 1: 4, 4: 16, 5: 10, 6: 12, 6 + 1: 4, 19: 10, 1000: 10}
    assert {rows: rule.workgroups(rows) for rows in grids} == grids


def test_grid_rule_of_columns() -> None:
    rule = GridRule(128, columns=22)
    grids = {0: 22, 1: 22, 128: 22, 129: 44, 257: 66}
    assert {rows: rule.workgroups(rows) for rows in grids} == grids


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda target: target.name)
@pytest.mark.parametrize("hidden", [1024, 1536, 2880, 4096, 7168, 16384])
def test_chosen_mappings_cover_their_rows(hidden: int, target: Target) -> None:
    wholes = [Quantization(None)]
    for residual, writes_y in itertools.product((None, "exact"), (False, True)):
        case = spec(hidden, residual=residual, writes_sum=bool(residual), writes_y=writes_y, quants=wholes)
        mapping = choose_mapping(case, target)
        for tile in filter(None, (mapping.many, mapping.few)):
            assert tile.threads == mapping.threads <= 1024
            assert tile.lanes * tile.vectors * tile.vector * tile.batches >= hidden
            assert tile.slices == 1 or (tile.vectors * tile.lanes // 32 >= tile.slices and tile.rows == 1)
