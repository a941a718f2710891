"""Kernel objects on disk, under a hash of everything that goes into them: sources, options, compiler.

An entry is a check value and the object.  The value covers the key too, so that neither a damaged entry nor
one under another's name is ever taken; such an entry is a miss, and is written anew.  Any number of processes
may use one directory: entries are renamed into place.  A cache that cannot be read or written costs time, not
correctness.

Environment: ``VMFUSE_CACHE_DIR``, where it is; ``VMFUSE_NO_CACHE``, not empty: there is none;
``VMFUSE_CACHE_SIZE``, the bytes it may take, beyond which the entries used least recently are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import temporary
from .errors import UsageError

DIRECTORY, DISABLED, SIZE = "VMFUSE_CACHE_DIR", "VMFUSE_NO_CACHE", "VMFUSE_CACHE_SIZE"
DEFAULT_SIZE = 256 << 20

_KEY = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = hashlib.sha256().digest_size
_KEPT = 0.8
"""Of the size, after entries had to be removed: the next few writes then need not count."""

_chosen: tuple[Path | None, bool] = (None, True)


@contextlib.contextmanager
def placed(directory: Path | None, *, enabled: bool = True) -> Iterator[None]:
    """Keep objects in ``directory`` while the block runs; None: where the environment says."""
    global _chosen
    before, _chosen = _chosen, (directory, enabled)
    try:
        yield
    finally:
        _chosen = before


def read(key: str) -> bytes | None:
    """The object under ``key``, unless it is not there or not what was written there."""
    directory = _directory()
    if directory is None:
        return None
    path = directory / key
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
                return None  # native code of somebody else's
            entry = file.read()
    except OSError:
        return None
    digest, data = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if not data or _digest(key, data) != digest:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used just now
    return data


def write(key: str, data: bytes) -> None:
    """Keep ``data`` under ``key``, if that can be done."""
    directory = _directory()
    if directory is None:
        return
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.replace(directory / key, lambda path: path.write_bytes(_digest(key, data) + data))
        _shrink(directory, _size())


def _directory() -> Path | None:
    """Tell where objects are kept; None for nowhere, as if others could put theirs there."""
    chosen, enabled = _chosen
    if not enabled or (chosen is None and os.environ.get(DISABLED)):
        return None
    directory = chosen or place()
    try:
        writable_by_all = directory.stat().st_mode & stat.S_IWOTH
    except FileNotFoundError:
        return directory
    except OSError:
        return None
    return None if writable_by_all else directory


def place() -> Path:
    """Tell where objects are kept unless a command says otherwise; the directory may not exist."""
    if chosen := os.environ.get(DIRECTORY):
        return Path(chosen)
    import platformdirs

    directory = Path(platformdirs.user_cache_dir("vmfuse", appauthor=False))
    # Without a home directory it is relative to wherever the process happens to be.
    return directory if directory.is_absolute() else Path(tempfile.gettempdir()) / f"vmfuse-{os.geteuid()}"


def _size() -> int:
    text = os.environ.get(SIZE) or str(DEFAULT_SIZE)
    if not text.isdecimal():
        raise UsageError(f"{SIZE} is a number of bytes, not {text!r}")
    return int(text)


def _shrink(directory: Path, size: int) -> None:
    entries = []
    for entry in os.scandir(directory):
        with contextlib.suppress(OSError):  # another process may be faster
            if _KEY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                entries.append((found.st_mtime_ns, found.st_size, entry.path))
    taken = sum(bytes_ for _, bytes_, _ in entries)
    if taken <= size:
        return
    for _, bytes_, path in sorted(entries):
        if taken <= _KEPT * size:
            break
        Path(path).unlink(missing_ok=True)
        taken -= bytes_


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + data).digest()
