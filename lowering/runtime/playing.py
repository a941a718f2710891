"""Play a program's recorded calls with torch's tensors, and record them, in one session."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import starmap
from typing import Any

import torch
from iree import runtime as iree
from torch import Tensor
from torch._C._dynamo import guards

from ..errors import RunError
from .graphs import Graphs, Range, Room, Tape
from .session import Memory, Outcome, Place, Session, Storage, plain, refuse_forked


def play(session: Session, tape: Tape, passed: Sequence[Any], outcome: Outcome) -> None:
    """Do again what was recorded, with what is passed now, on torch's current stream.

    passed: tensors that ``presented`` gave, views, and ints, which the plan knows.  Nothing is waited for.
    ``outcome`` knows whether it was begun, as in ``Session.invoke``.
    """
    addresses = [
        value.data_ptr() or _located(session, value)[0]
        if isinstance(value, Tensor)
        else session.address(value)[0]
        for value in passed
        if not isinstance(value, int)
    ]
    refuse_forked()
    with session.lock:
        session.context()
        stream = session.stream()
        outcome.extend(zip(map(tape.player(addresses), (stream,)), ((),), strict=True))
    ((code, _),) = outcome
    if code:
        outcome.clear()
        tape.check(code)


def results(
    session: Session, tape: Tape, values: Sequence[Any], storage: Sequence[Storage], size: int
) -> list[Tensor]:
    """Do again what was recorded of a program without state, and return its results, in this very order.

    values: the arguments, tensors and ints; size: of the scratch memory.  What ``play`` does, the short way.
    """
    refuse_forked()
    rooms = tape.rooms
    if rooms is None:
        rooms = [_room(each.shape, each.like.dtype) for each in storage]
        rooms += [_room((size,), torch.uint8)] if size else []
        tape.rooms = rooms
    memory = _empty(rooms, session.place)
    passed = [presented(session, value) for value in values if not isinstance(value, int)]
    rest = () if size else (session.somewhere,)
    addresses = [x.data_ptr() or _located(session, x)[0] for x in (*passed, *memory, *rest)]
    with session.lock:
        session.context()
        tape.check(tape.player(addresses)(session.stream()))
    return memory[: len(storage)]


def record(
    session: Session,
    graphs: Graphs,
    plan: object,
    function: iree.VmFunction,
    passed: Sequence[Any],
    memory: Sequence[iree.HalBufferView],
    outcome: Outcome,
) -> None:
    """Have IREE do a call, which is due, and record it; it reads from no two tensors that share memory."""
    passed = _apart([presented(session, value) for value in passed])
    ranges = [_located(session, value) for value in (*passed, *memory) if not isinstance(value, int)]
    with graphs.recorded(plan, ranges, session):
        session.invoke(function, passed, memory, outcome)


def presented(session: Session, value: Any) -> Any:
    """What a program is passed for a value, at the address where it finds it."""
    if not isinstance(value, Tensor):
        return value
    return plain(value) if session.place.emulated is None else session.to_iree(value)


def room(session: Session, storage: Storage) -> Memory:
    """Memory as ``Session.allocate`` gives it; a view, where there is one, is for the emulated GPU."""
    if session.on_host:
        return session.allocate(storage)
    return _empty([_room(storage.shape, storage.like.dtype)], session.place)[0], None


def scratch(session: Session, size: int) -> Tensor | iree.HalBufferView:
    """Scratch memory, as ``Session.scratch`` gives it."""
    if session.on_host:
        return session.scratch(size)
    return _empty([_room((size,), torch.uint8)], session.place)[0]


# What the code calls that torch.compile writes: it takes less time than torch.empty.
_empty_strided_cuda = getattr(guards, "_empty_strided_cuda", None)


def _empty(rooms: Sequence[Room], place: Place) -> list[Tensor]:
    """Tensors, not set to anything, on a GPU."""
    if _empty_strided_cuda is None or torch._C._cuda_getDevice() != place.index:
        return [torch.empty(shape, dtype=dtype, device=place.device) for shape, _, dtype in rooms]
    return [*starmap(_empty_strided_cuda, rooms)]


@lru_cache(4096)
def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Room:
    """What a contiguous tensor of this shape needs."""
    return shape, torch.empty(shape, device="meta").stride(), dtype


def _located(session: Session, value: Tensor | iree.HalBufferView) -> Range:
    """Where the memory of a value is that a program is passed."""
    if not isinstance(value, Tensor):
        return session.address(value)
    where = value if value.numel() else session.somewhere
    if not where.data_ptr():
        raise RunError(f"a {type(value).__name__} has no memory of its own that a program could read")
    return where.data_ptr(), where.nbytes


def _apart(values: Sequence[Any]) -> list[Any]:
    """The values, of tensors that share memory all but one copied: a recording knows them by addresses."""
    taken: list[Range] = []
    found = []
    for value in values:
        if isinstance(value, Tensor) and value.numel():
            begin, end = value.data_ptr(), value.data_ptr() + value.nbytes
            if any(begin < last and first < end for first, last in taken):
                value = value.clone()
            taken.append((begin, end))
        found.append(value)
    return found
