"""Read and show tensors as ``run-vmfb`` is given them: literals, NumPy files and safetensors files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RunError, UsageError
from ..signature import Integer
from .command import write
from .element_types import DTYPES
from .outputs import Output, writing

if TYPE_CHECKING:
    from ..runtime.arguments import Argument
    from ..runtime.program import Function
    from ..signature import TensorSpec

_SHORT_NAMES = {getattr(torch, name): short for short, name in DTYPES.items()}
_SEEDS = 1 << 64

# --- inputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Literal:
    """``8x7168xbf16=rand:0``."""

    text: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: str


@dataclass(frozen=True)
class _File:
    """``@x.npy`` or ``@x.safetensors:name``."""

    text: str
    path: Path
    name: str | None


_Source = _Literal | _File


def parse_input(text: str) -> tuple[str | None, _Source]:
    """Read what an --input says, and the name of the argument it is for, if it says that.

    A name stands before an input that is complete without it: ``mask=4xi1=1``, ``x=@x.npy``.
    Raises UsageError if it says nothing.
    """
    name, equals, rest = text.partition("=")
    if not text.startswith("@") and equals and (rest.startswith("@") or _is_kind(rest.partition("=")[0])):
        return name, _parse(rest)
    return None, _parse(text)


def _is_kind(text: str) -> bool:
    *sizes, element = text.split("x")
    return element in DTYPES and all(size.isdecimal() for size in sizes)


def _parse(text: str) -> _Source:
    if text.startswith("@"):
        return _parse_file(text)
    kind, _, value = text.partition("=")
    *sizes, element = kind.split("x")
    if element not in DTYPES:
        raise UsageError(f"--input {text}: unknown element type {element!r}; known: {' '.join(DTYPES)}")
    if not all(size.isdecimal() for size in sizes):
        raise UsageError(f"--input {text}: expected sizes and an element type, such as 8x7168xbf16")
    shape, dtype = tuple(int(size) for size in sizes), getattr(torch, DTYPES[element])
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 1 << 63:
        raise UsageError(f"--input {text}: no machine has memory for a tensor of this size")
    return _Literal(text, shape, dtype, value)


def _parse_file(text: str) -> _File:
    name, path = None, text[1:]
    if ".safetensors:" in path:
        path, _, name = path.rpartition(":")
    if Path(path).suffix not in (".npy", ".safetensors"):
        raise UsageError(f"--input {text}: expected @FILE.npy or @FILE.safetensors[:NAME]")
    if not Path(path).is_file():
        raise UsageError(f"--input {text}: there is no file {path}")
    return _File(text, Path(path), name)


def read_inputs(inputs: Sequence[tuple[str | None, _Source]], function: Function) -> list[Any]:
    """The arguments, tensors on the function's device; those without a name fill what is left, in order.

    Raises RunError if there are too many or few, for a name it does not have, or no memory for one.
    """
    specs = function.passed_inputs
    if specs is None:
        named = next((name for name, _ in inputs if name is not None), None)
        if named is not None:
            raise RunError(f"{function.name} does not name its arguments, {named!r} among them")
        return [_read(source, None).to(function.device) for _, source in inputs]
    wanted = f"{function.name} takes {len(specs)} inputs ({'; '.join(f'{s.name}: {s}' for s in specs)})"
    if len(specs) != len(inputs):
        raise RunError(f"{wanted}, got {len(inputs)}")
    given: dict[str, _Source] = {}
    for name, source in inputs:
        if name is not None and (name in given or name not in {spec.name for spec in specs}):
            raise RunError(f"{wanted}, got {name!r}" + (" twice" if name in given else ""))
        if name is not None:
            given[name] = source
    rest = iter([source for name, source in inputs if name is None])
    return [_argument(given.get(spec.name) or next(rest), spec, function) for spec in specs]


def _argument(source: _Source, spec: Argument, function: Function) -> Any:
    if isinstance(spec, Integer):
        tensor = _read(source, None)
        if tensor.dim() or tensor.is_floating_point() or tensor.is_complex():
            raise UsageError(f"--input {source.text}: {spec.name} is an int, such as i64=7")
        return int(tensor)
    return _read(source, spec).to(function.device)


def _read(source: _Source, spec: TensorSpec | None) -> Tensor:
    if isinstance(source, _Literal):
        try:
            return _literal(source)
        except (MemoryError, RuntimeError) as error:  # torch's allocator raises the latter
            raise RunError(f"--input {source.text}: there is not enough memory for it") from error
    try:
        if source.path.suffix == ".npy":
            return _read_npy(source.path, spec)
        return _read_safetensors(source.path, source.name)
    except UsageError:
        raise
    except MemoryError as error:
        raise RunError(f"{source.path}: there is not enough memory for it") from error
    except Exception as error:  # whatever the file's library says about a damaged file
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{source.path} cannot be read: {words}") from error


def _literal(source: _Literal) -> Tensor:
    if source.value.startswith("rand"):
        return _random(source)
    try:
        values = [_number(word, source.dtype) for word in (source.value or "0").split(",")]
    except ValueError:
        raise UsageError(
            f"--input {source.text}: expected rand:SEED or values, got {source.value!r}"
        ) from None
    count = torch.Size(source.shape).numel()
    if len(values) not in (1, count):
        raise UsageError(f"--input {source.text}: expected 1 or {count} values, got {len(values)}")
    return (
        torch.tensor(values, dtype=_wide(source.dtype)).expand(count).reshape(source.shape).to(source.dtype)
    )


def _random(source: _Literal) -> Tensor:
    seed = source.value.removeprefix("rand").removeprefix(":") or "0"
    if not seed.isdecimal():
        raise UsageError(f"--input {source.text}: expected rand:SEED, got {source.value!r}")
    if int(seed) >= _SEEDS:
        raise UsageError(f"--input {source.text}: a seed is less than 2^64")
    generator = torch.Generator().manual_seed(int(seed))
    if source.dtype.is_floating_point:
        return torch.randn(source.shape, generator=generator).to(source.dtype)
    upper = 2 if source.dtype is torch.bool else 100
    return torch.randint(upper, source.shape, generator=generator).to(source.dtype)


def _number(word: str, dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point:
        return float(word)
    value = {"true": 1, "false": 0}[word.lower()] if word.lower() in ("true", "false") else int(word)
    limits = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not limits[0] <= value <= limits[1]:
        raise ValueError(word)
    return value


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype that torch.tensor() takes values of ``dtype`` in."""
    return torch.float64 if dtype.is_floating_point else torch.int64


