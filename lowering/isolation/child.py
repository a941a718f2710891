"""Run IREE's compiler: the process that ``isolation`` starts as a script and talks to.

Nothing of this project is imported here, nor torch: what is held is IREE's compiler, loaded once.  For each
request it forks twice.  The inner process compiles and may die; the outer one keeps it: it says how that
ended, and ends it when the time is up or when nobody waits any more.  No thread exists before a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# In the directory of a request: what is compiled, and what comes of it.
SOURCE, RESULT, ANSWER, OUTPUT = "source.mlirbc", "result", "answer.json", "output.txt"
STREAMS = "streams.mlirbc"
"""The program in the middle of its compilation, where that is asked for."""


def serve(control: socket.socket) -> None:
    """Answer requests until the other side is gone; each comes as a socket of its own."""
    try:
        _load()
    except BaseException:
        control.sendall(traceback.format_exc().encode())
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a keeper's end is of no interest
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        request = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            _exit_after(_keep, request)
        request.close()


def _load() -> None:
    """Load all that a request needs: what is loaded before the fork is shared by all."""
    from iree.compiler import ir, passmanager  # noqa: F401
    from iree.compiler.api import Session  # noqa: F401


def _exit_after(work: Callable[..., None], *args: Any) -> None:
    """End this process after ``work`` without running what its parent registered for its own end."""
    try:
        work(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


# -- the keeper ------------------------------------------------------------------------------------------


def _keep(request: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = json.loads(request.makefile("rb").readline())
    keeper = os.getpid()
    alive, held = os.pipe()  # readable once the worker, which alone holds the other end, is gone
    worker = os.fork()
    if worker == 0:
        request.close()
        _exit_after(_work, asked, keeper)
    os.close(held)
    reason = _wait(request, alive, asked["seconds"])
    with contextlib.suppress(ProcessLookupError):  # the linker it may have started goes with it
        os.killpg(worker, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    _, status, usage = os.wait4(worker, 0)
    if reason == "left":
        shutil.rmtree(asked["directory"], ignore_errors=True)
        return
    end = {
        "late": reason == "late",
        "code": os.waitstatus_to_exitcode(status),
        "cpu": usage.ru_utime + usage.ru_stime,
    }
    request.sendall(json.dumps(end).encode() + b"\n")


def _wait(request: socket.socket, alive: int, seconds: float | None) -> str:
    """Wait until the worker is gone ("done"), time is up ("late") or the other side has closed ("left")."""
    deadline = None if seconds is None else time.monotonic() + seconds
    poll = select.poll()
    poll.register(request, select.POLLIN)
    poll.register(alive, select.POLLIN)
    while True:
        left = None if deadline is None else max(0, deadline - time.monotonic()) * 1000
        events = {descriptor for descriptor, _ in poll.poll(left)}
        if alive in events:
            return "done"
        if not events:
            return "late"
        if not request.recv(1):
            return "left"


# -- the worker ------------------------------------------------------------------------------------------


def _work(asked: dict[str, Any], keeper: int) -> None:
    directory = Path(asked["directory"])
    _confine(asked, directory, keeper)
    diagnostics: list[tuple[str, str]] = []
    done = (_run_passes if asked["passes"] else _compile)(asked, directory, diagnostics)
    answer = {"done": done, "diagnostics": diagnostics}
    (directory / ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _confine(asked: dict[str, Any], directory: Path, keeper: int) -> None:
    """Take this process away from the terminal and give it its limits; it dies with its keeper."""
    os.setpgid(0, 0)
    _die_with(keeper)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if asked["cpu_seconds"] is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (asked["cpu_seconds"], asked["cpu_seconds"] + 5))
    output = os.open(directory / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TMPDIR"] = str(directory)  # what the linker leaves there goes with the directory
    with contextlib.suppress(OSError):
        os.chdir(asked["cwd"])


def _die_with(keeper: int) -> None:
    """Linux ends this process with its keeper, even one that was killed; elsewhere it would run on."""
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


class _Text(ctypes.Structure):
    """A piece of text as MLIR hands it over."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


# What MLIR's C interface calls; each of its own types is a pointer, or a result of one byte.
_HANDLER = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p, ctypes.c_void_p)
_WRITER = ctypes.CFUNCTYPE(None, _Text, ctypes.c_void_p)
_ERROR, _HANDLED = 0, 1


