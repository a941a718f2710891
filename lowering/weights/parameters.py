"""Keep weights outside the IR, in the parameter archive (.irpa) that a program's globals name.

Tensors are written from where they are, folded values as they are made; no more of them is in memory than
it takes to make the largest.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import temporary
from ..errors import UsageError
from ..signature import PARAMETER_SCOPE, Parameters, parameter_digest
from .archive import ArchiveWriter, TensorType
from .recipes import WORKING, Recipe

Stored = torch.Tensor | Recipe
Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Archive:
    """A written archive; ``embedded`` archives go into the vmfb and are then forgotten."""

    path: Path | None
    embedded: bool
    identity: Parameters | None = None

    def flags(self) -> tuple[str, ...]:
        """The compiler flags that bring an embedded archive into the vmfb."""
        if self.path is None or not self.embedded:
            return ()
        return (
            f"--iree-parameter-import={PARAMETER_SCOPE}={self.path}",
            f"--iree-parameter-import-maximum-size={2**62}",
        )


@contextlib.contextmanager
def archived(
    tensors: Mapping[str, Stored], path: Path | None, progress: Progress = lambda phase, detail: None
) -> Iterator[Archive]:
    """Write ``tensors``; at ``path`` once the block ends well, or in a temporary place when None."""
    if path is None and not tensors:
        yield Archive(None, embedded=True)
    elif path is None:
        with temporary.directory() as directory:
            file = directory / "parameters.irpa"
            with _written(file):
                write_archive(tensors, file, progress)
            yield Archive(file, embedded=True)
    else:
        with _written(path):
            file = temporary.beside(path)
        try:
            with _written(path):
                write_archive(tensors, file, progress)
            identity = Parameters(PARAMETER_SCOPE, parameter_digest(file))
            yield Archive(file, embedded=False, identity=identity)
            with _written(path):
                file.replace(path)
        finally:
            file.unlink(missing_ok=True)


def write_archive(
    tensors: Mapping[str, Stored], path: Path, progress: Progress = lambda phase, detail: None
) -> None:
    """Write an .irpa holding ``tensors`` by name, contiguous and in their own dtype.

    Recipes are evaluated here, several tensors at a time where memory allows: what is held at one moment
    beside the tensors themselves is what the most demanding of them takes alone, or ``WORKING`` bytes.
    """
    types = {name: TensorType(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    total, done = sum(type_.nbytes for type_ in types.values()), 0
    memory = _Memory(max([WORKING, *map(_needed, tensors.values())]))
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        archive = ArchiveWriter(file.fileno(), types)

        def write(name: str) -> str:
            tensor = tensors[name]
            with memory.taken(_needed(tensor)):
                value = tensor.evaluate() if isinstance(tensor, Recipe) else tensor.cpu().contiguous()
                archive.write(name, value)
            return name

        try:
            for count, written in enumerate(as_completed([pool.submit(write, name) for name in tensors]), 1):
                done += types[written.result()].nbytes
                progress("weights", f"{count} of {len(types)}, {done / 1e6:.1f} of {total / 1e6:.1f} MB")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        archive.finish()


def _needed(tensor: Stored) -> int:
    """Bytes of memory it takes to write ``tensor``."""
    if isinstance(tensor, Recipe):
        return tensor.memory
    return 0 if tensor.is_cpu and tensor.is_contiguous() else tensor.nbytes


class _Memory:
    """An amount that threads take parts of, waiting until there is enough."""

    def __init__(self, amount: int):
        self._left = amount
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises UsageError if it cannot be written.
    """
    with _written(path):
        temporary.replace(path, write)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
