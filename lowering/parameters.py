"""Weights outside the IR: the parameter archive (.irpa) a program's globals name.

Tensors are handed to IREE's archive writer as views of their own bytes, whatever their dtype.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import UsageError
from .signature import PARAMETER_SCOPE, Parameters, parameter_digest


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
def archived(tensors: Mapping[str, torch.Tensor], path: Path | None) -> Iterator[Archive]:
    """Write ``tensors``; at ``path`` once the block ends well, or in a temporary place when None."""
    if path is None and not tensors:
        yield Archive(None, embedded=True)
    elif path is None:
        with tempfile.TemporaryDirectory() as directory:
            temporary = Path(directory) / "parameters.irpa"
            write_archive(tensors, temporary)
            yield Archive(temporary, embedded=True)
    else:
        temporary = _temporary_beside(path)
        try:
            write_archive(tensors, temporary)
            identity = Parameters(PARAMETER_SCOPE, parameter_digest(temporary))
            yield Archive(temporary, embedded=False, identity=identity)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_archive(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write an .irpa holding ``tensors`` by name, contiguous and in their own dtype."""
    import iree.runtime as rt

    index = rt.ParameterIndex()
    for name, tensor in tensors.items():
        # A zero-dimensional or fp8 tensor has no buffer protocol of its own: pass its bytes.
        index.add_buffer(name, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    index.create_archive_file(str(path))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises UsageError if it cannot be written.
    """
    try:
        temporary = _temporary_beside(path)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _temporary_beside(path: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    return Path(name)
