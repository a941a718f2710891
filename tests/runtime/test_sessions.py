"""The state of a program: sessions that have their own, files, threads, and what is refused."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowering
from lowering import RunError


class Counter(nn.Module):
    """Sums what it is given, counts, and keeps the last in a ring; the weight is large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1024, 1024), 0.5))
        self.register_buffer("ring", torch.zeros(8, 1024))
        self.register_buffer("total", torch.full((1024,), 3.0))
        self.register_buffer("codes", torch.zeros(4, dtype=torch.float8_e4m3fn))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.ring.index_copy_(0, self.count % 8, x[None])
        self.total.add_(x)
        self.codes.copy_(self.total[:4].to(torch.float8_e4m3fn))
        self.count.add_(1)
        return (self.ring @ self.weight).sum(0), self.total.clone()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counter") / "counter.vmfb"
    lowering.compile(Counter(), (torch.zeros(1024),)).save(path)
    return path


@pytest.fixture
def program(path: Path) -> lowering.Program:
    return lowering.load(path)


def ones(value: float = 1.0) -> Tensor:
    return torch.full((1024,), float(value))


def test_the_state_is_listed(program: lowering.Program) -> None:
    found = {each.name: (each.dtype, each.shape, each.bytes) for each in program.state()}
    assert found == {
        "ring": (torch.float32, (8, 1024), 8 * 4096),
        "total": (torch.float32, (1024,), 4096),
        "codes": (torch.float8_e4m3fn, (4,), 4),
        "count": (torch.int64, (1,), 8),
    }


def test_it_lives_from_call_to_call_until_it_is_reset(program: lowering.Program) -> None:
    assert [float(program(ones())[1][0]) for _ in range(3)] == [4, 5, 6]
    assert program.state_dict()["count"].item() == 3
    program.reset()
    assert torch.equal(program.state_dict()["total"], ones(3))
    assert float(program(ones())[1][0]) == 4


def test_a_copy_of_the_state_is_a_copy(program: lowering.Program) -> None:
    program.state_dict()["total"].zero_()
    assert float(program(ones())[1][0]) == 4


def test_sessions_have_a_state_of_their_own(program: lowering.Program) -> None:
    program(ones())
    sessions = [program.session() for _ in range(3)]
    for step in range(1, 4):
        for number, session in enumerate(sessions):
            assert float(session(ones(number))[1][0]) == 3 + step * number
    assert float(program(ones())[1][0]) == 5
    assert sessions[1].state() == program.state()


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def test_sessions_share_the_weights(program: lowering.Program) -> None:
    """Of a weight of 4 MB, twenty sessions have one."""
    program(ones())
    before = resident()
    sessions = [program.session() for _ in range(20)]
    for session in sessions:
        session(ones())
    assert resident() - before < 8 << 20


def test_many_calls_take_no_more_memory(program: lowering.Program) -> None:
    x = ones(0.0)
    for _ in range(200):
        program(x)
    before = resident()
    for _ in range(5000):
        program(x)
    assert resident() - before < 4 << 20
    assert program.state_dict()["count"].item() == 5200


def test_a_state_is_saved_and_loaded(program: lowering.Program, tmp_path: Path) -> None:
    for value in range(10):
        program(ones(value))
    program.save(tmp_path / "s.safetensors")
    kept = program.state_dict()
    other = program.session()
    other.load(tmp_path / "s.safetensors")
    for name, value in other.state_dict().items():
        assert torch.equal(value.view(torch.uint8), kept[name].view(torch.uint8)), name
    for one, two in zip(program(ones()), other(ones()), strict=True):
        assert torch.equal(one, two)


def test_a_file_that_is_not_the_state_is_refused(program: lowering.Program, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    program(ones())
    program.save(good)
    kept, tensors = program.state_dict(), load_file(good)
    refused = {
        "no such file": lambda: bad.unlink(missing_ok=True),
        "is no safetensors file, or it is damaged": lambda: bad.write_bytes(b"nothing of the kind"),
        "is not the state of a program": lambda: save_file(tensors, bad),
        r"of ring it has float32\[8, 512\], this one float32\[8, 1024\]": lambda: save_file(
            {**tensors, "ring": torch.zeros(8, 512)}, bad, {"vmfuse.state": "1"}
        ),
        r"of count it has nothing, this one int64\[1\]": lambda: save_file(
            {name: value for name, value in tensors.items() if name != "count"}, bad, {"vmfuse.state": "1"}
        ),
        r"of more it has float32\[2\], this one nothing": lambda: save_file(
            {**tensors, "more": torch.zeros(2)}, bad, {"vmfuse.state": "1"}
        ),
        "damaged": lambda: bad.write_bytes(good.read_bytes()[:-4]),
    }
    for said, make in refused.items():
        make()
        with pytest.raises(RunError, match=f"(?i){said}"):
            program.load(bad)
        for name, value in program.state_dict().items():
            assert torch.equal(value.view(torch.uint8), kept[name].view(torch.uint8))
    with pytest.raises(lowering.UsageError, match="cannot write"):
        program.save(tmp_path / "nowhere" / "s.safetensors")
    program.load(good)


def test_a_program_without_state(double: Path, tmp_path: Path) -> None:
    program = lowering.load(double)
    assert program.state() == ()
    program.reset()
    with pytest.raises(RunError, match="the program has no state"):
        program.save(tmp_path / "s.safetensors")


def test_one_thread_at_a_time_has_a_session(program: lowering.Program) -> None:
    with program._state.held():
        said: list[str] = []

        def call() -> None:
            try:
                program(ones())
            except RunError as error:
                said.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert said == [
        "another thread is using this session: its state is for one at a time; give each thread a session of "
        "its own, program.session()"
    ]
    assert float(program(ones())[1][0]) == 4


def test_threads_with_sessions_of_their_own(program: lowering.Program) -> None:
    results: dict[int, list[float]] = {}

    def generate(number: int) -> None:
        session = program.session()
        results[number] = [float(session(ones(number))[1][0]) for _ in range(50)]

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [3 + number * step for step in range(1, 51)] for number in range(4)}


def test_a_closed_program_says_so(program: lowering.Program) -> None:
    session = program.session()
    program(ones())
    program.close()
    program.close()
    for each in (program, session):
        with pytest.raises(RunError, match="the program is closed"):
            each(ones())


def test_an_interrupted_call_leaves_the_program_usable(program: lowering.Program) -> None:
    """Ctrl-C at any moment of any call: all of the state is that before the call, or that after it."""
    import _thread

    moment, total = random.Random(0), 0
    for _ in range(200):
        timer = threading.Timer(moment.uniform(0.001, 0.004), _thread.interrupt_main)
        calls = 0
        try:
            timer.start()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                program(ones())
                calls += 1
            pytest.fail("the interrupt never came")
        except KeyboardInterrupt:
            timer.join()
        state = program.state_dict()
        count = int(state["count"])
        assert count in (total + calls, total + calls + 1)
        assert torch.equal(state["total"], ones(3 + count))
        assert torch.equal(state["codes"], ones(3 + count)[:4].to(torch.float8_e4m3fn))
        total = count
    assert float(program(ones())[1][0]) == 3 + total + 1
