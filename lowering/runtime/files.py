"""Open a compiled program and its weights, once they are known to be whole."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Literal

from iree import runtime as iree

from ..errors import RunError
from ..signature import (
    ASYNC,
    SIGNATURE_KEY,
    Parameters,
    Signature,
    parameter_digest,
)
from ..weights import integrity
from .session import instance, reason

Check = Literal["whole", "headers"]


# What ``check="headers"`` reads of a program: the module and its code, and no part larger than this, which is
# weights and then stays unread until it is used.
_LARGEST_HEADER = 16 << 20


def check_archive(source: str | Path | bytes, name: str, check: Check) -> None:
    """Raise RunError unless ``source`` is a complete, undamaged .vmfb: a ZIP archive with the module in it.

    IREE accepts a file whose tail is missing and reads beyond its end.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            entries = archive.infolist()
        if "module.fb" not in [entry.filename for entry in entries]:
            raise RunError(f"{name} is not a compiled program")
        if check == "headers":
            entries = [entry for entry in entries if entry.file_size <= _LARGEST_HEADER]
        data = memoryview(source) if isinstance(source, bytes) else integrity.mapped(Path(source))
        integrity.check(integrity.parts_of_program(data, entries))
    except OSError as error:
        raise RunError(f"{name} cannot be read: {error.strerror or error}") from error
    except integrity.Damaged as error:
        raise RunError(f"{name} is damaged: {error}") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise RunError(f"{name} is not a compiled program, or it is truncated or damaged") from error


def open_module(source: str | Path | bytes) -> iree.VmModule:
    """Open a .vmfb, mapped from its file or copied from memory."""
    if isinstance(source, bytes):
        return iree.VmModule.copy_buffer(instance(), source)
    return iree.VmModule.mmap(instance(), str(source))


def signatures_of(module: iree.VmModule, name: str) -> dict[str, Signature]:
    """The functions of a program that carry a signature, by name; not their twins that take fences."""
    found: dict[str, Signature] = {}
    for function in module.function_names:
        if function.endswith(ASYNC):
            continue
        text = function_of(module, function).reflection.get(SIGNATURE_KEY)
        if text is None:
            continue
        try:
            found[function] = Signature.from_json(text)
        except ValueError as error:
            raise RunError(f"{name} cannot be loaded: {error}") from error
    if not found:
        raise RunError(f"{name} was not made by compile-to-vmfb: it carries no {SIGNATURE_KEY}")
    return found


def function_of(module: iree.VmModule, name: str) -> iree.VmFunction:
    """Find the function called ``name``; RunError without one."""
    function = module.lookup_function(name)
    if function is None:
        raise RunError(f"the program has no function {name!r}")
    return function


def parameter_modules(
    needed: Parameters | None, path: str | Path | None, name: str, check: Check
) -> list[iree.VmModule]:
    """The module that gives a program its weights, after checking that they are the right ones."""
    if needed is None:
        if path is not None:
            raise RunError(f"{name} carries its own parameters and takes none from {path}")
        return []
    if path is None:
        raise RunError(f"{name} keeps its parameters in a separate .irpa file: pass parameters=FILE")
    try:
        digest = parameter_digest(path)
        if digest != needed.digest:
            raise RunError(f"{path} does not hold the parameters that {name} was compiled with")
        if check == "whole":
            integrity.check(integrity.parts_of_archive(integrity.mapped(Path(path))))
        index = iree.ParameterIndex()
        index.load(str(path))
    except OSError as error:
        raise RunError(f"parameters {path} cannot be read: {error.strerror or error}") from error
    except integrity.Damaged as error:
        raise RunError(f"parameters {path} are damaged: {error}") from error
    except (ValueError, IndexError) as error:
        raise RunError(f"parameters {path} cannot be used: {reason(error)}") from error
    provider = index.create_provider(scope=needed.scope)
    return [iree.create_io_parameters_module(instance(), provider)]
