"""Run IREE's compiler in a process of its own, so that what kills it is an error here.

One process, ``isolated``, is started with the first compilation, while torch.export is at work; it loads IREE
and forks for every request.  Nothing that a request holds or leaks outlives it, no signal of the terminal
reaches it, and it ends when this process does or stops waiting.

Environment: ``VMFUSE_COMPILE_TIMEOUT``, the seconds of processor time one request may take, 0 for no limit.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from iree.compiler import ir

from ..errors import CompileError, ToolchainError, UsageError
from . import child as isolated

TIMEOUT = "VMFUSE_COMPILE_TIMEOUT"
# What a request may take, in seconds of processor time: for any program, and for each of its operations more.
_SECONDS = 60.0
_SECONDS_EACH = 1.0
# Where it computes nothing it waits for something that does not come: so many times as long by the clock.
_WAITING = 10


@dataclass
class Failed(Exception):
    """A request that came to nothing.

    cause: why it ended before it was done; None where the compiler rejected the program.  late: whether that
    was for want of time.  diagnostics: the errors it reported, each a location and a message.  output: all
    that it wrote.
    """

    cause: str | None
    late: bool
    diagnostics: tuple[tuple[str, str], ...]
    output: str = ""


def start() -> None:
    """Start the compiler's process if there is none, without waiting for it."""
    _current()


def run_passes(module: ir.Module, passes: str) -> ir.Module:
    """``module`` after a pipeline of passes, in the same context.  Raises Failed."""
    bytecode, _ = _run(module, {"passes": passes, "flags": [], "streams": False})
    return ir.Module.parse(bytecode, context=module.context)


def compile_module(
    module: ir.Module, flags: Sequence[str], *, streams: bool = False
) -> tuple[bytes, ir.Module | None]:
    """The program that IREE makes of ``module`` with these flags.  Raises Failed.

    streams: give besides what it is where IREE has laid out its memory, in the same context.
    """
    vmfb, bytecode = _run(module, {"passes": "", "flags": list(flags), "streams": streams})
    return vmfb, None if bytecode is None else ir.Module.parse(bytecode, context=module.context)


# -- a request -------------------------------------------------------------------------------------------


def _run(module: ir.Module, asked: dict[str, Any]) -> tuple[bytes, bytes | None]:
    bytecode, seconds = io.BytesIO(), _seconds(module)
    module.operation.write_bytecode(bytecode)
    with _directory() as directory:
        (directory / isolated.SOURCE).write_bytes(bytecode.getvalue())
        limits = {"cpu_seconds": None, "seconds": None}
        if seconds is not None:
            limits = {"cpu_seconds": int(seconds) + 1, "seconds": seconds * _WAITING}
        end = _send({**asked, **limits, "directory": str(directory), "cwd": _cwd()})
        diagnostics, done = (), False
        with contextlib.suppress(FileNotFoundError):
            answer = json.loads((directory / isolated.ANSWER).read_text(encoding="utf-8"))
            done, diagnostics = answer["done"], tuple(map(tuple, answer["diagnostics"]))
        if done and end["code"] == 0:
            streams = (directory / isolated.STREAMS).read_bytes() if asked["streams"] else None
            return (directory / isolated.RESULT).read_bytes(), streams
        output = ""
        with contextlib.suppress(FileNotFoundError):  # it died before it began
            output = (directory / isolated.OUTPUT).read_text(encoding="utf-8", errors="replace")
        late = end["late"] or (seconds is not None and end["cpu"] >= seconds)
        cause = None if end["code"] == 0 else _cause(-end["code"], seconds if late else None, output)
        raise Failed(cause, late, diagnostics, output)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A directory for a request.  The other side removes it as well when this one is killed."""
    directory = tempfile.mkdtemp(prefix="vmfuse-")
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _cwd() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:  # removed since
        return "/"


def _seconds(module: ir.Module) -> float | None:
    """The processor time that compiling ``module`` may take; None for any."""
    given = os.environ.get(TIMEOUT)
    if given is None:
        return _SECONDS + _SECONDS_EACH * _count(module)
    try:
        seconds = float(given)
    except ValueError:
        raise UsageError(f"{TIMEOUT} is a number of seconds, 0 for no limit, not {given!r}") from None
    return seconds if seconds > 0 else None


def _count(module: ir.Module) -> int:
    count = 0

    def visit(_: ir.Operation) -> ir.WalkResult:
        nonlocal count
        count += 1
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return count


def _cause(code: int, seconds: float | None, output: str) -> str:
    """Say why a compiler was not done: it took more than so many seconds, or else died of this signal."""
    if seconds is not None:
        return (
            f"did not come to an end in {seconds:.0f} s of processor time "
            f"({TIMEOUT} sets another limit, 0 none)"
        )
    said = _last_words(output)
    if code == signal.SIGKILL:
        return "was killed from outside (SIGKILL), which the system does when memory runs out"
    if code > 0:
        return f"died of {signal.Signals(code).name} ({signal.strsignal(code)}){said}"
    return f"ended with exit code {-code}{said}"


def _last_words(output: str) -> str:
    """The line in which LLVM, the C library or Python says why it gives up, if there is one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marks = ("LLVM ERROR", "Assertion", "terminate called", "what():", "Error: ")
    said = [line for line in lines if any(mark in line for mark in marks)]
    return f": {said[-1][:300]}" if said else ""


