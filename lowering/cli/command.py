"""Hold what the commands share: every failure is one message and an exit code, and nothing half-done stays.

Nothing heavy is imported here, so that Ctrl-C is answered from the first moment on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from ..errors import CompileError, LoweringError
from ..temporary import Terminated, termination_cleans_up

DEBUG = "LOWERING_DEBUG"

INTERRUPTED = 130
TERMINATED = 143
"""As a shell counts: 128 and the number of the signal."""


def guarded(prog: str, run: Callable[[], None]) -> int:
    """Run a command; its exit code, after one message on standard error if it failed."""
    try:
        with termination_cleans_up():
            run()
    except LoweringError as error:
        return _failed(prog, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed(prog, "interrupted", INTERRUPTED)
    except Terminated:
        return _failed(prog, "terminated", TERMINATED)
    except Exception as error:
        return _failed(prog, _words(prog, error), CompileError.exit_code)
    return 0


def _words(prog: str, error: Exception) -> str:
    if is_out_of_memory(error):
        return f"out of memory: {_first_line(error) or 'there is none left'}"
    if isinstance(error, OSError):  # a disk that filled up, a directory that went away
        return f"{error.filename or 'cannot read or write'}: {error.strerror or error}"
    return f"this is a bug in {prog}, please report it: {type(error).__name__}: {_first_line(error)}".strip()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory, of the host or of a device, did not suffice; torch says it in several ways."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("allocate memory" in words or "RESOURCE_EXHAUSTED" in words))
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _failed(prog: str, message: str, code: int) -> int:
    if os.environ.get(DEBUG):
        import traceback

        traceback.print_exc()
    if sys.stdout is not None:
        with _unheard(sys.stdout):
            sys.stdout.flush()
    tell(f"{prog}: error: {message}")
    return code


# Standard output and error ----------------------------------------------------------------------


def write(text: str) -> None:
    """Print ``text``; a reader who has seen enough (``| head``) is no error, a full disk is one."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        raise LoweringError(f"standard output cannot be written: {error.strerror or error}") from error


def tell(text: str) -> None:
    """Print ``text`` on standard error, if there is one (``2>&-``) and anybody listens."""
    if sys.stderr is None:
        return
    with _unheard(sys.stderr):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _unheard(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError:
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Let ``stream`` lead nowhere: what is still in its buffer would be a second error at the exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
