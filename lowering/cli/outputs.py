"""Write the files of one run of a command: each whole or not at all, and none over what the run reads."""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import temporary
from ..errors import UsageError


@dataclass
class Output:
    """A file that appears whole or not at all: written at ``temporary``, moved to ``path``."""

    path: Path
    temporary: Path

    def __post_init__(self) -> None:
        self._mode = stat.S_IMODE(self.temporary.stat().st_mode)

    def commit(self) -> None:
        """Give the file its name, and the permissions it was reserved with: a library may replace it."""
        with writing(self.path):
            self.temporary.chmod(self._mode)
            self.temporary.replace(self.path)


class Outputs:
    """The files of one run; those not committed when it ends are removed."""

    def __init__(self) -> None:
        self._files: list[Output] = []

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._files:
            output.temporary.unlink(missing_ok=True)

    def file(self, path: Path) -> Output:
        """Reserve ``path`` now, so that what cannot be written is known before the work is done."""
        with writing(path):
            real = path.resolve()  # a link stays a link: what it points to is replaced
            if real.is_dir():
                raise UsageError(f"cannot write {path}: it is a directory")
            if real.exists() and not stat.S_ISREG(real.stat().st_mode):
                raise UsageError(f"cannot write {path}: it is not a regular file")
            output = Output(real, temporary.beside(real))
        self._files.append(output)
        return output


def make_directory(path: Path) -> None:
    """Make a directory, and see that files can be written in it."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        temporary.beside(path / "probe").unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what could not be written: the path is a part of the request."""
    try:
        yield
    except OSError as error:
        if not path.parent.exists():
            raise UsageError(f"cannot write {path}: the directory {path.parent} does not exist") from None
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # a null character; links that lead in a circle
        raise UsageError(f"cannot write {str(path)!r}: {error}") from None


def check_apart(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Raise UsageError where an output is something that is read, or another output.

    Both map what the user calls a file to its path.  Hard links, symbolic links and another case of a name,
    where the file system makes no difference, are the same file.
    """
    seen = {"the " + label: path for label, path in inputs.items()}
    for label, path in outputs.items():
        for other, taken in seen.items():
            if _are_same(path, taken):
                raise UsageError(f"{label} {path} has the same path as {other}; nothing was written")
        seen[label] = path


def check_dump(directory: Path, names: str, files: Mapping[str, Path]) -> None:
    """Raise UsageError where a dump, whose files' names match ``names``, would overwrite one of ``files``."""
    for label, path in files.items():
        if re.fullmatch(names, path.name) and _are_same(path.parent, directory):
            raise UsageError(
                f"a dump into {directory} would overwrite {label} {path}; choose another directory"
            )


def _are_same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return one.samefile(other)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        one, other = one.resolve(), other.resolve()
    if one == other:
        return True
    alike = one.name.casefold() == other.name.casefold() and one.parent == other.parent
    return alike and _ignores_case(one.parent)


def _ignores_case(directory: Path) -> bool:
    try:
        probe = temporary.beside(directory / "probe")
    except OSError:
        return False  # nothing can be written there at all
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        probe.unlink()
