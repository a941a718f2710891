"""The parent of the workers: asks, waits so long and no longer, replaces one that died."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.child import Child, Silence

from .graph import Graph

_WORKER = Path(__file__).with_name("worker.py")
_MEMORY = 4_000_000  # kilobytes; a worker that holds more makes room for another
_GENERATING = 120.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """Hold what became of a module: a verdict and a sentence.

    right; refused by a CompileError or UsageError; wrong, strides, sites: judged so; changed: an argument or
    a weight was written; late: compiled, and a call fails; crash: the process died; hang: no answer in time;
    raw: an exception that is not the project's; invalid: eager PyTorch does not run it.
    about: the numbers of the graphs that are not right, where that is known; settled: the others are right.
    """

    verdict: str
    why: str
    about: tuple[int, ...] = ()
    settled: bool = False

    @property
    def kind(self) -> str:
        """What outcomes of one cause have in common, as far as words tell: a sentence without numbers."""
        why = re.sub(r"^call \d+, result \d+: ", "", self.why)
        if self.verdict in ("wrong", "strides"):
            return f"{self.verdict} {why.split(':')[0]}"
        if self.verdict == "sites":
            return f"sites {' '.join(why.split()[:2])}"
        first, *more = why.strip().splitlines() or [""]
        said = more[0] if more and first.endswith(":") else first
        return f"{self.verdict} {re.sub(r'[^ ]*[.]py:[0-9]+:|0x[0-9a-f]+|[0-9]+', '', said).strip()[:90]}"


class Workers:
    """One worker at a time, for ``target``; ``seconds`` is what one module may take."""

    def __init__(self, target: str = "cpu", seconds: float = 120.0) -> None:
        self.target, self.seconds = target, seconds
        self._child = Child(_WORKER)

    def judge(self, graphs: Sequence[Graph]) -> Outcome:
        """The outcome of the module of all ``graphs``."""
        return self._outcome({"graphs": [graph.to_dict() for graph in graphs], "target": self.target})

    def judge_seeds(self, seeds: Sequence[int], special: bool) -> Outcome:
        """The outcome of the module of the graphs of ``seeds``."""
        return self._outcome({"seeds": list(seeds), "special": special, "target": self.target})

    def graph(self, seed: int, special: bool) -> Graph:
        """The graph of ``seed``."""
        found = self._child.ask({"seeds": [seed], "special": special, "generate": True}, _GENERATING)
        if isinstance(found, Silence):
            raise RuntimeError(f"the graph of seed {seed} cannot be made: {found.why}")
        return Graph.from_dict(found["graphs"][0])

    def close(self) -> None:
        """Stop the worker."""
        self._child.close()

    def _outcome(self, job: dict[str, Any]) -> Outcome:
        found = self._child.ask(job, self.seconds)
        if isinstance(found, Silence):
            return Outcome(found.verdict, found.why)
        if found["memory"] > _MEMORY:
            self.close()
        verdict, why = found["verdict"]
        return Outcome(verdict, why, tuple(found["about"]), found["settled"])
