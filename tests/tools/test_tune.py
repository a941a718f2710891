"""How tools/bench/tune.py chooses among mappings it has timed; the times here are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lowering.families.row_mapping import Mapping, Tile
from patterns.contracts import Norm, Quantization, RowSpec

tune = pytest.importorskip("tools.bench.tune")


@dataclass
class Timed:
    """A candidate that takes what ``cost`` says for each number of rows."""

    lanes: Mapping
    cost: Callable[[int], float]

    @property
    def times(self) -> dict[int, float]:
        return {rows: self.cost(rows) for rows in tune.ROWS if rows < tune.MANY or not self.few}

    @property
    def few(self) -> bool:
        return self.lanes.few is not None


PLAIN, LOOPED = Tile(128, 1, 16), Tile(128, 1, 16, blocks=264)


def sliced(tile: Tile, slices: int, spread: int) -> Mapping:
    return Mapping(tile, Tile(tile.lanes, tile.vectors, tile.vector, slices=slices), 1 << 20, spread)


def test_few_rows_need_not_loop() -> None:
    looped = Timed(Mapping(LOOPED, resident=2), lambda rows: 1.1 + rows / 1000)
    plain = Timed(Mapping(PLAIN), lambda rows: 1.0 + rows / 500)
    chosen = tune.choose([looped, plain])
    assert chosen == Mapping(LOOPED, PLAIN, 64, 0, 2)  # at 128 rows the loop is ahead


def test_slices_end_where_they_cost_more() -> None:
    plain = Timed(Mapping(PLAIN), lambda rows: 2.0 + rows / 1000)
    few = Timed(sliced(PLAIN, 8, 66), lambda rows: 1.5 + rows / 20)
    assert tune.choose([plain, few]) == Mapping(PLAIN, Tile(128, 1, 16, slices=8), 4, 66)


def test_a_second_tile_has_to_be_worth_it() -> None:
    plain = Timed(Mapping(PLAIN), lambda rows: 2.0)
    few = Timed(sliced(PLAIN, 8, 66), lambda rows: 1.999)
    assert tune.choose([plain, few]) == Mapping(PLAIN)


def test_both_tiles_have_as_many_threads() -> None:
    """The fastest of few rows is no help beside the fastest of many."""
    many = Timed(Mapping(PLAIN), lambda rows: 2.0)
    few = Timed(sliced(Tile(256, 1, 8), 8, 66), lambda rows: 1.0)
    slow = Timed(Mapping(Tile(256, 1, 8)), lambda rows: 200.0)
    assert tune.choose([many, few, slow]) == Mapping(PLAIN)


def test_candidates_are_mappings_of_their_rows() -> None:
    spec = RowSpec(2048, "bfloat16", Norm(1e-6), weight_dtype="bfloat16", quantizations=(Quantization(128),))
    found = list(tune.candidates(spec, 132))
    assert any(lanes.many.blocks for lanes in found) and any(lanes.few for lanes in found)
    for lanes in found:
        tile = lanes.few or lanes.many
        assert tile.threads == lanes.threads <= 1024
        assert tile.lanes * tile.vectors * tile.vector >= spec.hidden
        assert lanes.resident * lanes.threads <= 2048
