"""Random graphs: that a seed is a graph, that the judge sees what is wrong, and some through the compiler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tools import fuzz
from tools.fuzzing import evaluate, judge, runner
from tools.fuzzing.grammar import graph_of
from tools.fuzzing.graph import Graph, Step, Tensor, source
from tools.fuzzing.runner import Outcome, Workers
from tools.fuzzing.shrink import shrink
from tools.fuzzing.worker import judgement_of, verdict_of

# Seeds of graphs that go through the compiler: ordinary and special arguments.  tools/fuzz.py tries others.
ORDINARY = range(10000, 10008)
SPECIAL = range(10024, 10028)


ARGUMENT = Tensor("a0", ("T", 64), "bfloat16", "normal", 1)
GRAPH = Graph(0, False, ((3, 5), (7, 2)), (ARGUMENT,), (), (Step("v1 = a0 + 1", ("v1",)),), ("v1",))


def test_a_seed_is_a_graph() -> None:
    graphs = [graph_of(seed, special=seed % 4 == 0) for seed in range(12)]
    assert graphs == [graph_of(seed, special=seed % 4 == 0) for seed in range(12)]
    assert [Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) for graph in graphs] == graphs


def test_a_graph_is_a_file_that_runs(tmp_path: Path) -> None:
    graphs = [graph_of(seed) for seed in range(6)]
    text, places = source(graphs, "Six graphs.")
    names: dict = {}
    exec(compile(text, "graphs.py", "exec"), names)
    module, args, shapes = names["build"]()
    assert len(shapes) == len(args)
    results = sum(len(graph.results) for graph in graphs)
    assert len(module(*args)) == len(module(*names["arguments"](1))) == results
    lines = text.splitlines()
    for graph, of_steps in zip(graphs, places, strict=True):
        for step, numbers in zip(graph.steps, of_steps, strict=True):
            assert [lines[number - 1].strip() for number in numbers] == step.code.splitlines()


# -- the judge --------------------------------------------------------------------------------------------


def verdict(module: nn.Module, ours: nn.Module, *args: torch.Tensor) -> str | None:
    return judge.Reference(module, args).problem(0, ours(*args)[0])


class Rounded(nn.Module):
    """A bfloat16 sum, its rounding optional, in one order or the other."""

    def __init__(self, *, rounds: bool = True, backwards: bool = False):
        super().__init__()
        self.rounds, self.backwards = rounds, backwards

    def forward(self, x: torch.Tensor, y: torch.Tensor):
        total = (x + y).float() if self.rounds else x.float() + y.float()
        squares = (total * total).flip(-1) if self.backwards else total * total
        return (total * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6),)


def test_another_order_of_a_sum_is_right_and_a_rounding_left_out_is_not() -> None:
    x, y = torch.randn(2, 16, 256).bfloat16()
    assert verdict(Rounded(), Rounded(backwards=True), x, y) is None
    assert "values" in (verdict(Rounded(), Rounded(rounds=False), x, y) or "")


class Codes(nn.Module):
    def __init__(self, off: float = 0.0, share: float = 0.0):
        super().__init__()
        self.off, self.share = off, share

    def forward(self, x: torch.Tensor):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))
        moved = torch.arange(x.numel()).view(x.shape) < self.share * x.numel()
        q = (x * 30).round().clamp(-127, 127)
        return ((q + torch.where(moved, self.off, 0.0)).to(torch.int8),)


@pytest.mark.parametrize(
    ("off", "share", "word"), [(1, 0.001, None), (1, 0.1, "differ"), (2, 0.001, "steps"), (0, 0, None)]
)
def test_codes_may_be_a_step_off_in_few_places(off: float, share: float, word: str | None) -> None:
    # Of these no code is so near to a tie that eager's own would move.
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    found = verdict(Codes(), Codes(off, share), x)
    assert found is None if word is None else word in (found or "")


class Transposed(nn.Module):
    """A statistic of the right rows, and of the wrong ones."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, x: torch.Tensor):
        return (x * torch.rsqrt(x.pow(2).mean(self.axis, keepdim=True) + 1e-6),)


def test_wrong_rows_nan_and_another_sign_of_infinity_are_seen() -> None:
    x = torch.randn(64, 64)
    assert "values" in (verdict(Transposed(0), Transposed(1), x) or "")
    special = x.clone()
    special[3, 5], special[7, 1] = torch.nan, torch.inf
    reference = judge.Reference(lambda t: [t.clone()], [special])
    assert reference.problem(0, special) is None
    assert "NaN" in (reference.problem(0, special.nan_to_num(0.0, torch.inf)) or "")
    assert "infinite" in (reference.problem(0, torch.where(special == torch.inf, -torch.inf, special)) or "")
    assert "shape" in (reference.problem(0, special[:32]) or "")
    assert "dtype" in (reference.problem(0, special.double()) or "")


