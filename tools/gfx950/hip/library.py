"""Builds the stand-in's shared object, once for each version of its sources, and says how to select it."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowering import object_cache
from lowering.backends import commands
from lowering.errors import ToolchainError
from lowering.host_compiler import c_compiler, hosted

ARCHITECTURES = ("gfx950", "gfx942")

_SOURCES = ("device.c", "memory.c", "module.c", "graph.c")
_HEADERS = ("abi.h", "internal.h")
_OPTIONS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wl,-z,nodelete")


def library(executor: Sequence[str] | None = None) -> Path:
    """The stand-in, as the path of a shared object.

    executor: the command of the process that executes kernels; two file descriptors, the socket and the
    memory, are added to it.  Default: ``worker`` with ``gpu``, in this Python.

    Raises ToolchainError if there is no C compiler, or if it fails.
    """
    command = tuple(executor or _worker())
    directory = Path(__file__).parent
    texts = [(name, (directory / name).read_text(encoding="utf-8")) for name in (*_SOURCES, *_HEADERS)]
    compiler = hosted(c_compiler())
    parts = [compiler, commands.version(compiler), _OPTIONS, command, texts]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    built = object_cache.place() / f"{key}.so"
    if not built.is_file():
        built.parent.mkdir(parents=True, exist_ok=True)
        words = ", ".join(json.dumps(word) for word in command)  # a JSON string of ASCII is one of C
        with tempfile.TemporaryDirectory(dir=built.parent, prefix=".new-") as name:
            made = Path(name) / built.name
            define = f"-DEXECUTOR_COMMAND={words}"
            _run([*compiler, *_OPTIONS, define, *_SOURCES, "-o", str(made)], directory)
            made.replace(built)
    return built


def environment(arch: str) -> dict[str, str]:
    """The variables that make IREE's HIP driver use the stand-in as a GPU of ``arch``."""
    return {"IREE_HIP_DYLIB_PATH": f"file:{library()}", "VMFUSE_EMULATED_ARCH": arch}


def _worker() -> tuple[str, ...]:
    """The worker finds its own modules by this checkout's path, whatever the caller's directory is."""
    root = str(Path(__file__).resolve().parents[3])
    start = "from tools.gfx950.hip import gpu, worker; worker.serve(gpu.Gpu)"
    return ("/usr/bin/env", f"PYTHONPATH={root}", sys.executable, "-c", start)


def _run(command: Sequence[str], directory: Path) -> None:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        message = done.stderr.strip() or f"exit status {done.returncode}"
        raise ToolchainError(f"The HIP stand-in did not compile.\n{message}\ncommand: {shlex.join(command)}")
