"""Find a C compiler for this machine.

Environment: ``CC``, its command.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys

from .errors import ToolchainError


def ziglang() -> tuple[str, ...] | None:
    """The command of the ``ziglang`` wheel, which carries clang and lld."""
    return (sys.executable, "-m", "ziglang") if importlib.util.find_spec("ziglang") else None


def c_compiler(what: str = "CPU kernels need") -> tuple[str, ...]:
    """The command: ``CC``, one on PATH, or the clang of the ziglang wheel.

    Raises ToolchainError, which says for ``what``, where there is none.
    """
    if chosen := os.environ.get("CC"):
        command = tuple(shlex.split(chosen))
        if not shutil.which(command[0]):
            raise ToolchainError(f"CC names {chosen!r}, which is not on PATH.")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    if zig := ziglang():
        return (*zig, "clang")
    raise ToolchainError(
        f"A C compiler, which {what}, is missing. Install one (gcc or clang), "
        "or the one that comes with: pip install 'vmfuse[hip]'"
    )


def hosted(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command that has a C library: of the ``ziglang`` wheel it is another."""
    return (*command[:-1], "cc") if command[1:] == ("-m", "ziglang", "clang") else command
