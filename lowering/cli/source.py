"""Find the model a command line names: SOURCE becomes a module with arguments, or MLIR text.

Everything that can be wrong with a source is a UsageError that says what was found and what was
expected; a failure inside the user's own code is shown with the line it came from.  Nothing here
exports or compiles.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

FORMS = (
    "file.py:callable, package.module:callable, model.pt2, hf:FOLDER, model.mlir "
    "or - (MLIR text on standard input)"
)
_FOLDER = "hf:"
_RETURNS = (
    "(module, args), (module, args, dynamic_shapes) or (module, args, kwargs, dynamic_shapes), or a dict "
    "of these by the names of functions"
)


@dataclass(frozen=True)
class Model:
    """A PyTorch model to compile: ``module`` is an nn.Module or an ExportedProgram."""

    module: torch.nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...]
    dynamic_shapes: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def eager(self) -> torch.nn.Module:
        """The model as something PyTorch can run."""
        import torch

        if isinstance(self.module, torch.export.ExportedProgram):
            return self.module.module()
        return self.module


@dataclass(frozen=True)
class Models:
    """Several models to compile, as functions of one program, by name."""

    functions: dict[str, Model]


@dataclass(frozen=True)
class MlirText:
    """A program that is MLIR already (torch dialect); there is no eager model to compare it with."""

    text: str


def check_form(source: str) -> None:
    """Refuse what cannot be a source by its name alone: cheap, and before anything is imported."""
    if source == "-":
        return
    if source.startswith(_FOLDER):
        _check_folder(Path(source.removeprefix(_FOLDER)))
        return
    path = Path(source)
    if path.suffix in (".pt2", ".mlir"):
        if not path.is_file():
            raise UsageError(f"{source}: no such file")
        return
    where, colon, name = source.rpartition(":")
    if not colon and (path.suffix == ".py" or path.is_file()):
        raise UsageError(_missing_callable(path))
    if not colon:
        raise UsageError(f"{source!r} is not a source; give {FORMS}")
    if not where or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{source!r} names no callable after the colon; give {FORMS}")
    if where.endswith(".py") and not Path(where).is_file():
        raise UsageError(f"{where}: no such file")


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is no folder"
        raise UsageError(
            f"{path} {what}; hf: takes a checkpoint's folder on this machine, with config.json and "
            "safetensors (nothing is downloaded)"
        )


def source_file(source: str) -> Path | None:
    """The file that ``source`` is read from; of a module, once that has been imported."""
    if source == "-":
        return None
    if source.startswith(_FOLDER):
        return Path(source.removeprefix(_FOLDER)) / "config.json"
    where, colon, _ = source.rpartition(":")
    if not colon or source.endswith((".pt2", ".mlir")):
        return Path(source)
    if where.endswith(".py"):
        return Path(where)
    file = getattr(sys.modules.get(where), "__file__", None)
    return Path(file) if file else None


def resolve(
    source: str,
    stdin: IO[str] | None = None,
    *,
    trusted: bool = False,
    decoder: Mapping[str, int] | None = None,
) -> Model | Models | MlirText:
    """The models or MLIR text that ``source`` names.

    trusted: code inside a .pt2 may be run.  decoder: the sizes of a checkpoint's functions with a cache, as
    ``export_decoder`` takes them.
    """
    check_form(source)
    if decoder is not None:
        return _decoder(source, decoder)
    if source == "-":
        return _mlir(_read_stream(stdin or sys.stdin), "standard input")
    path = Path(source)
    if path.suffix == ".mlir":
        return _mlir(_read(path), source)
    if source.startswith(_FOLDER):
        from ..checkpoints.causal_lm import causal_lm

        return Model(*causal_lm(source.removeprefix(_FOLDER)))
    importlib.import_module("lowering.ops")  # models call torch.ops.lowering.*, saved ones too
    if path.suffix == ".pt2":
        return _exported(path, trusted)
    where, _, name = source.rpartition(":")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    return _call(_lookup(module, name, where), source, module)


def check_decoder(source: str) -> None:
    """Refuse to make functions with a cache of what is no checkpoint."""
    if not source.startswith(_FOLDER):
        raise UsageError(
            f"--decoder makes functions of a checkpoint, hf:FOLDER, not of {source!r}; a Python source "
            "returns them itself: lowering.export_decoder(model, capacity=...)"
        )


def _decoder(source: str, sizes: Mapping[str, int]) -> Models:
    from ..checkpoints.causal_lm import decoder

    functions = decoder(source.removeprefix(_FOLDER), **sizes)
    return Models({name: Model(*each) for name, each in functions.items()})


# MLIR and .pt2 ----------------------------------------------------------------------------------


def _read_stream(stream: IO[str] | None) -> str:
    if stream is None:
        raise UsageError("there is no standard input to read MLIR text from")
    try:
        text = stream.read()
        text.encode()  # where the locale is C, Python lets bytes through that are no text
        return text
    except UnicodeError:
        raise UsageError("standard input is not MLIR text (MLIR bytecode is not read)") from None
    except OSError as error:
        raise UsageError(f"cannot read standard input: {error.strerror or error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not MLIR text (MLIR bytecode is not read)") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _mlir(text: str, where: str) -> MlirText:
    if not text.strip():
        raise UsageError(f"{where} is empty; expected MLIR text")
    return MlirText(text)


def _exported(path: Path, trusted: bool) -> Model:
    from ..importing.pt2 import load_exported

    try:
        program = load_exported(path, trusted=trusted)
    except UsageError:
        raise
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"{path} is not a program torch.export.save wrote: {type(error).__name__}: {words}"
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    return Model(program, tuple(args), kwargs=dict(kwargs))


# Python -----------------------------------------------------------------------------------------


def _missing_callable(path: Path) -> str:
    """Say what to type instead of a bare file name, with the file's own functions as candidates."""
    names = _functions(path)
    hint = f" (it defines {', '.join(names[:6])}{', ...' if len(names) > 6 else ''})" if names else ""
    if not path.is_file():
        return f"{path}: no such file (and a Python source is written {path}:callable)"
    return f"{path} needs the name of a callable, as in {path}:{names[0] if names else 'callable'}{hint}"


