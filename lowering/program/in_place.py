"""Let a program write new values of what it is passed into the memory of the old.

A new value that is made of the old one by updates is written where the old one is (``write_in_place``).  Any
other new value, one that is computed as a whole or while something still reads the old one, is returned
behind the results, for the caller to put where it belongs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from iree.compiler import ir

from ..signature import ASYNC, Written
from .ownership import why_not_in_place, write_in_place
from .storage import drop_results, functions_of, results_of

_APART = "copied in each call: IREE gives the new value other memory"


def update_in_place(
    module: ir.Module, name: str, written: Sequence[Written], apart: Collection[int] = ()
) -> tuple[tuple[Written, ...], dict[int, str]]:
    """Return no more what is written in place, of ``@name`` in ``module`` after IREE's torch pipeline.

    apart: the arguments whose new values are returned in any case.  Gives what became of each new value:
    those in place have no result, the others are numbered anew; and of the others, by argument, why.
    """
    work = functions_of(module).get(name + ASYNC)
    if not written or work is None or len(work.regions[0].blocks) != 1:
        return tuple(written), {}
    values = {result.number: value for value, same in results_of(work).items() for result in same}
    dropped: set[int] = {
        item.result
        for item in written
        if item.argument not in apart
        and item.result is not None
        and item.result in values
        and write_in_place(work, item.argument, values[item.result])
    }
    reasons = {
        item.argument: _APART if item.argument in apart else why_not_in_place(values[item.result])
        for item in written
        if item.result in values and item.result not in dropped
    }
    drop_results(module, name, dropped)
    return tuple(Written(item.argument, _renumbered(item.result, dropped)) for item in written), reasons


def _renumbered(result: int | None, dropped: Collection[int]) -> int | None:
    if result is None or result in dropped:
        return None
    return result - sum(number < result for number in dropped)