def _read_npy(path: Path, spec: TensorSpec | None) -> Tensor:
    import numpy as np

    array = np.load(path, allow_pickle=False)
    if array.dtype.kind != "V" or spec is None:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    # NumPy files have no name for bfloat16 and fp8: they come back as raw bytes, typed by the program.
    dtype = getattr(torch, spec.dtype)
    if dtype.itemsize != array.dtype.itemsize:
        raise UsageError(
            f"{path}: its elements have {array.dtype.itemsize} bytes, {spec.name} is {spec.dtype}"
        )
    raw = np.ascontiguousarray(array).reshape(-1).view(f"i{array.dtype.itemsize}")
    return torch.from_numpy(raw).view(dtype).reshape(array.shape)


def _read_safetensors(path: Path, name: str | None) -> Tensor:
    with _safetensors().safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if name is None and len(names) == 1:
            name = names[0]
        if name is None:
            raise UsageError(
                f"{path} holds {len(names)} tensors: say which as @{path}:NAME ({', '.join(names)})"
            )
        if name not in names:
            raise UsageError(f"{path} has no tensor {name!r}; it has {', '.join(names)}")
        return file.get_tensor(name)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise UsageError("reading and writing .safetensors files needs: pip install safetensors") from None
    return safetensors


# --- outputs -----------------------------------------------------------------------------------


def parse_output(text: str) -> Path | None:
    """A path, or None for ``-``; UsageError unless it is of a kind that can be written."""
    if text == "-":
        return None
    path = Path(text[1:])
    if not text.startswith("@") or path.suffix not in (".npy", ".safetensors"):
        raise UsageError(f"--output {text}: expected -, @FILE.npy or @FILE.safetensors")
    if path.suffix == ".safetensors":
        _safetensors()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {text}: {path} cannot be written")
    return path


def check_outputs(function: Function, sinks: Sequence[Path | None]) -> None:
    """Before the call, which may take long: enough results for the outputs, and room for all of them."""
    specs = function.tensor_outputs
    if specs is None:
        return
    if len(sinks) > len(specs):
        raise UsageError(f"{function.name} returns {len(specs)} tensors, {len(sinks)} --output options given")
    only = sinks[0] if len(sinks) == 1 else None
    if only and len(specs) > 1 and only.suffix == ".npy":
        raise UsageError(f"{function.name} returns {len(specs)} tensors, {only} holds one; use .safetensors")


def write_results(results: Sequence[Tensor], sinks: Sequence[Output | None]) -> None:
    """Write results to their outputs, None being standard output; results without one are dropped."""
    named = [(f"output_{i}", result) for i, result in enumerate(results)]
    if len(sinks) == 1:
        _write_to(sinks[0], named)
        return
    for sink, item in zip(sinks, named, strict=False):
        _write_to(sink, [item])


def _write_to(sink: Output | None, named: Sequence[tuple[str, Tensor]]) -> None:
    if sink is None:
        for name, tensor in named:
            write(f"{name}: {_kind(tensor)}\n{_shown(tensor)}")
        return
    with writing(sink.path):
        if sink.path.suffix == ".npy":
            _save_npy(sink.temporary, named[0][1])
        else:
            _save_safetensors(sink.temporary, {name: tensor.cpu().contiguous() for name, tensor in named})
    sink.commit()


def _kind(tensor: Tensor) -> str:
    return "x".join(
        (*(str(size) for size in tensor.shape), _SHORT_NAMES.get(tensor.dtype, str(tensor.dtype)))
    )


def _shown(tensor: Tensor) -> str:
    """The values, long dimensions shortened."""
    exact = tensor.dtype in (torch.float64, torch.float32) or not tensor.dtype.is_floating_point
    text = str(tensor.cpu() if exact else tensor.cpu().float())
    return text.removeprefix("tensor(").removesuffix(")").replace("\n       ", "\n")


def _save_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    library = _safetensors()
    try:
        # Results may be one tensor, or share memory, which the format has no form for.
        library.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    except library.SafetensorError as error:  # its own word for a disk that is full
        raise OSError(str(error)) from error


def _save_npy(path: Path, tensor: Tensor) -> None:
    import numpy as np

    plain = tensor.cpu().contiguous()
    if plain.dtype is torch.bfloat16 or (plain.is_floating_point() and plain.dtype.itemsize == 1):
        bytes_ = plain.reshape(-1).view(torch.uint8).numpy()
        array = bytes_.view(f"V{plain.dtype.itemsize}").reshape(tuple(plain.shape))
    else:
        array = plain.numpy()
    with path.open("wb") as file:
        np.save(file, array)