def test_a_product_is_known_where_an_element_is_infinite_and_unknown_where_a_sum_may_overflow() -> None:
    y = torch.ones(4, 8)
    for value, right, wrong in ((torch.inf, None, "NaN"), (3e38, None, None)):
        x = torch.full((2, 4), value)
        reference = judge.Reference(lambda t: [t @ y], [x])
        assert reference.problem(0, x @ y) is right
        found = reference.problem(0, torch.full((2, 8), torch.nan))
        assert found is wrong if wrong is None else wrong in (found or "")


def test_equal_elements_come_in_any_order_and_others_do_not() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).relu()  # half of them are zero

    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor):
            _, index = torch.topk(x, 40)
            return index, x.sort(-1, descending=True)[1], x.sort(dim=-1, stable=True)[1], x.gather(-1, index)

    reference = judge.Reference(Chosen(), [x])
    ours = x.sort(dim=-1, descending=True, stable=True)[1]
    assert reference.problem(0, ours[:, :40]) is None
    assert reference.problem(1, ours) is None
    assert reference.problem(2, x.sort(dim=-1, stable=True)[1]) is None
    assert "integers" in (reference.problem(0, ours.flip(1)[:, :40]) or "")
    assert "integers" in (reference.problem(1, ours.roll(1, 1)) or "")
    assert "integers" in (reference.problem(2, ours.flip(1)) or "")
    assert reference.problem(3, x.gather(-1, ours[:, :40])) is None


def test_a_denormal_may_be_zero_and_nothing_else_may() -> None:
    x = torch.tensor([[1e-40, 2.0, -1e-40, 0.5]] * 2)
    reference = judge.Reference(lambda t: [t > 0, t * torch.inf, t.sqrt()], [x])
    flushed = x.where(x.abs() > 1e-38, 0.0)
    half = torch.stack([flushed[0], x[1]])
    for t in (x, flushed, half):
        assert [reference.problem(n, r) for n, r in enumerate((t > 0, t * torch.inf, t.sqrt()))] == [None] * 3
    assert "integers" in (reference.problem(0, flushed >= 0) or "")
    assert "integers" in (reference.problem(0, half > 1) or "")
    assert "NaN" in (reference.problem(1, x * torch.nan) or "")
    assert "infinite" in (reference.problem(1, x * -torch.inf) or "")
    assert torch.equal(x * 2 > 0, x > 0)  # the setting is as it was


def test_an_operation_may_be_computed_in_another_way_inside() -> None:
    x = torch.linspace(-9, 4, 64).repeat(4, 1)
    gelu = judge.Reference(lambda t: [torch.nn.functional.gelu(t, approximate="tanh")], [x])
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    assert gelu.problem(0, exact) is None
    assert "values" in (gelu.problem(0, exact + 1e-4 * x) or "")
    x[0, 0] = 3e38  # its square is infinite
    norm = judge.Reference(lambda t: [torch.nn.functional.layer_norm(t, (64,))], [x])
    centred = x - x.mean(-1, keepdim=True)
    ours = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    assert norm.problem(0, ours) is None
    assert "values" in (norm.problem(0, ours + 1e-4) or "")


def test_gelu_of_infinity_is_infinity_however_it_is_rounded() -> None:
    """Eager's own is NaN in the vectors of some processors, so that only the draws tell what it is."""
    x = torch.tensor([torch.inf, 2.0])
    for seed in range(8):
        (moved,) = evaluate.disturbed(lambda t: [torch.nn.functional.gelu(t)], [x], seed, 2.0**-21)
        assert moved[0] == torch.inf and moved[1].isfinite()


def test_strides_are_those_of_eager_where_it_is_contiguous() -> None:
    x = torch.randn(4, 6)
    assert judge.strides_problem(x, x, strided=False) is None
    assert judge.strides_problem(x.t().contiguous().t(), x, strided=False)
    assert judge.strides_problem(x.t().contiguous(), x.t(), strided=False) is None
    assert judge.strides_problem(x.t().contiguous(), x.t(), strided=True)


# -- shrinking and children -------------------------------------------------------------------------------


def test_shrinking_leaves_the_step_that_fails() -> None:
    graph = next(g for g in map(graph_of, range(99)) if any("softmax" in s.code for s in g.steps[2:]))

    def fails(smaller: Graph) -> bool:
        return any("softmax" in step.code for step in smaller.steps)

    small = shrink(graph, fails, trials=500)
    assert fails(small) and len(small.steps) == 1
    assert len(small.steps[0].code.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import os; os.abort()", Outcome("crash", "SIGABRT ")),
        ("import sys; sys.exit('no more memory')", Outcome("crash", "exit code 1 no more memory")),
        ("import time; time.sleep(60)", Outcome("hang", "no answer in 1 s")),
    ],
)
def test_a_child_that_dies_or_hangs_is_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: Outcome
) -> None:
    script = tmp_path / "child.py"
    script.write_text(f"input()\n{body}\n")
    monkeypatch.setattr(runner, "_WORKER", script)
    workers = Workers(seconds=1)
    assert workers.judge_seeds([0], special=False) == expected
    assert workers.judge_seeds([0], special=False) == expected  # another child
    workers.close()


