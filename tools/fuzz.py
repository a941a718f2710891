"""Random graphs through the compiler: each against eager PyTorch and float64, in a child process.

    python -m tools.fuzz --minutes 10 --seed 1000 --out findings
    python -m tools.fuzz --minutes 10 --jobs 16               # so many modules at a time
    python -m tools.fuzz --minutes 5 --target h200            # run on such a GPU, elsewhere compiled only
    python -m tools.fuzz --seeds 17,33 --out findings         # these again, one by one

A graph follows from its seed alone.  Eight graphs share a module, since compiling is what takes time; where
the module is not right, the graphs that it is about are looked at alone.  Whatever is not right is shrunk and
written to the directory as a file with ``build()``, which holds the seed and what is wrong.  A run that is
stopped has lost the modules that were underway, no more.  docs/fuzzing.md says what is in a graph and how it
is judged.

Exit codes: 0 every graph is right or refused, 1 a finding, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.fuzzing.graph import Graph, source
from tools.fuzzing.runner import Outcome, Workers
from tools.fuzzing.shrink import shrink

_SPECIAL_EVERY = 4  # one module in so many has NaN, infinities and denormals in its arguments
_SHRUNK_OF_A_KIND = 8
_LOCK = threading.Lock()  # of the tally, which all jobs write to


@dataclass
class Tally:
    """Counts of a run, kept in the directory's tally.json after every module.

    next: the first seed that no module has had; underway: the first seeds of the modules that are not done.
    """

    first: int
    target: str
    next: int = 0
    modules: int = 0
    graphs: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seeds: dict[str, list[int]] = field(default_factory=dict)
    underway: list[int] = field(default_factory=list)

    def count(self, seed: int, outcome: Outcome) -> None:
        """Add one graph."""
        with _LOCK:
            self.graphs += 1
            self.verdicts[outcome.verdict] += 1
            if outcome.verdict != "right":
                self.kinds[outcome.kind] += 1
                self.seeds.setdefault(outcome.kind, []).append(seed)

    def begin(self, together: int, graphs: int | None) -> tuple[range, bool] | None:
        """The seeds of the next module, and whether its arguments are special; None after so many graphs."""
        with _LOCK:
            if graphs is not None and self.next >= self.first + graphs:
                return None
            seeds = range(self.next, self.next + together)
            self.next, self.modules = seeds.stop, self.modules + 1
            self.underway.append(seeds.start)
            return seeds, self.modules % _SPECIAL_EVERY == 0

    def end(self, seeds: range, path: Path) -> None:
        """A module is done: write everything as JSON."""
        with _LOCK:
            self.underway.remove(seeds.start)
            new = path.with_suffix(".new")
            new.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
            new.replace(path)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.most_common())
        return f"seeds {self.first} to {self.next - 1} for {self.target}: {self.graphs} graphs, {counts}"


class Campaign:
    """A job: a worker, and what is done with its answers."""

    def __init__(self, workers: Workers, out: Path, tally: Tally, trials: int) -> None:
        self.workers, self.out, self.tally, self.trials = workers, out, tally, trials
        out.mkdir(parents=True, exist_ok=True)

    def judge(self, seeds: Sequence[int], special: bool) -> bool:
        """Tell whether ``seeds`` are right together; if not, those that it is about are judged alone."""
        if len(seeds) == 1:
            return self.alone(seeds[0], special).verdict == "right"
        outcome = self.workers.judge_seeds(seeds, special)
        if outcome.verdict == "right":
            for seed in seeds:
                self.tally.count(seed, outcome)
            return True
        about = [seeds[number] for number in outcome.about]
        if outcome.settled:
            parts = [[seed] for seed in about]
            for seed in set(seeds) - set(about):
                self.tally.count(seed, Outcome("right", ""))
        elif about and len(about) < len(seeds):
            parts = [*([seed] for seed in about), [seed for seed in seeds if seed not in about]]
        else:
            parts = [seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]]
        alone = [self.judge(part, special) for part in parts]
        if all(alone):
            self.together(seeds, special, outcome)
        return False

    def alone(self, seed: int, special: bool) -> Outcome:
        """Judge one graph; a reproducer of what is not right."""
        outcome = self.workers.judge_seeds([seed], special)
        self.tally.count(seed, outcome)
        if outcome.verdict != "right" and self.tally.kinds[outcome.kind] <= _SHRUNK_OF_A_KIND:
            self.write(self.workers.graph(seed, special), outcome)
        return outcome

    def together(self, seeds: Sequence[int], special: bool, outcome: Outcome) -> None:
        """Graphs that are right alone and not in one module; without those that it takes not."""
        graphs = [self.workers.graph(seed, special) for seed in seeds]
        for graph in list(graphs):
            fewer = [other for other in graphs if other is not graph]
            if len(fewer) > 1 and self.workers.judge(fewer).kind == outcome.kind:
                graphs = fewer
        with _LOCK:
            self.tally.kinds[f"together {outcome.kind}"] += 1
        self.write_all(graphs, outcome, f"together_{seeds[0]}")
        print(f"together  {[graph.seed for graph in graphs]}: {outcome.why}", flush=True)

    def write(self, graph: Graph, outcome: Outcome) -> None:
        """Leave a reproducer with as little in it as has an outcome of the same kind, and a line."""
        small = shrink(graph, lambda less: self.workers.judge([less]).kind == outcome.kind, self.trials)
        found = outcome if small == graph else self.workers.judge([small])
        self.write_all([small], found, f"{outcome.verdict}_{graph.seed}")
        print(f"{outcome.verdict:9} {graph.seed}: {' '.join(found.why.split())[:200]}", flush=True)

    def write_all(self, graphs: Sequence[Graph], outcome: Outcome, name: str) -> None:
        """Leave a reproducer."""
        seeds = ", ".join(f"{graph.seed}{' special' if graph.special else ''}" for graph in graphs)
        why = outcome.why.replace("\\", "/").replace('"""', "'''")
        text, _ = source(graphs, f"{outcome.verdict.upper()} (seed {seeds}): {why}\n")
        (self.out / f"{name}.py").write_text(text, encoding="utf-8")