def _send(asked: dict[str, Any]) -> dict[str, Any]:
    """Hand a request over and wait for its end; whatever interrupts the wait ends the request."""
    server = _current()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            server = server.fork(theirs)
        try:
            ours.sendall(json.dumps(asked).encode() + b"\n")
            with ours.makefile("rb") as answers:
                line = answers.readline()
        except OSError:  # closed on the other side, which is then gone
            line = b""
        except BaseException:
            _abandon(ours)
            raise
    if not line:
        raise server.failure()
    return json.loads(line)


def _abandon(request: socket.socket) -> None:
    """Have the request killed; it is gone, with its files, when the other side has closed."""
    with contextlib.suppress(OSError):
        request.settimeout(5)
        request.shutdown(socket.SHUT_WR)
        while request.recv(4096):
            pass


# -- the process that answers ----------------------------------------------------------------------------


class _Server:
    """The process that forks for every request, and the socket that requests go through."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        with theirs:
            # Its own session: Ctrl-C at the terminal is for this process, which passes on what it means.
            self.process = subprocess.Popen(
                [_interpreter(), "-I", "-S", isolated.__file__, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                # A library that starts threads when it is loaded would have them before each fork.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def fork(self, request: socket.socket) -> _Server:
        """Hand over the socket of a request; the server that has it, another one where this was killed."""
        try:
            socket.send_fds(self.control, [b"+"], [request.fileno()])
        except OSError:
            self.process.kill()
            self.process.wait()
            return _current().fork(request)
        return self

    def failure(self) -> CompileError:
        """Say why a request got no answer."""
        with contextlib.suppress(OSError):
            self.control.settimeout(1)
            if said := self.control.recv(65536):
                return ToolchainError(f"IREE's compiler cannot be loaded: {said.decode().strip()}")
        return CompileError("the process that IREE's compiler runs in was killed; compile again")

    def close(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()


def _interpreter() -> str:
    """A Python of this version: ours, or where we are embedded in another program, the one it belongs to.

    ``multiprocessing.set_executable`` chooses it as for any process that multiprocessing starts.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    chosen = os.fsdecode(spawn.get_executable() or "")
    if chosen and (chosen != sys.executable or "python" in Path(chosen).name):
        return chosen
    prefixes = dict.fromkeys((sys.exec_prefix, sys.base_exec_prefix))
    for candidate in (*(f"{prefix}/bin/{version}" for prefix in prefixes), shutil.which(version)):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise ToolchainError(
        f"IREE's compiler runs in a process of its own, which needs {version}, and there is none: "
        "name one with multiprocessing.set_executable"
    )


_server: _Server | None = None
_lock = threading.Lock()


def _current() -> _Server:
    global _server
    with _lock:
        if _server is not None and _server.process.poll() is not None:
            _server.control.close()
            _server = None
        if _server is None:
            _server = _Server()
        return _server


@atexit.register
def _close() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def _forget() -> None:
    """In a forked child: the process belongs to the parent, and is not kept alive by this one."""
    global _server, _lock
    _lock = threading.Lock()
    if _server is not None:
        _server.control.close()
        _server.process.returncode = 0  # not this process's to wait for
        _server = None


os.register_at_fork(after_in_child=_forget)
