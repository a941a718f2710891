"""Load recognisers from outside: entry points of installed packages, and files named by the user.

A file (or the object an entry point of group ``vmfuse.recognisers`` names) holds ``RECOGNISERS``, a
tuple of objects with ``roots`` and ``recognise(op)`` as ``patterns.recogniser`` describes them.  They
are tried before the built-in ones.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from patterns.recogniser import Recogniser

from .errors import UsageError

ENTRY_POINTS = "vmfuse.recognisers"


def recognisers(files: Iterable[str | os.PathLike[str]] = ()) -> tuple[Recogniser, ...]:
    """Collect the recognisers of ``files``, in order, then those of installed packages.

    Raises UsageError naming the file or entry point that does not hold any.
    """
    found: list[Recogniser] = []
    for file in files:
        found += _checked(_import(Path(file)), str(file))
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        found += _checked(entry.load(), f"entry point {entry.name}")
    return tuple(found)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"{path}: no such Python file of patterns")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module


def _checked(holder: Any, name: str) -> tuple[Recogniser, ...]:
    found = getattr(holder, "RECOGNISERS", None)
    if not isinstance(found, tuple) or not found:
        raise UsageError(f"{name} holds no RECOGNISERS (a tuple of recognisers)")
    for recogniser in found:
        if not callable(getattr(recogniser, "recognise", None)) or not getattr(recogniser, "roots", ()):
            raise UsageError(f"{name}: {recogniser!r} has no roots or no recognise(op)")
    return found