def _functions(path: Path) -> list[str]:
    """The public top-level functions of a Python file, without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def _import_file(path: Path) -> ModuleType:
    """Import ``path`` as ``python path`` would find its neighbours, under a name nothing else has."""
    path = path.resolve()
    _put_first(path.parent)
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_source_{id(path):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{path.name} does not import: {_describe(error, path)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    _put_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            looked = "looked in the current directory and on sys.path"
            raise UsageError(f"no module named {error.name!r} ({looked})") from None
        raise UsageError(f"module {name} does not import: {_describe(error)}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"module {name} does not import: {_describe(error)}") from error


def _put_first(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _lookup(module: ModuleType, name: str, where: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(module).items() if _is_candidate(v, module)]
            hint = f"; it defines {', '.join(names[:6])}" if names else ""
            raise UsageError(f"{where} has no {name!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{where}:{name} is {_a(found)}, not a callable that returns {_RETURNS}")
    return found


def _is_candidate(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _call(function: Callable[[], Any], source: str, module: ModuleType) -> Model | Models:
    file = Path(module.__file__) if module.__file__ else None
    try:
        returned = function()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{source} raised {_describe(error, file)}") from error
    if isinstance(returned, dict) and returned:
        return Models({name: _checked(each, f"{source}, of {name}, ") for name, each in returned.items()})
    return _checked(returned, source)


def _checked(returned: Any, source: str) -> Model:
    import torch

    expected = f"expected {_RETURNS}"
    if not isinstance(returned, tuple) or len(returned) not in (2, 3, 4):
        raise UsageError(f"{source} returned {_a(returned)}; {expected}")
    module, args, *between, shapes = returned if len(returned) > 2 else (*returned, None)
    kwargs = between[0] if between else None
    if not isinstance(module, (torch.nn.Module, torch.export.ExportedProgram)):
        raise UsageError(f"{source} returned {_a(module)} first; {expected}, with a torch.nn.Module first")
    if isinstance(args, torch.Tensor):
        raise UsageError(f"{source} returned a bare tensor as args; write a tuple: (module, (x,))")
    if not isinstance(args, (tuple, list)):
        raise UsageError(f"{source} returned {_a(args)} as args; {expected}, where args is a tuple")
    if not isinstance(kwargs, (dict, type(None))) or not all(isinstance(name, str) for name in kwargs or ()):
        raise UsageError(f"{source} returned {_a(kwargs)} as kwargs; expected a dict of arguments by name")
    if not isinstance(shapes, (dict, tuple, list, type(None))):
        raise UsageError(f"{source} returned {_a(shapes)} as dynamic_shapes; expected a dict or a tuple")
    return Model(module, tuple(args), shapes, kwargs or {})


# Words ------------------------------------------------------------------------------------------


def _a(value: Any) -> str:
    """A value as a person would name it: its kind, and for tuples what is inside."""
    if value is None:
        return "None"
    if isinstance(value, tuple):
        inside = ", ".join(type(item).__name__ for item in value[:5]) + (", ..." if len(value) > 5 else "")
        return f"a tuple of {len(value)} ({inside})"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _is_machinery(filename: str) -> bool:
    return "importlib" in filename or filename == __file__


def _describe(error: BaseException, file: Path | None = None) -> str:
    """``Kind: message (file:line)``, the line being the deepest one inside ``file``, else the deepest."""
    words = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({_near(error.filename)}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    inside = [f for f in frames if file is not None and Path(f.filename) == file] or frames
    return f"{text} ({_near(inside[-1].filename)}:{inside[-1].lineno})" if inside else text


def _near(filename: str) -> str:
    """A path as it is seen from the current directory, if it is below it."""
    with contextlib.suppress(ValueError):
        return str(Path(filename).relative_to(Path.cwd()))
    return filename
