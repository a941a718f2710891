"""Random graphs through the compiler: each against eager PyTorch and float64, in a child process.

    python tools/fuzz.py --minutes 10 --seed 1000 --out findings
    python tools/fuzz.py --minutes 5 --target h200            # run on such a GPU, elsewhere compiled only
    python tools/fuzz.py --seeds 17,33 --out findings         # these again, one by one

A graph follows from its seed alone.  Eight graphs share a module, since compiling is what takes time; where
the module is not right each is looked at alone.  Whatever is not right is shrunk and written to the directory
as a file with ``build()``, which holds the seed and what is wrong.  docs/fuzzing.md says what is in a graph
and how it is judged.

Exit codes: 0 every graph is right or refused, 1 a finding, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing.graph import Graph, source
from fuzzing.runner import Outcome, Workers
from fuzzing.shrink import shrink

_SPECIAL_EVERY = 4  # one module in so many has NaN, infinities and denormals in its arguments
_SHRUNK_OF_A_KIND = 8


@dataclass
class Tally:
    """Counts of a run, kept in the directory's tally.json after every module."""

    first: int
    target: str
    next: int = 0
    modules: int = 0
    graphs: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seeds: dict[str, list[int]] = field(default_factory=dict)

    def count(self, seed: int, outcome: Outcome) -> None:
        """Add one graph."""
        self.graphs += 1
        self.verdicts[outcome.verdict] += 1
        if outcome.verdict != "right":
            self.kinds[outcome.kind] += 1
            self.seeds.setdefault(outcome.kind, []).append(seed)

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        path.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.most_common())
        return f"seeds {self.first} to {self.next - 1} for {self.target}: {self.graphs} graphs, {counts}"


class Campaign:
    """One run over seeds."""

    def __init__(self, workers: Workers, out: Path, tally: Tally, trials: int) -> None:
        self.workers, self.out, self.tally, self.trials = workers, out, tally, trials
        out.mkdir(parents=True, exist_ok=True)

    def module(self, seeds: Sequence[int], special: bool) -> None:
        """Judge the graphs of ``seeds``, together and, if that is not right, each alone."""
        self.tally.modules += 1
        together = self.workers.judge_seeds(seeds, special) if len(seeds) > 1 else None
        if together is not None and together.verdict == "right":
            for seed in seeds:
                self.tally.count(seed, together)
        else:
            outcomes = [self.alone(seed, special) for seed in seeds]
            if together is not None and all(outcome.verdict == "right" for outcome in outcomes):
                self.together(seeds, special, together)
        self.tally.next = seeds[-1] + 1
        self.tally.write(self.out / "tally.json")

    def alone(self, seed: int, special: bool) -> Outcome:
        """Judge one graph; a reproducer of what is not right."""
        outcome = self.workers.judge_seeds([seed], special)
        self.tally.count(seed, outcome)
        if outcome.verdict != "right" and self.tally.kinds[outcome.kind] <= _SHRUNK_OF_A_KIND:
            graph = self.workers.graph(seed, special)
            self.write(self.shrunk(graph, outcome), outcome, f"{outcome.verdict}_{seed}")
        return outcome

    def shrunk(self, graph: Graph, outcome: Outcome) -> Graph:
        """``graph`` with less in it that has an outcome of the same kind."""
        return shrink(graph, lambda smaller: self.workers.judge([smaller]).kind == outcome.kind, self.trials)

    def together(self, seeds: Sequence[int], special: bool, outcome: Outcome) -> None:
        """Graphs that are right alone and not in one module; without those that it takes not."""
        graphs = [self.workers.graph(seed, special) for seed in seeds]
        for graph in list(graphs):
            fewer = [other for other in graphs if other is not graph]
            if len(fewer) > 1 and self.workers.judge(fewer).kind == outcome.kind:
                graphs = fewer
        self.tally.kinds[f"together {outcome.kind}"] += 1
        self.write_all(graphs, outcome, f"together_{seeds[0]}")
        print(f"together  {[graph.seed for graph in graphs]}: {outcome.why}", flush=True)

    def write(self, graph: Graph, outcome: Outcome, name: str) -> None:
        """Leave a reproducer, and a line."""
        found = self.workers.judge([graph])
        self.write_all([graph], found, name)
        print(f"{outcome.verdict:9} {graph.seed}: {' '.join(found.why.split())[:200]}", flush=True)

    def write_all(self, graphs: Sequence[Graph], outcome: Outcome, name: str) -> None:
        """Leave a reproducer."""
        seeds = ", ".join(f"{graph.seed}{' special' if graph.special else ''}" for graph in graphs)
        why = outcome.why.replace("\\", "/").replace('"""', "'''")
        text, _ = source(graphs, f"{outcome.verdict.upper()} (seed {seeds}): {why}\n")
        (self.out / f"{name}.py").write_text(text, encoding="utf-8")


def run(campaign: Campaign, minutes: float, together: int, graphs: int | None) -> None:
    """Seeds from the first on, as long as there is time."""
    end, number, seed = time.monotonic() + 60 * minutes, 0, campaign.tally.first
    while time.monotonic() < end and (graphs is None or campaign.tally.graphs < graphs):
        campaign.module(range(seed, seed + together), number % _SPECIAL_EVERY == _SPECIAL_EVERY - 1)
        seed, number = seed + together, number + 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="how long new modules are begun (%(default)s)"
    )
    parser.add_argument("--graphs", type=int, metavar="N", help="and how many graphs at most")
    parser.add_argument("--seed", type=int, default=0, help="the first (%(default)s)")
    parser.add_argument(
        "--seeds", metavar="N,N,...", help="these alone, one by one; :special for special values"
    )
    parser.add_argument(
        "--target", default="cpu", help="run where there is one, else compiled only (%(default)s)"
    )
    parser.add_argument(
        "--together", type=int, default=8, metavar="N", help="graphs of a module (%(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="of a module (%(default)s)")
    parser.add_argument(
        "--trials", type=int, default=60, metavar="N", help="to shrink a finding (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("findings"), metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 where something is wrong."""
    options = _arguments(argv)
    workers = Workers(options.target, options.timeout)
    campaign = Campaign(
        workers, options.out, Tally(options.seed, options.target, options.seed), options.trials
    )
    try:
        if options.seeds:
            for seed in options.seeds.split(","):
                number, _, special = seed.partition(":")
                outcome = campaign.alone(int(number), bool(special))
                print(f"{outcome.verdict:9} {seed}", flush=True)
        else:
            run(campaign, options.minutes, options.together, options.graphs)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        workers.close()
    print(campaign.tally)
    for kind, count in campaign.tally.kinds.most_common():
        print(f"{count:6} {kind}")
    return 0 if set(campaign.tally.verdicts) <= {"right", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