class Judges(Workers):
    """Workers that know which seeds are wrong; not all say which graphs their outcome is about."""

    def __init__(
        self, wrong: dict[int, str], *, together: str = "", about: bool = False, settled: bool = False
    ):
        super().__init__()
        self.wrong, self.of_several, self.about, self.settled = wrong, together, about, settled
        self.asked: list[list[int]] = []

    def judge_seeds(self, seeds: Sequence[int], special: bool) -> Outcome:
        self.asked.append(list(seeds))
        wrong = [number for number, seed in enumerate(seeds) if seed in self.wrong]
        about = tuple(wrong) if self.about else ()
        if wrong:
            return Outcome(self.wrong[seeds[wrong[0]]], "of a kind", about, self.settled)
        if self.of_several and len(seeds) > 1:
            return Outcome(self.of_several, "of several")
        return Outcome("right", "")

    def graph(self, seed: int, special: bool) -> Graph:
        return replace(GRAPH, seed=seed)

    def judge(self, graphs: Sequence[Graph]) -> Outcome:
        return self.judge_seeds([graph.seed for graph in graphs], special=False)


def campaign(tmp_path: Path, workers: Workers, first: int = 0) -> fuzz.Campaign:
    return fuzz.Campaign(workers, tmp_path, fuzz.Tally(first, "cpu", first), trials=0)


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        ({}, [range(8), range(4), range(2), range(2, 4), [2], [3], range(4, 8)]),
        ({"about": True}, [range(8), [3], [0, 1, 2, 4, 5, 6, 7]]),
        ({"about": True, "settled": True}, [range(8), [3]]),
    ],
)
def test_what_is_not_right_is_sought_no_longer_than_needed(
    tmp_path: Path, known: dict[str, Any], asked: list[Sequence[int]]
) -> None:
    workers = Judges({3: "wrong"}, **known)
    found = campaign(tmp_path, workers)
    fuzz.run([found], minutes=1, together=8, graphs=8)
    assert workers.asked == [list(seeds) for seeds in asked]
    assert found.tally.verdicts == {"right": 7, "wrong": 1}
    assert found.tally.seeds == {"wrong of a kind": [3]}
    assert (tmp_path / "wrong_3.py").exists()


def test_graphs_that_are_right_alone_and_not_together_are_a_finding(tmp_path: Path) -> None:
    found = campaign(tmp_path, Judges({}, together="wrong"))
    fuzz.run([found], minutes=1, together=4, graphs=4)
    assert found.tally.verdicts == {"right": 4}
    assert found.tally.kinds == {"together wrong of several": 2}


def test_jobs_share_seeds_and_a_tally(tmp_path: Path) -> None:
    workers = [Judges({17: "late"}, about=True) for _ in range(3)]
    jobs = [campaign(tmp_path, each, 16) for each in workers]
    for job in jobs:
        job.tally = jobs[0].tally
    fuzz.run(jobs, minutes=1, together=8, graphs=64)
    modules = sorted(asked[0] for each in workers for asked in each.asked if len(asked) == 8)
    assert modules == list(range(16, 80, 8))
    tally = json.loads((tmp_path / "tally.json").read_text())
    assert (tally["graphs"], tally["next"], tally["underway"]) == (64, 80, [])
    assert tally["verdicts"] == {"right": 63, "late": 1}


# -- through the compiler -----------------------------------------------------------------------------------


def test_a_site_that_a_report_lacks_is_a_finding() -> None:
    step = Step("v1 = a0 + 1", ("v1",), ("rms_norm",))
    graph = replace(GRAPH, steps=(step,))
    assert verdict_of([graph]) == ("sites", "no rms_norm in the report of: v1 = a0 + 1")
    found = judgement_of([GRAPH, graph, GRAPH])
    assert (found.about, found.settled) == ([1], True)


def test_graphs_that_torch_does_not_export_or_we_refuse_are_named() -> None:
    rejected = replace(GRAPH, steps=(Step("v1 = a0 + 1 if a0.shape[0] == 3 else a0", ("v1",)),))
    found = judgement_of([GRAPH, rejected, GRAPH, rejected])
    assert (found.verdict[0], found.about, found.settled) == ("refused", [1, 3], False)
    refused = replace(GRAPH, steps=(Step("v1 = a0.to(torch.complex64).real", ("v1",)),))
    found = judgement_of([GRAPH, GRAPH, refused])
    assert (found.verdict[0], found.about, found.settled) == ("refused", [2], False)


@pytest.mark.parametrize(
    ("seeds", "special"), [(ORDINARY, False), (SPECIAL, True)], ids=["ordinary", "special"]
)
def test_random_graphs_are_right(seeds: range, special: bool) -> None:
    graphs = [graph_of(seed, special=special) for seed in seeds]
    assert verdict_of(graphs) == ("right", "")
