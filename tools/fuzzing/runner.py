"""The parent of the workers: asks, waits so long and no longer, replaces one that died."""

from __future__ import annotations

import json
import re
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[str] | None = None  # by the process, on its error stream

    def judge(self, graphs: Sequence[Graph]) -> Outcome:
        """The outcome of the module of all ``graphs``."""
        return self._outcome({"graphs": [graph.to_dict() for graph in graphs], "target": self.target})

    def judge_seeds(self, seeds: Sequence[int], special: bool) -> Outcome:
        """The outcome of the module of the graphs of ``seeds``."""
        return self._outcome({"seeds": list(seeds), "special": special, "target": self.target})

    def graph(self, seed: int, special: bool) -> Graph:
        """The graph of ``seed``."""
        found = self._ask({"seeds": [seed], "special": special, "generate": True}, _GENERATING)
        if isinstance(found, Outcome):
            raise RuntimeError(f"the graph of seed {seed} cannot be made: {found.why}")
        return Graph.from_dict(found["graphs"][0])

    def close(self) -> None:
        """Stop the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _outcome(self, job: dict[str, Any]) -> Outcome:
        found = self._ask(job, self.seconds)
        if isinstance(found, Outcome):
            return found
        if found["memory"] > _MEMORY:
            self.close()
        verdict, why = found["verdict"]
        return Outcome(verdict, why, tuple(found["about"]), found["settled"])

    def _ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | Outcome:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    self.close()
                    return Outcome("hang", f"no answer in {seconds:.0f} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = process.wait()
        self._process = None
        said = self._last_words()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome("crash", f"{name} {said[:300]}")

    def _last_words(self) -> str:
        assert self._said is not None
        self._said.seek(0)
        return " ".join(self._said.read().strip().splitlines()[-1:])

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        return self._process