def run(campaigns: Sequence[Campaign], minutes: float, together: int, graphs: int | None) -> None:
    """Seeds from the first on, as long as there is time; a campaign that is free takes the next module."""
    end = time.monotonic() + 60 * minutes

    def work(campaign: Campaign) -> None:
        tally = campaign.tally
        while time.monotonic() < end and (begun := tally.begin(together, graphs)) is not None:
            seeds, special = begun
            campaign.judge(seeds, special)
            tally.end(seeds, campaign.out / "tally.json")

    threads = [threading.Thread(target=work, args=[campaign], daemon=True) for campaign in campaigns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def again(campaign: Campaign, seeds: str) -> None:
    """These seeds, one by one."""
    for seed in seeds.split(","):
        number, _, special = seed.partition(":")
        outcome = campaign.alone(int(number), bool(special))
        print(f"{outcome.verdict:9} {seed}", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="how long new modules are begun (%(default)s)"
    )
    parser.add_argument("--graphs", type=int, metavar="N", help="and how many graphs at most")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="modules at a time (%(default)s)")
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
    tally = Tally(options.seed, options.target, options.seed)
    campaigns = [
        Campaign(Workers(options.target, options.timeout), options.out, tally, options.trials)
        for _ in range(1 if options.seeds else options.jobs)
    ]
    try:
        if options.seeds:
            again(campaigns[0], options.seeds)
        else:
            run(campaigns, options.minutes, options.together, options.graphs)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        for campaign in campaigns:
            campaign.workers.close()
    print(tally)
    for kind, count in tally.kinds.most_common():
        print(f"{count:6} {kind}")
    return 0 if set(tally.verdicts) <= {"right", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
