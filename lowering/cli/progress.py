"""Tell on standard error which phase is under way, and how long each took."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .command import tell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


@dataclass
class Progress:
    """One line per phase on standard error, with its time; the phase under way is animated on a terminal.

    Called with a phase's name when it begins, and again with the same name when only its detail changes.
    """

    note: str = ""
    _phase: str | None = None
    _detail: str = ""
    _since: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _console: Console | None = None
    _status: Status | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        self._stop()

    def __call__(self, phase: str, detail: str = "") -> None:
        if phase != self._phase:
            self.finish()
            self._phase, self._since = phase, time.monotonic()
        self._detail = detail
        if self._console is not None:
            self._animate()

    def finish(self) -> None:
        """Print the line of the phase under way, if there is one."""
        self._stop()
        if self._phase is None:
            return
        took = time.monotonic() - self._since
        self._line(f"  {self._phase:<10}{took:7.2f} s", self.note or self._detail)
        self._phase, self.note = None, ""

    def say(self, text: str) -> None:
        """Print the last line, with the time of the whole run."""
        self._line(f"  {'done':<10}{time.monotonic() - self._started:7.2f} s", text)

    def _line(self, head: str, tail: str) -> None:
        if self._console is None:
            tell(f"{head}  {tail}".rstrip())
            return
        from rich.text import Text

        self._console.print(
            Text.assemble(("✓ ", "green"), head.strip(), (f"  {tail}", "dim")), overflow="fold"
        )

    def _animate(self) -> None:
        from rich.text import Text

        text = Text.assemble(f"{self._phase:<10}", (self._detail, "dim"))
        if self._status is None:
            assert self._console is not None
            self._status = self._console.status(text)
            self._status.start()
        self._status.update(text)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
