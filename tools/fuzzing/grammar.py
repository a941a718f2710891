"""A random graph from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import arithmetic, indexing, norms, quantizations, views
from .graph import Graph
from .scope import FLOATS, INTS, Scope, Unsuitable

_FAMILIES = (
    (6, norms.STEPS),
    (5, quantizations.STEPS),
    (5, arithmetic.STEPS),
    (5, views.STEPS),
    (4, indexing.STEPS),
)
_HIDDEN = (64, 64, 128, 128, 256, 32, 8, 96)


def graph_of(seed: int, *, special: bool = False) -> Graph:
    """The graph of ``seed``; ``special``: its arguments hold NaN, infinities and denormals."""
    while True:
        graph = _attempt(seed, special)
        if graph.results and graph.steps:
            return graph
        seed += 10**9


def _attempt(seed: int, special: bool) -> Graph:
    scope = Scope(seed, special, _sizes(seed))
    _arguments(scope)
    length, tries = scope.choice([2, 3, 4, 6, 8]), 0
    while len(scope.steps) < length and tries < 8 * length:
        tries += 1
        steps = _weighted(scope, _FAMILIES)
        try:
            scope.add(_weighted(scope, steps)(scope))
        except Unsuitable:
            continue
    return scope.graph()


def _sizes(seed: int) -> tuple[tuple[int, int], ...]:
    """Two calls; in some the first is square, or the second is small or large."""
    first = [(3, 5), (5, 6), (8, 3), (64, 5), (6, 64)][seed % 5]
    second = [(7, 2), (5, 9), (33, 6), (6, 5)][seed // 5 % 4]
    return first, second


def _weighted(scope: Scope, table: Sequence[tuple[int, Any]]) -> Any:
    return scope.random.choices([entry for _, entry in table], [weight for weight, _ in table])[0]


def _arguments(scope: Scope) -> None:
    hidden = scope.choice(_HIDDEN)
    batch = scope.choice([4, "T", "T", "T", 64, 1, hidden])
    leading = scope.choice([(batch,), (batch,), (batch, "S"), (batch, 3), ("T", "S"), (2, "T", "S")])
    kind = "special" if scope.special else scope.choice(["normal", "rows"])
    dtype, dtypes = scope.choice(FLOATS), []
    shape = (*leading, hidden)
    for _ in range(scope.choice([1, 2, 2, 3])):
        dtype = scope.choice([dtype, dtype, *FLOATS])
        scope.argument(shape, dtype, kind)
        dtypes.append(dtype)
    if scope.chance(0.3):
        scope.argument((*leading, scope.choice([8, 64])), scope.choice(FLOATS), kind)
    if scope.chance(0.3):
        scope.argument(leading, torch.int64, "below 16")
    if scope.chance(0.15):
        scope.argument(shape, scope.choice(INTS), "integers")
    if scope.chance(0.1):
        scope.argument(shape, torch.bool, "below 2")
    if scope.chance(0.1):
        scope.argument(shape, dtypes[0], kind, same="a0")  # the caller passes one tensor twice
