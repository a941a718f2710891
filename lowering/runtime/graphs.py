"""Play a call again as one graph of the GPU's driver, without IREE.

The first call with given shapes runs as ever.  The second is recorded while it runs, by the library of
``driver_library``: kernels, copies and fills in IREE's order, and which of their addresses lie in the
caller's memory (arguments, results, scratch, state).  From then on a call is one launch of the graph, on
torch's current stream, with the addresses of that call; it returns before the GPU is done, as torch's own
operations do.

A call that cannot be played so, for whatever reason, goes on as before; ``reason`` says why.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Literal, Protocol, get_args
from weakref import WeakSet

import torch

from ..errors import RunError
from . import driver_library

Mode = Literal["auto", "off"]
"""Whether calls become graphs; only those on a GPU can."""

Range = tuple[int, int]
"""An address, and the bytes that are there."""

Room = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""The shape, strides and dtype of a tensor."""

MODES = get_args(Mode)

_KEPT = 64
"""Graphs of a function; the one used least recently goes."""

_PATIENCE = 10.0
"""Seconds that a recording waits for calls that are under way, before it is left for another time."""

_RECORDINGS = 3
"""A recording that something got in the way of is tried again, up to this number."""


class Gate:
    """Let calls through side by side, and a thread that records alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone: int | None = None

    def __enter__(self) -> None:
        with self._changed:
            while self._alone not in (None, threading.get_ident()):
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._alone is not None:
                self._changed.notify_all()

    def close(self) -> bool:
        """Keep all other threads out, from when they have left; False where they do not in time.

        ``open`` has to follow in any case.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._alone is None, _PATIENCE):
                return False
            self._alone = threading.get_ident()
            return self._changed.wait_for(lambda: not self._inside, _PATIENCE)

    def open(self) -> None:
        """Let others in again, if this thread has kept them out."""
        with self._changed:
            if self._alone == threading.get_ident():
                self._alone = None
                self._changed.notify_all()


GATE = Gate()
"""All that IREE issues to GPUs: what passes the library is not told apart by who called."""


class Owner(Protocol):
    """What keeps the kernels and weights that tapes need; it drops them before it lets these go."""

    tapes: WeakSet[Tape]
    number: int
    """Given by ``loading``."""


class Tape:
    """What one call issued, to be played again; ``owner`` keeps its kernels and weights."""

    def __init__(self, library: ctypes.CDLL, pointer: int, owner: Owner, buffers: int):
        self._library, self._owner = library, owner
        self._addresses = ctypes.c_uint64 * buffers
        self._pointer: int | None = pointer
        owner.tapes.add(self)
        self.operations = 0
        self.rooms: list[Room] | None = None
        """Of the results and the scratch memory, once somebody has looked."""

    def player(self, addresses: Sequence[int]) -> Callable[[int], int]:
        """What plays it with the caller's memory at ``addresses`` on the stream that it takes.

        No function of Python's: an interrupt comes before it or after it.
        """
        return partial(self._library.tape_play, self._pointer, self._addresses(*addresses))

    @property
    def is_captured(self) -> bool:
        """Tell whether it was played while torch captured the stream."""
        return bool(self._library.tape_captured(self._pointer))

    def check(self, code: int) -> None:
        """Raise RunError for what playing has returned."""
        if code:
            raise RunError(self._library.tape_error(code).decode())

    def drop(self) -> None:
        """Let it go, once the GPU is done with it."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._library.tape_drop(pointer)

    __del__ = drop


class _Known:
    """What is known of the calls of one plan."""

    def __init__(self) -> None:
        self.calls = self.used = 0
        self.recordings = 0
        self.tape: Tape | None = None
        self.reason = ""

    def is_wanted(self) -> bool:
        return self.tape is None and self.recordings < _RECORDINGS


class Graphs:
    """The graphs of one function, by plan; ``reason`` is why it can have none, or empty."""

    def __init__(self, library: ctypes.CDLL | None, reason: str):
        self._library, self.reason = library, reason
        self._known: dict[Any, _Known] = {}
        self._clock = count()
        self._forgetting = threading.Lock()
        self._captured: list[Tape] = []

    def tape(self, plan: object) -> Tape | None:
        """The recording of a call with this plan, if there is one."""
        known = self._known.get(plan)
        if known is None:
            return None
        known.used = next(self._clock)
        return known.tape

    def _forget_oldest(self) -> None:
        with self._forgetting:
            while len(self._known) >= _KEPT:
                plan, known = min(self._known.items(), key=lambda item: item[1].used)
                del self._known[plan]
                if known.tape is not None and known.tape.is_captured:
                    self._captured.append(known.tape)  # a graph of the caller's needs what it has

    def explain(self, plan: object) -> str:
        """Say whether a call with this plan is a graph, and if not, why."""
        if self.reason:
            return f"no graph: {self.reason}"
        known = self._known.get(plan)
        if known is None or not (known.tape or known.reason):
            return "no graph yet: the second call with the same dtypes and shapes makes one"
        if known.tape is None:
            return f"no graph: {known.reason}"
        operations = known.tape.operations
        return f"a graph of {operations} operation{'' if operations == 1 else 's'}"

    def due(self, plan: object) -> bool:
        """Count a call with this plan, and tell whether it is to be recorded."""
        if self.reason:
            return False
        known = self._known.get(plan)
        if known is None:
            self._forget_oldest()
            known = self._known[plan] = _Known()
            known.used = next(self._clock)
        known.calls += 1
        return known.calls > 1 and known.is_wanted()

    @contextmanager
    def recorded(self, plan: object, ranges: Sequence[Range], owner: Owner) -> Iterator[None]:
        """Record the call that is made meanwhile, which is due and is passed the memory at ``ranges``.

        Nothing else of IREE's runs on a GPU then.  owner: what keeps the program's own memory.
        """
        library, known = self._library, self._known.setdefault(plan, _Known())
        assert library is not None
        try:
            alone = GATE.close()
            if not (alone and known.is_wanted()):  # another thread may have recorded it meanwhile
                yield
                return
            known.recordings += 1
            numbers = ctypes.c_uint64 * len(ranges)
            bases, sizes = numbers(*[at for at, _ in ranges]), numbers(*[size for _, size in ranges])
            pointer = library.tape_begin(owner.number, bases, sizes, len(ranges))
            if not pointer:
                known.reason = "the library does not record it"
                yield
                return
            tape = Tape(library, pointer, owner, len(ranges))
            try:
                yield
            finally:
                library.tape_end(pointer)
            tape.operations = library.tape_operations(pointer)
            known.reason = library.tape_reason(pointer).decode()
            known.tape = None if known.reason else tape
        finally:
            GATE.open()


_LOADING = threading.Lock()
_NUMBERS = count(1)


@contextmanager
def loading(library: ctypes.CDLL | None) -> Iterator[int]:
    """Let what is allocated while a block runs be the memory of a program, whose number it is given."""
    number = next(_NUMBERS)
    if library is None:
        yield number
        return
    with GATE, _LOADING:
        library.tape_load(number)
        try:
            yield number
        finally:
            library.tape_load(0)


def graphs_of(backend: str, mode: Mode) -> tuple[ctypes.CDLL | None, str]:
    """The library for a backend's graphs, or why there is none."""
    if backend == "cpu":
        return None, "it runs on the CPU"
    if mode == "off":
        return None, "graphs are off"
    found = driver_library.library(backend)
    return (None, found) if isinstance(found, str) else (found, "")
