"""What a call that is a graph passes to it, and what it does with a state, without a GPU."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowering.errors import RunError
from lowering.runtime import graphs, playing
from lowering.runtime.session import Storage
from lowering.runtime.state import State
from lowering.signature import TensorSpec


class Tape:
    """Remembers the addresses that it is played with."""

    code = 0
    rooms = None

    def player(self, addresses: list[int]) -> Any:
        self.addresses = addresses
        return lambda stream: self.code if stream == 5 else -1

    def check(self, code: int) -> None:
        if code:
            raise RunError(f"error {code}")


@pytest.fixture
def session(monkeypatch) -> Any:
    monkeypatch.setattr(playing, "_empty_strided_cuda", None)
    somewhere = torch.zeros(64, dtype=torch.uint8)
    place = SimpleNamespace(emulated=None, index=0, device=torch.device("cpu"))
    known = {"place": place, "somewhere": somewhere, "lock": threading.Lock(), "on_host": False}
    return SimpleNamespace(**known, context=lambda: None, stream=lambda: 5)


def test_results_are_played_into_in_their_order(session):
    """Ints are no addresses; what is empty has that of memory that nobody looks at; results come in order."""
    x, empty = torch.ones(3, 2), torch.ones(0, 2)
    storage = [
        Storage(torch.empty((), dtype=dtype).expand(shape), shape, None, True, 0)
        for shape, dtype in (((2, 4), torch.float8_e4m3fn), ((0,), torch.float32), ((), torch.int64))
    ]
    nowhere = session.somewhere.data_ptr()
    for size in (0, 16, 16):
        tape = Tape()
        playing.results(session, tape, [x, 7, empty, x.T], storage, size)
        found = playing.results(session, tape, [x, 7, empty, x.T], storage, size)
        assert [(t.shape, t.dtype) for t in found] == [(s.shape, s.like.dtype) for s in storage]
        first, second, copied, *results, scratch = tape.addresses
        assert (first, second) == (x.data_ptr(), nowhere)
        assert copied not in (0, first)  # its elements as they lie one behind the other
        assert results == [found[0].data_ptr(), nowhere, found[2].data_ptr()]
        assert (scratch == nowhere) == (size == 0)
    tape.code = 700
    with pytest.raises(RunError, match="error 700"):
        playing.results(session, tape, [x], storage, 0)


@pytest.mark.parametrize("captured", [False, True])
def test_a_state_stays_where_it_is_in_a_graph_of_the_callers(captured):
    """That graph reads and writes the same memory each time; else the new memory becomes the state's."""
    session: Any = SimpleNamespace(is_captured=lambda: captured)
    state = State(session, [TensorSpec("count", "int64", ())], dict)
    old, new = (torch.tensor(1), "old"), (torch.tensor(2), "new")
    state._memory["count"], state._spare["count"] = old, new
    state.begin({0: "count"}, {0: new}, lambda: [None])
    state.finish([None])
    assert state.tensor("count") is (old if captured else new)[0] and state.tensor("count") == 2
    assert state._spare["count"] is (new if captured else old)


def test_a_recording_is_alone(monkeypatch):
    """It waits for those inside, others wait for it, and one that never leaves does not hold it for ever."""
    gate, told = graphs.Gate(), []
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with gate:
            entered.set()
            leave.wait()
            told.append("left")

    def later() -> None:
        with gate:
            told.append("in again")

    first = threading.Thread(target=inside)
    first.start()
    entered.wait()
    monkeypatch.setattr(graphs, "_PATIENCE", 0.01)
    assert not gate.close()
    gate.open()
    monkeypatch.setattr(graphs, "_PATIENCE", 10)
    threading.Timer(0.05, leave.set).start()
    assert gate.close() and told == ["left"]
    with gate:  # it may itself
        second = threading.Thread(target=later)
        second.start()
        second.join(0.05)
        assert told == ["left"]
    gate.open()
    second.join()
    assert told == ["left", "in again"]
