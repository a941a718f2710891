"""Specialise the block-scaled product of ``kernels/matmul.cu``."""

from __future__ import annotations

import functools
import json
from dataclasses import astuple, dataclass
from pathlib import Path

from patterns.contracts import MatmulSpec

from ...targets import Target
from ..instance import GridRule
from .variant import Specialised, Variant, common_defines, texts

# Rows of a that the kernel can have in a unit; without wgmma the registers do not suffice for more.
TOKENS = {"sm_90": (8, 16, 32, 64, 128), "sm_100": (8, 16, 32, 64)}
MOST_SPLIT = 8
ANY_ROWS = 2**31 - 1

_BLOCK = 128
_THREADS = 384
_MOST_STAGES = 12  # of the ring of blocks
_SHARED = 227 << 10  # the most that a workgroup may have: the more it has, the more bytes are on their way
# Workgroups at work at once, by the size of their clusters, which do not cross the machine's parts of 18
# multiprocessors and less: on an H200 as its driver says, on a B200 as eight parts of 18 would have it.
AT_ONCE = {
    "sm_90": {1: 132, 2: 132, 3: 117, 4: 120, 5: 110, 6: 102, 7: 105, 8: 120},
    "sm_100": {1: 148, 2: 148, 3: 144, 4: 128, 5: 120, 6: 144, 7: 112, 8: 128},
}


@dataclass(frozen=True)
class Plan:
    """Say how products of up to ``rows`` rows are divided.

    A unit is ``tokens`` rows of the result and 128 columns.  ``split`` workgroups add up a part of K each, or
    ``share`` workgroups with a unit each read their weights together; one of the two is 1.
    """

    rows: int
    tokens: int
    split: int = 1
    share: int = 1

    @property
    def team(self) -> int:
        return max(self.split, self.share)


Plans = tuple[Plan, ...]


def choose_plans(spec: MatmulSpec, target: Target) -> Plans:
    """The plans for a product, of ascending ``rows``: measured for weights of this size, or else a rule's."""
    return _measured(target.name).get((spec.columns, spec.depth)) or default_plans(spec, target)


def default_plans(spec: MatmulSpec, target: Target) -> Plans:
    """No more tokens in a unit than there are, and K split until every multiprocessor has weights to read."""
    tiles = -(-spec.columns // _BLOCK)
    splits = [split for split in _splits(spec) if split * tiles <= AT_ONCE[target.name][split]] or [1]
    sizes = TOKENS[target.name]
    plans = [Plan(tokens, tokens, splits[0]) for tokens in sizes]
    for split in splits:
        rows = AT_ONCE[target.name][split] // (split * tiles) * sizes[-1]
        if split > 1 and rows > plans[-1].rows:
            plans.append(Plan(rows, sizes[-1], split))
    return (*plans, Plan(ANY_ROWS, sizes[-1]))


def _splits(spec: MatmulSpec) -> list[int]:
    """Powers of two that leave every part of K a block, from the largest on."""
    return [split for split in (8, 4, 2, 1) if split * _BLOCK <= spec.depth]


@functools.cache
def _measured(target: str) -> dict[tuple[int, int], Plans]:
    """Read what tools/bench/tune_gemm.py wrote for ``target``, by columns and depth."""
    path = Path(__file__).parent.parent / "tuning" / f"{target}_products.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["products"]
    return {(item["columns"], item["depth"]): tuple(Plan(*plan) for plan in item["plans"]) for item in found}


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    if spec.group != _BLOCK and not (spec.whole and spec.depth % _BLOCK == 0):
        of = f"rows of {spec.depth}" if spec.whole else str(spec.group)
        return (
            f"The product kernel of {target.name} knows groups of {_BLOCK} and rows of whole ones, not {of}."
        )
    if {spec.a_dtype, spec.b_dtype} not in ({"float8_e4m3fn"}, {"int8"}):
        dtypes = f"{spec.a_dtype} and {spec.b_dtype}"
        return f"The product kernel of {target.name} multiplies float8_e4m3fn or int8, not {dtypes}."
    return None


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    plans = tile if isinstance(tile, tuple) else choose_plans(spec, target)
    cluster = max(plan.team for plan in plans)
    listed = " ".join(f"P({', '.join(map(str, astuple(plan)))})" for plan in plans)
    values = {**common_defines(spec), "CLUSTER": cluster, "SHARED": _SHARED, "MOST_STAGES": _MOST_STAGES}
    return Specialised(
        (*texts(values), ("PLANS", listed)),
        GridRule(1, most=1, columns=AT_ONCE[target.name][cluster]),
        _THREADS,
        _SHARED,
    )


VARIANT = Variant(
    "matmul.cu", ("swizzled_128",), ("column_tma", "column", "row"), _why_unsupported, _specialise
)
