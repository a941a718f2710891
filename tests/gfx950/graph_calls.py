"""What ``test_hip_graphs`` runs in a process whose GPU is emulated; a check's arguments name programs."""

from __future__ import annotations

import gc
import sys
import threading
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lowering
from lowering.errors import RunError
from lowering.runtime import graphs

HIDDEN = 256


class Chain(nn.Module):
    """Three sites, each of which hands its values on; all are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN).bfloat16())

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        written: list[Tensor] = []
        for _ in range(3):
            x, residual = torch.ops.lowering.add_rms_norm(x, residual, self.weight, 1e-6)
            written += torch.ops.lowering.group_quant(x, 128)
        return (*written, x, residual)


class Remembering(nn.Module):
    """A cache that is updated in place, a counter that is computed anew, an argument that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN).bfloat16())
        self.register_buffer("cache", torch.zeros(8, HIDDEN, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, at: Tensor, page: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        self.cache.index_copy_(0, at, y)
        page.index_copy_(0, at, x)
        self.count.add_(1)
        return self.cache.float().sum(0) + self.count, torch.zeros(8, 4).index_put((at[:1],), torch.ones(4))


def pair(path: Path) -> tuple[lowering.Program, lowering.Program]:
    """A program whose calls become graphs, and the same whose calls do not."""
    return lowering.load(path, device="hip"), lowering.load(path, device="hip", graphs="off")


def rows(count: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.randn(count, HIDDEN).to(dtype), torch.randn(count, HIDDEN).to(dtype)


def step() -> tuple[Tensor, Tensor]:
    return torch.randn(2, HIDDEN).bfloat16(), torch.randperm(8)[:2]


def same(found: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> bool:
    both = [[x] if isinstance(x, Tensor) else list(x) for x in (found, wanted)]
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(*both, strict=True)
    )


def results_are_the_same_bits(chain: Path) -> None:
    """From the third call on it is a graph; every call has other memory, and what it returned stays."""
    program, plain = pair(chain)
    told, kept = [], []
    for _ in range(6):
        arguments = rows(3)
        told.append(program.explain_call(*arguments))
        found, wanted = program(*arguments), plain(*arguments)
        assert same(found, wanted)
        kept.append((found, [x.clone() for x in wanted]))
        del arguments  # and what it was given may go
    assert all("the second call" in text for text in told[:2]), told
    assert told[2:] == ["a graph of 3 operations"] * 4, told
    assert plain.explain_call(*rows(3)) == "no graph: graphs are off"
    assert all(same(found, wanted) for found, wanted in kept)


def arguments_of_every_kind(chain: Path) -> None:
    """Two that share memory while it is recorded, one that is not contiguous, sizes that open, no rows."""
    program, plain = pair(chain)
    x, _ = rows(2)
    for _ in range(3):
        assert same(program(x, x), plain(x, x))
    for arguments in (rows(2), (x, x[:1].expand(2, HIDDEN)), (x.T.contiguous().T, x)):
        assert program.explain_call(*arguments).startswith("a graph")
        assert same(program(*arguments), plain(*arguments))
    for count in (0, 1, 0, 1, 0, 1):
        arguments = rows(count)
        assert same(program(*arguments), plain(*arguments))
    assert program.explain_call(*rows(0)) == "no graph: all results are empty"
    for _ in range(2):
        try:
            program(rows(2)[0], rows(3)[0])
        except RunError:
            continue
        raise AssertionError("sizes that do not fit were taken")


def graphs_go_with_their_plans(chain: Path) -> None:
    """Of three shapes two have a graph; that of the one used least recently has gone, and comes again."""
    graphs._KEPT, before = 2, graphs._KEPT
    try:
        program, plain = pair(chain)
        function = program["main"]
        tapes = {}
        for count in (1, 2, 1, 3):
            for _ in range(3):
                arguments = rows(count)
                assert same(program(*arguments), plain(*arguments))
            tapes[count] = weakref.ref(function._graphs.tape(function._plan(arguments)))
        gc.collect()
        assert [tapes[count]() is not None for count in (1, 2, 3)] == [True, False, True]
        assert "the second call" in program.explain_call(*rows(2))
        arguments = rows(2)
        assert same(program(*arguments), plain(*arguments))
    finally:
        graphs._KEPT = before


def a_program_that_is_closed_is_refused(chain: Path) -> None:
    program, plain = pair(chain)
    for _ in range(3):
        arguments = rows(1)
        assert same(program(*arguments), plain(*arguments))
    program.close()
    try:
        program(*arguments)
    except RunError as error:
        assert "is closed" in str(error)
    else:
        raise AssertionError("a closed program ran")


def the_state_is_updated_once(remembering: Path) -> None:
    """In place, as a whole, and in an argument; of two sessions each has its own; reset begins anew."""
    program, plain = pair(remembering)
    pages = [torch.zeros(8, HIDDEN).bfloat16() for _ in range(2)]

    def both(one: lowering.Program, other: lowering.Program, new: tuple[Tensor, Tensor]) -> None:
        assert same(one(*new, pages[0]), other(*new, pages[1])) and same(*pages)

    for _ in range(5):
        both(program, plain, step())
    assert program.explain_call(*step(), pages[0]).startswith("a graph of")
    sessions = program.session(), plain.session()
    for _ in range(3):
        both(*sessions, step())
        both(program, plain, step())
    for count, (one, other) in ((8, (program, plain)), (3, sessions)):
        found, wanted = one.state_dict(), other.state_dict()
        assert found["count"] == count and all(same(found[name], wanted[name]) for name in wanted)
    program.reset(), plain.reset()
    both(program, plain, step())
    assert program.state_dict()["count"] == 1


def threads_and_programs(chain: Path, remembering: Path) -> None:
    """Four threads: one program, a second of the same file, and sessions of a third, all at once."""
    (program, plain), (other, _), (third, its_plain) = pair(chain), pair(chain), pair(remembering)
    failures: list[str] = []

    def call(one: lowering.Program, arguments: list[tuple[Tensor, ...]], wanted: list) -> None:
        try:
            for given, expected in zip(arguments, wanted, strict=True):
                if not same(one(*given), expected):
                    failures.append("another result")
        except Exception:
            failures.append(traceback.format_exc())

    jobs = []
    for one in (program, program, other):
        arguments = [rows(2) for _ in range(5)]
        jobs.append((one, arguments, [plain(*given) for given in arguments]))
    page = torch.zeros(8, HIDDEN).bfloat16()
    arguments = [(*step(), page.clone()) for _ in range(5)]
    wanted = [its_plain(*given[:2], given[2].clone()) for given in arguments]
    jobs.append((third.session(), arguments, wanted))
    threads = [threading.Thread(target=call, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert program.explain_call(*rows(2)).startswith("a graph")


CHECKS = (
    results_are_the_same_bits,
    arguments_of_every_kind,
    graphs_go_with_their_plans,
    a_program_that_is_closed_is_refused,
    the_state_is_updated_once,
    threads_and_programs,
)


def main(directory: Path, names: Sequence[str]) -> None:
    """Do the checks and say which held."""
    for name in names:
        check = globals()[name]
        words = list(check.__annotations__)
        try:
            check(*[directory / f"{word}.vmfb" for word in words if word != "return"])
        except Exception:
            traceback.print_exc()
        else:
            print(name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
