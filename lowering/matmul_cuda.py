"""The block-scaled product of ``kernels/matmul.cu``."""

from __future__ import annotations

import functools
import json
from dataclasses import astuple, dataclass
from pathlib import Path

from patterns.contracts import MatmulSpec

from .mapping import MULTIPROCESSORS, GridRule
from .matmul_variant import Specialised, Variant, common_defines, texts
from .targets import Target

TOKENS = (8, 16, 32, 64, 128)  # rows of a that the kernel can have in a unit
MOST_SPLIT = 8
ANY_ROWS = 2**31 - 1

_BLOCK = 128
_THREADS = 384
_SHARED = 227 << 10  # what a workgroup may have at most, and has: more of it is more bytes on their way
# Workgroups that are at work at once, by the size of their clusters, which lie within one of the parts of
# the machine that have 16 or 18 multiprocessors.
_AT_ONCE = {"sm_90": {1: 132, 2: 132, 4: 128, 8: 128}, "sm_100": {1: 148, 2: 148, 4: 144, 8: 144}}


@dataclass(frozen=True)
class Plan:
    """How products of up to ``rows`` rows are divided.

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
    """The plans for a product, of ascending ``rows``: what was measured for weights of this size, else a rule."""
    return _measured(target.name).get((spec.columns, spec.depth)) or default_plans(spec, target)


def default_plans(spec: MatmulSpec, target: Target) -> Plans:
    """No more tokens in a unit than there are, and K split until every multiprocessor has weights to read."""
    tiles, most = -(-spec.columns // _BLOCK), MULTIPROCESSORS[target.name]
    splits = [split for split in _splits(spec) if split * tiles <= most] or [1]
    plans = [Plan(tokens, tokens, splits[0]) for tokens in TOKENS]
    for split in splits:
        rows = most // (split * tiles) * TOKENS[-1]
        if split > 1 and rows > plans[-1].rows:
            plans.append(Plan(rows, TOKENS[-1], split))
    return (*plans, Plan(ANY_ROWS, TOKENS[-1], share=2))


def _splits(spec: MatmulSpec) -> list[int]:
    """Powers of two from the largest on that leave every part of K a block."""
    powers = (1 << k for k in reversed(range(MOST_SPLIT.bit_length())))
    return [split for split in powers if split * _BLOCK <= spec.depth]


@functools.cache
def _measured(target: str) -> dict[tuple[int, int], Plans]:
    """What tools/tune_gemm.py wrote for ``target``, by columns and depth."""
    path = Path(__file__).with_name("tuning") / f"{target}_products.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["products"]
    return {(item["columns"], item["depth"]): tuple(Plan(*plan) for plan in item["plans"]) for item in found}


def _why_unsupported(spec: MatmulSpec, target: Target) -> str | None:
    if spec.group != _BLOCK:
        return f"The product kernel of {target.name} knows groups of {_BLOCK}, not {spec.group}."
    if {spec.a_dtype, spec.b_dtype} != {"float8_e4m3fn"}:
        return f"The product kernel of {target.name} multiplies float8_e4m3fn, not {spec.a_dtype} and {spec.b_dtype}."
    return None


def _specialise(spec: MatmulSpec, target: Target, tile: object | None) -> Specialised:
    plans = tile if isinstance(tile, tuple) else choose_plans(spec, target)
    cluster = max(plan.team for plan in plans)
    listed = " ".join(f"P({', '.join(map(str, astuple(plan)))})" for plan in plans)
    values = {**common_defines(spec), "CLUSTER": cluster, "SHARED": _SHARED}
    return Specialised(
        (*texts(values), ("PLANS", listed)),
        GridRule(1, most=1, columns=_AT_ONCE[target.name][cluster]),
        _THREADS,
        _SHARED,
    )


VARIANT = Variant(
    "matmul.cu", ("swizzled_128",), ("column_tma", "column", "row"), _why_unsupported, _specialise
)
