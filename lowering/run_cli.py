"""``run-vmfb``: call a compiled program from the command line.

Reads what the options say, calls the runtime, writes what comes back; what a program is and how it
is checked is ``lowering.runtime``'s business.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import LoweringError, RunError, UsageError

if TYPE_CHECKING:
    from .runtime import Function
    from .signature import TensorSpec

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E4M3FNUZ": torch.float8_e4m3fnuz,
    "f8E5M2": torch.float8_e5m2,
    "f8E5M2FNUZ": torch.float8_e5m2fnuz,
    "f8E8M0FNU": torch.float8_e8m0fnu,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "ui8": torch.uint8,
    "i1": torch.bool,
}
_SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HELP = """
An input is one of
  8x7168xbf16=rand:0     random numbers from seed 0: normal for floats, 0 to 99 for integers
  8x7168xbf16=1.5        one value everywhere (0 when no value is given)
  4xi64=1,2,3,4          every value in row-major order
  i32=7                  a scalar
  @x.npy                 the array in a NumPy file
  @x.safetensors         the only tensor of a file
  @x.safetensors:name    one of several
and an output is one of
  -                      print it, shortened (what happens when no --output is given)
  @y.npy                 write it to a NumPy file
  @y.safetensors         write it as output_0; the only --output of a function with several
                         results receives all of them, as output_0, output_1, ...

element types: {dtypes}

