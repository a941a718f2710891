"""Run compilers: one compilation, and what it depends on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import temporary
from ..errors import ToolchainError


def kernel_source_dir() -> Path:
    """The directory of the device sources: beside this package in a checkout, inside it in a wheel.

    Raises ToolchainError when the installation has neither.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / "kernels", package / "_kernels"):
        if (candidate / "row.h").is_file():
            return candidate
    raise ToolchainError(f"The kernel sources are missing beside {package}: reinstall vmfuse.")


@dataclass(frozen=True)
class Job:
    """One compilation: everything the object depends on."""

    compiler: Compiler
    source: str
    texts: tuple[tuple[str, str], ...]  # file name, contents: the source, then its headers
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        compiler = [type(self.compiler).__name__, self.compiler.name, self.compiler.identity]
        parts = [*compiler, self.source, self.texts, self.options]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def command(self) -> str:
        return shlex.join([self.compiler.name, *self.options, self.source])


@dataclass(frozen=True)
class Compiler(ABC):
    """A compiler: ``identity`` changes whenever its output may."""

    name: str
    identity: str

    @abstractmethod
    def run(self, job: Job) -> bytes:
        """Make the object; ToolchainError, with the compiler's message and command, where it fails."""


def file_identity(path: str) -> str:
    """Tells two builds of one version apart."""
    try:
        status = Path(path).stat()
    except OSError:
        return path
    return f"{Path(path).name} {status.st_size} {status.st_mtime_ns}"


@functools.cache
def version(command: tuple[str, ...]) -> str:
    """Give what a compiler says of itself, and which file it is."""
    file = file_identity(shutil.which(command[0]) or command[0])
    return call([*command, "--version"], Path(tempfile.gettempdir())) + file


@contextlib.contextmanager
def directory_of(texts: Sequence[tuple[str, str]]) -> Iterator[Path]:
    """A directory holding ``texts``: compilers run in it, so no path of this machine reaches an object."""
    with temporary.directory() as directory:
        for file, text in texts:
            (directory / file).write_text(text, encoding="utf-8")
        yield directory


def call(command: Sequence[str], directory: Path) -> str:
    """Standard output of ``command``; ToolchainError with its message if it fails."""
    environment: Mapping[str, str] = {**os.environ, "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ToolchainError(f"Could not run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise ToolchainError(failure(shlex.join(command), done.stderr or done.stdout))
    return done.stdout


def failure(command: str, message: str) -> str:
    """Say what a compiler said, with what it was given."""
    return f"A kernel did not compile.\n{message.strip()}\ncommand: {command}\nsources: {kernel_source_dir()}"
