"""A child process that answers jobs, a line of JSON each; it may die or hang at any of them."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Silence:
    """Say why there is no answer: ``crash`` or ``hang``, and a sentence."""

    verdict: str
    why: str


class Child:
    """A process of the script ``worker``, started with the first job and again after it died."""

    def __init__(self, worker: Path) -> None:
        self.worker = worker
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[str] | None = None  # by the process, on its error stream

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | Silence:
        """Give the answer to ``job``, which may take so many seconds."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    self.close()
                    return Silence("hang", f"no answer in {seconds:.0f} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = process.wait()
        self._process = None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Silence("crash", f"{name} {self._last_words()[:300]}")

    def close(self) -> None:
        """Stop the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _last_words(self) -> str:
        assert self._said is not None
        self._said.seek(0)
        return " ".join(self._said.read().strip().splitlines()[-1:])

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, str(self.worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        return self._process


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer jobs until there are no more, in the child; what compilers print meanwhile is no answer."""
    warnings.filterwarnings("ignore")
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()