@contextlib.contextmanager
def _collected(context: Any, diagnostics: list[tuple[str, str]]) -> Iterator[None]:
    """Note every error that MLIR reports in ``context``.

    A handler of MLIR's Python bindings allocates before it holds the interpreter's lock, which a session has
    let go: from Python 3.12 on that is the end of the process, at any remark.  One of ctypes holds it.
    """
    from iree.compiler.api import ctypes_dl

    mlir, get_pointer = ctypes_dl._dylib, ctypes.pythonapi.PyCapsule_GetPointer
    mlir.mlirContextAttachDiagnosticHandler.restype = ctypes.c_uint64
    mlir.mlirDiagnosticGetLocation.restype = get_pointer.restype = ctypes.c_void_p

    def text(write: Callable[..., Any], pointer: int) -> str:
        parts: list[bytes] = []
        writer = _WRITER(lambda part, _: parts.append(ctypes.string_at(part.data, part.size)))
        write(ctypes.c_void_p(pointer), writer, None)
        return b"".join(parts).decode(errors="replace")

    def note(diagnostic: int, _: int | None) -> int:
        if mlir.mlirDiagnosticGetSeverity(ctypes.c_void_p(diagnostic)) == _ERROR:
            location = mlir.mlirDiagnosticGetLocation(ctypes.c_void_p(diagnostic))
            place = text(mlir.mlirLocationPrint, location)
            diagnostics.append((place, text(mlir.mlirDiagnosticPrint, diagnostic)))
        return _HANDLED

    handler = _HANDLER(note)
    capsule = ctypes.py_object(context._CAPIPtr)
    pointer = ctypes.c_void_p(get_pointer(capsule, ctypes_dl.MLIR_PYTHON_CAPSULE_CONTEXT))
    number = mlir.mlirContextAttachDiagnosticHandler(pointer, handler, None, None)
    yield
    mlir.mlirContextDetachDiagnosticHandler(pointer, ctypes.c_uint64(number))


def _run_passes(asked: dict[str, Any], directory: Path, diagnostics: list[tuple[str, str]]) -> bool:
    from iree.compiler import ir
    from iree.compiler.passmanager import PassManager

    with ir.Context():
        try:
            module = ir.Module.parse((directory / SOURCE).read_bytes())
            PassManager.parse(asked["passes"]).run(module.operation)
        except ir.MLIRError as error:
            diagnostics += [(str(item.location), item.message) for item in error.error_diagnostics]
            return False
        bytecode = io.BytesIO()
        module.operation.write_bytecode(bytecode)
        (directory / RESULT).write_bytes(bytecode.getvalue())
    return True


def _compile(asked: dict[str, Any], directory: Path, diagnostics: list[tuple[str, str]]) -> bool:
    from iree.compiler.api import Output, Session, Source

    session = Session()
    session.set_flags(*asked["flags"])
    invocation = session.invocation()
    source = Source.wrap_buffer(session, (directory / SOURCE).read_bytes())
    with _collected(session.context, diagnostics):
        if not (invocation.parse_source(source) and _execute(invocation, asked, directory)):
            return False
        output = Output.open_file(str(directory / RESULT))
        invocation.output_vm_bytecode(output)
        output.keep()
        output.close()
    return True


def _execute(invocation: Any, asked: dict[str, Any], directory: Path) -> bool:
    """Compile; where it is asked for, write the program down where its memory has been laid out."""
    if not asked.get("streams"):
        return invocation.execute()
    from iree.compiler.api import Output, ctypes_dl

    set_end = ctypes_dl._dylib.ireeCompilerInvocationSetCompileToPhase
    set_begin = ctypes_dl._dylib.ireeCompilerInvocationSetCompileFromPhase
    for function in (set_end, set_begin):
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_char_p), None
    set_end(invocation._inv_p, b"stream")
    if not invocation.execute():
        return False
    output = Output.open_file(str(directory / STREAMS))
    invocation.output_ir_bytecode(output)
    output.keep()
    output.close()
    set_begin(invocation._inv_p, b"stream")
    set_end(invocation._inv_p, b"end")
    return invocation.execute()


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[2])
    serve(socket.socket(fileno=int(sys.argv[1])))
