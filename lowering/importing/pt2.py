"""Read what ``torch.export.save`` wrote, without running any code that is in it.

Such a file can carry code in five places: pickles (example inputs, tensor subclasses, custom objects), the
libraries of an AOTInductor package, expressions of sizes and guards, which torch evaluates as Python, names,
which it writes into the source of ``forward``, and the functions that nodes call, which it looks up by any
path.  Everything here is read with the reader that torch itself uses, so that the two cannot see different
contents.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import constants as layout
from torch.export.pt2_archive._package import PT2ArchiveReader

from ..errors import UsageError

_OLD_PROGRAM = "serialized_exported_program.json"
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

# Names as torch makes them, and the strings of a tree of arguments: nothing that ends a Python string.
_NAME = re.compile(r"[\w.]*")
_HARMLESS = re.compile(r"[\w.:/$<>\[\], +-]*")
_TARGET = re.compile(
    r"torch\.ops(\.(?!__)\w+){2,}|torch\._?sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|l[te]|g[te]|eq|ne|and_|or_|xor|not_"
    r"|invert|[lr]shift|getitem)"
)
# sympify and S evaluate a string of their own.
_FUNCTION = re.compile(r"(?!S\b)[A-Z]\w*|max|min|floor|ceiling|sqrt|log|exp")
_ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Constant, ast.keyword),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)


def load_exported(path: Path, *, trusted: bool) -> torch.export.ExportedProgram:
    """The program of a ``.pt2``; unless ``trusted``, a file that holds code is refused and none of it is run.

    Raises UsageError, which says what was found and that ``--trust-source`` runs it.
    """
    if trusted:
        with _quiet():
            return torch.export.load(path)
    found = _code_in(path)
    if found:
        raise UsageError(
            f"{path} holds {found}; loading it runs code of that file. If you trust whoever made it, "
            "give --trust-source"
        )
    with _quiet(), _only_weights():
        return torch.export.load(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of an error that it then raises as well."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Have torch.load unpickle nothing but tensors and plain containers, whatever its callers ask for."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _code_in(path: Path) -> str | None:
    """Name what the file holds that is, or could be, code; None if there is nothing."""
    try:
        reader = PT2ArchiveReader(str(path))
    except RuntimeError:  # no ZIP archive that torch can read, or one of another kind
        if zipfile.is_zipfile(path) and _OLD_PROGRAM in zipfile.ZipFile(path).namelist():
            return "a format of PyTorch 2.7 or older, whose parts are pickled"
        raise UsageError(
            f"{path} is not a program torch.export.save wrote, or it is truncated or damaged"
        ) from None
    found = (_code_in_record(reader, name) for name in reader.get_file_names())
    return next(filter(None, found), None)


def _code_in_record(reader: PT2ArchiveReader, name: str) -> str | None:
    if name.startswith(layout.AOTINDUCTOR_DIR):
        return f"a compiled library ({name})"
    if name.startswith(layout.MODELS_DIR):
        return _code_in_graph(json.loads(reader.read_bytes(name)))
    if name.startswith(layout.SAMPLE_INPUTS_DIR):
        return _code_in_pickle(reader.read_bytes(name), "example inputs")
    if not name.startswith((layout.WEIGHTS_DIR, layout.CONSTANTS_DIR)):
        return None
    if name.endswith(".json"):
        return _code_in_index(reader, name)
    # The records themselves are data; a whole dictionary is how older releases stored them.
    return _code_in_pickle(reader.read_bytes(name), "weights") if name.endswith(".pt") else None


def _code_in_index(reader: PT2ArchiveReader, name: str) -> str | None:
    """Tell whether an index of weights or constants names a record that is a pickle of more than tensors."""
    for owner, entry in json.loads(reader.read_bytes(name)).get("config", {}).items():
        file = entry["path_name"]
        if file.startswith((layout.CUSTOM_OBJ_FILENAME_PREFIX, layout.OPAQUE_OBJ_FILENAME_PREFIX)):
            return f"a pickled object ({owner!r})"
        if entry["use_pickle"]:
            data = reader.read_bytes(name[: name.rindex("/") + 1] + file)
            found = _code_in_pickle(data, f"weights ({owner!r})")
            if found:
                return found
    return None


def _code_in_pickle(data: bytes, what: str) -> str | None:
    """Tell whether a pickle is more than tensors in plain containers, found out without running it."""
    if not data:
        return None
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # whatever the restricted unpickler says; what it stopped at is told apart below
        return f"pickled {what} with {_globals_of(data)}"
    return None


def _globals_of(data: bytes) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # a pickle that cannot even be taken apart
        names = []
    return f"{', '.join(sorted(names)[:3])} in it" if names else "more than tensors in it"


# The graph --------------------------------------------------------------------------------------


def _code_in_graph(value: Any, key: str = "") -> str | None:
    """Find in a graph's JSON a string that torch would evaluate or compile, and that is not plain."""
    if isinstance(value, dict):
        found = (_code_in_graph(item, name) for name, item in value.items())
    elif isinstance(value, list):
        found = (_code_in_graph(item, key) for item in value)
    else:
        return _code_in_string(value, key) if isinstance(value, str) else None
    return next(filter(None, found), None)


def _code_in_string(text: str, key: str) -> str | None:
    if key == "expr_str":
        return None if _is_arithmetic(text) else f"a size that is no arithmetic ({text[:60]!r})"
    if key == "guards_code":
        return None if _is_guard(text) else f"a guard that is no comparison of sizes ({text[:60]!r})"
    if key in ("in_spec", "out_spec"):
        return None if _is_tree(text) else f"an argument whose name is no name ({text[:60]!r})"
    if key in ("name", "as_name", "forward_arg_names"):
        return None if _NAME.fullmatch(text) else f"a name that is none ({text[:60]!r})"
    if key in ("target", "as_operator"):
        return None if _TARGET.fullmatch(text) else f"a call of {text[:60]!r}, no operation of a model"
    return None


def _is_arithmetic(text: str) -> bool:
    """Tell whether ``text`` is an expression of numbers, symbols and functions of sympy's alone."""
    return _holds_only(text, ())


def _is_guard(text: str) -> bool:
    """Tell whether ``text`` is such an expression, with ``L['x'].size()[0]`` for the symbols."""
    return _holds_only(text, (ast.Subscript, ast.Attribute, ast.Tuple))


def _holds_only(text: str, more: tuple[type[ast.AST], ...]) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(_is_plain(node, more) for node in ast.walk(tree))


def _is_plain(node: ast.AST, more: tuple[type[ast.AST], ...]) -> bool:
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or _NAME.fullmatch(node.value) is not None
    if isinstance(node, ast.Attribute):
        return bool(more) and node.attr in ("size", "stride", "storage_offset")
    if not isinstance(node, ast.Call):
        return isinstance(node, (*_ARITHMETIC, *more))
    called = node.func
    if isinstance(called, ast.Name):
        return _FUNCTION.fullmatch(called.id) is not None
    return isinstance(called, ast.Attribute)


def _is_tree(text: str) -> bool:
    """Tell whether a tree of arguments, JSON inside JSON, has no string that could end another."""
    try:
        inner = json.loads(text)
    except ValueError:
        return _HARMLESS.fullmatch(text) is not None
    return all(_is_tree(leaf) for leaf in _strings(inner))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
