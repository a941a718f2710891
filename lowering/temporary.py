"""Write files under a name of their own, rename them when they are whole, remove them when not.

A process that is killed cannot clean up.  The names therefore say whose they are (the machine since it was
started, the process and when that began), and whoever next writes in the same directory removes those of the
dead.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

_MARK = re.compile(
    r"(?:\..*\.)?vmfuse-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-(?P<started>\d+)-[0-9a-f]{8}(\.[^.]*)?"
)
_KEPT = 40
"""Characters of a file's own name that its temporary name keeps: the whole must not be too long."""


def beside(path: Path) -> Path:
    """A new empty file in the directory of ``path``, with its suffix and the permissions the umask gives.

    What killed processes left there is removed first.  Raises OSError.
    """
    remove_abandoned(path.parent)
    while True:
        temporary = path.parent / f".{path.name[:_KEPT]}.{_mark()}{path.suffix[:_KEPT]}"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return temporary


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file, then give it the name ``path``: never half a file.  Raises OSError."""
    temporary = beside(path)
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A new directory among the system's temporary ones, for the length of a block."""
    place = Path(tempfile.gettempdir())
    remove_abandoned(place)
    path = place / _mark()
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(where: Path) -> None:
    """Remove what processes of this user that are no more left in a directory; once in each process."""
    _remove_abandoned(where.absolute(), os.getpid())


@functools.cache
def _remove_abandoned(where: Path, _process: int) -> None:
    try:
        entries = list(os.scandir(where))
    except OSError:
        return  # what is wrong with the directory is said by whoever writes there
    for entry in entries:
        mark = _MARK.fullmatch(entry.name)
        if mark is None or not _is_abandoned(mark):
            continue
        with contextlib.suppress(OSError):  # somebody else's, or another process was faster
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink()


def _mark() -> str:
    return f"vmfuse-{_machine()}-{os.getpid()}-{_started(os.getpid()) or 0}-{secrets.token_hex(4)}"


def _is_abandoned(mark: re.Match[str]) -> bool:
    """Tell whether its process ran here, where processes can be told apart, and does not any more."""
    if mark["machine"] != _machine() or mark["started"] == "0":
        return False
    return _started(int(mark["process"])) != int(mark["started"])


@functools.cache
def _machine() -> str:
    """Name where a process number means something: this machine since its start, and its set of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{zlib.crc32((boot + str(Path('/proc/self/ns/pid').readlink())).encode()):08x}"
    except OSError:
        return "0" * 8


def _started(process: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None if that cannot be told."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in parentheses, may hold anything; 19 fields behind it comes the time.
    return int(text.rpartition(")")[2].split()[19])


class Terminated(BaseException):
    """SIGTERM: as an exception, so that what is half-done is removed on the way out."""


@contextlib.contextmanager
def termination_cleans_up() -> Iterator[None]:
    """Have SIGTERM raise Terminated while the block runs (in the main thread; elsewhere nothing changes)."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