exit codes: 0 done, 1 the program cannot be loaded or run, 2 usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns the exit code, with every expected failure as one line on stderr."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        _run(options)
    except LoweringError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run-vmfb",
        description="Run a function of a compiled program on inputs from the command line.",
        epilog=_HELP.format(dtypes=" ".join(DTYPES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", metavar="OUT.vmfb", help="a program made by compile-to-vmfb")
    parser.add_argument(
        "--device", metavar="cpu|cuda|hip", help="where to run (default: what it was compiled for)"
    )
    parser.add_argument("--function", default="main", metavar="NAME", help="function to call (default: main)")
    parser.add_argument("--parameters", metavar="F.irpa", help="the weights, if they were kept outside")
    parser.add_argument(
        "--check",
        choices=("whole", "headers"),
        default="whole",
        help="compare checksums of all weights before running (default), or leave large ones unread",
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="SPEC", help="one argument; repeat in order"
    )
    parser.add_argument(
        "--output", action="append", default=[], metavar="SPEC", help="one result; repeat in order"
    )
    parser.add_argument(
        "--benchmark",
        type=_positive,
        metavar="N",
        help="time N calls after one to warm up; results are then shown only where --output asks for them",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of calls, got {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> None:
    from . import runtime

    inputs = [_parse_input(text) for text in options.input]
    sinks = [_parse_output(text) for text in options.output]
    program = runtime.load(
        options.program, device=options.device, parameters=options.parameters, check=options.check
    )
    function = program[options.function]
    _check_outputs(function, sinks)
    tensors = [_read(source, spec).to(function.device) for source, spec in _with_specs(inputs, function)]
    results = function.run(*tensors)
    if options.benchmark:
        print(_benchmark(function, tensors, options.benchmark))
    elif not sinks:
        sinks = ["-"]
    _write(results, sinks)


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

    path: Path
    name: str | None


def _parse_input(text: str) -> _Literal | _File:
    if text.startswith("@"):
        return _parse_file(text)
    kind, _, value = text.partition("=")
    *sizes, element = kind.split("x")
    if element not in DTYPES:
        raise UsageError(f"--input {text}: unknown element type {element!r}; known: {' '.join(DTYPES)}")
    if not all(size.isdecimal() for size in sizes):
        raise UsageError(f"--input {text}: expected sizes and an element type, such as 8x7168xbf16")
    return _Literal(text, tuple(int(size) for size in sizes), DTYPES[element], value)


def _parse_file(text: str) -> _File:
    name, path = None, text[1:]
    if ".safetensors:" in path:
        path, _, name = path.rpartition(":")
    if Path(path).suffix not in (".npy", ".safetensors"):
        raise UsageError(f"--input {text}: expected @FILE.npy or @FILE.safetensors[:NAME]")
    if not Path(path).is_file():
        raise UsageError(f"--input {text}: there is no file {path}")
    return _File(Path(path), name)


def _with_specs(
    inputs: Sequence[_Literal | _File], function: Function
) -> list[tuple[_Literal | _File, TensorSpec | None]]:
    """Each input with what the function says about it; RunError if there are too many or too few."""
    specs = function.tensor_inputs
    if specs is None:
        return [(source, None) for source in inputs]
    if len(specs) != len(inputs):
        wanted = "; ".join(f"{spec.name}: {spec}" for spec in specs)
        raise RunError(f"{function.name} takes {len(specs)} inputs ({wanted}), got {len(inputs)}")
    return list(zip(inputs, specs, strict=True))


def _read(source: _Literal | _File, spec: TensorSpec | None) -> Tensor:
    if isinstance(source, _Literal):
        return _literal(source)
    try:
        if source.path.suffix == ".npy":
            return _read_npy(source.path, spec)
        return _read_safetensors(source.path, source.name)
    except UsageError:
        raise
    except Exception as error:  # whatever the file's library says about a damaged file
        raise UsageError(f"{source.path} cannot be read: {error}") from error


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


def _parse_output(text: str) -> str:
    """'-' or a path; UsageError unless it can be written."""
    if text == "-":
        return text
    path = Path(text[1:])
    if not text.startswith("@") or path.suffix not in (".npy", ".safetensors"):
        raise UsageError(f"--output {text}: expected -, @FILE.npy or @FILE.safetensors")
    if path.suffix == ".safetensors":
        _safetensors()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {text}: {path} cannot be written")
    return str(path)


def _check_outputs(function: Function, sinks: Sequence[str]) -> None:
    """Before the call, which may take long: enough results for the outputs, and room for all of them."""
    specs = function.tensor_outputs
    if specs is None:
        return
    if len(sinks) > len(specs):
        raise UsageError(f"{function.name} returns {len(specs)} tensors, {len(sinks)} --output options given")
    if len(sinks) == 1 and len(specs) > 1 and sinks[0].endswith(".npy"):
        raise UsageError(
            f"{function.name} returns {len(specs)} tensors, {sinks[0]} holds one; use .safetensors"
        )


def _write(results: Sequence[Tensor], sinks: Sequence[str]) -> None:
    named = [(f"output_{i}", result) for i, result in enumerate(results)]
    if len(sinks) == 1:
        _write_to(sinks[0], named)
        return
    # Results without an --output of their own are dropped.
    for sink, item in zip(sinks, named, strict=False):
        _write_to(sink, [item])


def _write_to(sink: str, named: Sequence[tuple[str, Tensor]]) -> None:
    if sink == "-":
        for name, tensor in named:
            print(f"{name}: {_kind(tensor)}\n{_shown(tensor)}")
    elif sink.endswith(".npy"):
        _replace(Path(sink), lambda path: _save_npy(path, named[0][1]))
    else:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in named}
        _replace(Path(sink), lambda path: _safetensors().torch.save_file(tensors, path))


def _kind(tensor: Tensor) -> str:
    return "x".join(
        (*(str(size) for size in tensor.shape), _SHORT_NAMES.get(tensor.dtype, str(tensor.dtype)))
    )


def _shown(tensor: Tensor) -> str:
    """The values, long dimensions shortened."""
    exact = tensor.dtype in (torch.float64, torch.float32) or not tensor.dtype.is_floating_point
    text = str(tensor.cpu() if exact else tensor.cpu().float())
    return text.removeprefix("tensor(").removesuffix(")").replace("\n       ", "\n")


def _save_npy(path: Path, tensor: Tensor) -> None:
    import numpy as np

    plain = tensor.cpu().contiguous()
    if plain.dtype in (
        torch.bfloat16,
        *(d for d in DTYPES.values() if d.is_floating_point and d.itemsize == 1),
    ):
        bytes_ = plain.reshape(-1).view(torch.uint8).numpy()
        array = bytes_.view(f"V{plain.dtype.itemsize}").reshape(tuple(plain.shape))
    else:
        array = plain.numpy()
    with path.open("wb") as file:
        np.save(file, array)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: never half a file."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


# --- benchmark ---------------------------------------------------------------------------------


def _benchmark(function: Function, tensors: Sequence[Tensor], calls: int) -> str:
    """Times of whole calls, from torch tensors to finished results."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function.run(*tensors)
        times.append(time.perf_counter() - begin)
    median, least, mean = statistics.median(times), min(times), statistics.fmean(times)
    plural = "" if calls == 1 else "s"
    return (
        f"{function.name}: {calls} call{plural}, median {_duration(median)}, "
        f"min {_duration(least)}, mean {_duration(mean)}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


if __name__ == "__main__":
    sys.exit(main())
