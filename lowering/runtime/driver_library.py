"""Build the library that stands between IREE and a GPU's driver, and have IREE find it.

Its source is ``native/tape.c``; it is compiled on first use, as CPU kernels are, and kept with them.  It has
to be there before IREE opens the driver, which it does once in a process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from iree import runtime as iree

from .. import object_cache, temporary
from ..errors import ToolchainError
from ..host_compiler import c_compiler, hosted

_SOURCE = Path(__file__).parent / "native"
_OPTIONS = (
    "-std=gnu11",
    "-O2",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-w",
    "-Wl,--no-as-needed",
)

# How each driver's own library is called, and what IREE opens.
_REAL = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}
_DEFINES = {"cuda": ("-DFOR_CUDA", "-Wl,-soname,libcuda.so"), "hip": ("-DFOR_HIP",)}


@functools.cache
def library(backend: str) -> ctypes.CDLL | str:
    """The library for a GPU's backend, in IREE's way from now on; a sentence where there is none."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    try:
        return opened(backend, _real(backend))
    except (OSError, ToolchainError) as error:
        return str(error).partition("\n")[0]


def opened(backend: str, real: str) -> ctypes.CDLL:
    """The library before the driver's own at the path ``real``; OSError, ToolchainError where that fails.

    It is loaded from memory: what the cache holds is checked when it is read, and never after.
    """
    file = os.memfd_create(f"vmfuse-{backend}", os.MFD_CLOEXEC)
    with os.fdopen(file, "wb", closefd=False) as stream:
        stream.write(_built(backend, real))
    path = f"/proc/self/fd/{file}"
    opened = ctypes.CDLL(path)
    _declare(opened)
    if not opened.tape_ready():
        raise OSError(f"{real} lacks functions that graphs need: CUDA 12.4 or ROCm 6 has them")
    if backend == "hip":
        iree.flags.parse_flags(f"--hip_dylib_path=file:{path}")
    return opened


def _declare(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    for name, result, arguments in (
        ("tape_load", None, (ctypes.c_uint64,)),
        ("tape_begin", pointer, (ctypes.c_uint64, pointer, pointer, number)),
        ("tape_end", None, (pointer,)),
        ("tape_reason", ctypes.c_char_p, (pointer,)),
        ("tape_operations", number, (pointer,)),
        ("tape_captured", ctypes.c_int, (pointer,)),
        ("tape_play", ctypes.c_int, (pointer, pointer, pointer)),
        ("tape_error", ctypes.c_char_p, (ctypes.c_int,)),
        ("tape_drop", None, (pointer,)),
        ("tape_ready", ctypes.c_int, ()),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _real(backend: str) -> str:
    """The driver's own library, as the path of its file; OSError where there is none."""
    chosen = os.environ.get("IREE_HIP_DYLIB_PATH") if backend == "hip" else None
    name = _chosen(chosen) if chosen else _REAL[backend]
    ctypes.CDLL(name)
    if "/" in name:
        return name
    # The path that the loader has found: a linker does not look where it does.
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = re.search(rf"(/\S*/{re.escape(name.removesuffix('.1'))}\S*)$", maps, re.MULTILINE)
    if found is None:
        raise OSError(f"{name} is loaded, and no file of that name is")
    return found[1]


def _chosen(paths: str) -> str:
    """The first of IREE's search paths that there is: folders, and files with a prefix."""
    for path in paths.split(";"):
        file = path.removeprefix("file:") if path.startswith("file:") else f"{path}/{_REAL['hip']}"
        if Path(file).is_file():
            return file
    raise OSError(f"IREE_HIP_DYLIB_PATH names no library: {paths}")


def _built(backend: str, real: str) -> bytes:
    """The library's bytes, from the cache or the C compiler; ToolchainError without either."""
    texts = [
        (file.name, file.read_text(encoding="utf-8")) for file in sorted(_SOURCE.iterdir()) if file.is_file()
    ]
    options = (*_OPTIONS, *_DEFINES[backend], f"-DDRIVER={json.dumps(real)}")
    compiler = hosted(c_compiler("graphs of calls need"))
    key = hashlib.sha256(json.dumps([compiler, options, texts, real]).encode()).hexdigest()
    if (cached := object_cache.read(key)) is not None:
        return cached
    with temporary.directory() as directory:
        for name, text in texts:
            (directory / name).write_text(text, encoding="utf-8")
        _run([*compiler, *options, "tape.c", real, "-o", "tape.so"], directory)
        data = (directory / "tape.so").read_bytes()
    object_cache.write(key, data)
    return data


def _run(command: Sequence[str], directory: Path) -> None:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        message = (done.stderr.strip() or f"exit status {done.returncode}").partition("\n")[0]
        raise ToolchainError(f"the library does not compile: {message} (command: {shlex.join(command)})")
