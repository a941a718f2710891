"""``run-vmfb``: call a compiled program from the command line.

What the options are and what a person is told is here; how tensors are read and written is the business of
``tensor_files``, what a program is and how it is checked that of ``runtime``.  torch is imported when it is
needed, so that most mistakes answer at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from . import command
from .element_types import DTYPES
from .outputs import Outputs, check_apart

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.program import Function

PROG = "run-vmfb"

_HELP = """
An input is one of
  8x7168xbf16=rand:0     random numbers from seed 0: normal for floats, 0 to 99 for integers
  8x7168xbf16=1.5        one value everywhere (0 when no value is given)
  4xi64=1,2,3,4          every value in row-major order
  i32=7                  a scalar
  @x.npy                 the array in a NumPy file
  @x.safetensors         the only tensor of a file
  @x.safetensors:name    one of several
  NAME=INPUT             any of these for the argument NAME, as mask=4x4xi1=1 or x=@x.npy; those without a
                         name fill what is left, in order. An argument that is an int is written i64=7
and an output is one of
  -                      print it, shortened (what happens when no --output is given)
  @y.npy                 write it to a NumPy file
  @y.safetensors         write it as output_0; the only --output of a function with several
                         results receives all of them, as output_0, output_1, ...

element types: {dtypes}

exit codes: 0 done, 1 the program cannot be loaded or run, 2 usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the return value is its exit code, every failure being one message on stderr."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help or its error
        return int(stop.code or 0)
    return command.guarded(PROG, lambda: _run(options))


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
        "--graphs",
        choices=("auto", "off"),
        default="auto",
        help="on a GPU, make repeated calls one launch of a graph (default), or leave each to IREE",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="an argument; repeat in order, or name it",
    )
    parser.add_argument(
        "--output", action="append", default=[], metavar="SPEC", help="one result; repeat in order"
    )
    parser.add_argument(
        "--benchmark",
        type=_positive,
        metavar="N",
        help="time N calls after three to warm up; results are then shown only where --output asks for them",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of calls, got {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> None:
    from ..runtime import program as runtime
    from .tensor_files import check_outputs, parse_input, parse_output, read_inputs, write_results

    inputs = [parse_input(text) for text in options.input]
    sinks = [parse_output(text) for text in options.output]
    _check_files(options)
    with Outputs() as outputs:
        files = [outputs.file(sink) if sink else None for sink in sinks]
        program = runtime.load(
            options.program,
            device=options.device,
            parameters=options.parameters,
            check=options.check,
            graphs=options.graphs,
        )
        function = program[options.function]
        check_outputs(function, sinks)
        arguments = read_inputs(inputs, function)
        results = _call(function, arguments)
        if options.benchmark:
            command.write(_benchmark(function, arguments, options.benchmark))
        write_results(results, files or ([] if options.benchmark else [None]))


def _check_files(options: argparse.Namespace) -> None:
    """No --output may be a file that is read, or another --output."""
    read = {"program": options.program, "parameters": options.parameters}
    inputs = {label: Path(path) for label, path in read.items() if path}
    inputs |= {f"input {text}": path for text in options.input if (path := _file(_unnamed(text)))}
    outputs = [path for text in options.output if (path := _file(text))]
    for number, path in enumerate(outputs):
        others = {f"output {other}": other for other in outputs[:number]}
        check_apart({"--output": path}, {**inputs, **others})


def _unnamed(text: str) -> str:
    """An input without the name of its argument."""
    name, _, rest = text.partition("=")
    return rest if rest.startswith("@") and not name.startswith("@") else text


def _file(spec: str) -> Path | None:
    if not spec.startswith("@"):
        return None
    path, _, name = spec[1:].rpartition(".safetensors:")
    return Path(f"{path}.safetensors") if name and path else Path(spec[1:])


def _call(function: Function, arguments: Sequence[Any]) -> list[Tensor]:
    try:
        return function.run(*arguments)
    except RunError as error:
        if error.__cause__ is None or not command.is_out_of_memory(error.__cause__):
            raise
        raise RunError(f"{function.name} failed: there is not enough memory on {function.device}") from error


# --- benchmark ---------------------------------------------------------------------------------


def _benchmark(function: Function, arguments: Sequence[Any], calls: int) -> str:
    """Times of whole calls, from torch tensors to finished results.

    One has been made.  The second is the one that a graph is made of, and the third makes it ready.
    """
    for _ in range(2):
        _call(function, arguments)
    times = []
    for _ in range(calls):
        function.wait()
        begin = time.perf_counter()
        _call(function, arguments)
        function.wait()
        times.append(time.perf_counter() - begin)
    median, least, mean = statistics.median(times), min(times), statistics.fmean(times)
    plural = "" if calls == 1 else "s"
    graph = "" if function.device.type == "cpu" else f"; {function.explain_call(*arguments)}"
    return (
        f"{function.name}: {calls} call{plural}, median {_duration(median)}, "
        f"min {_duration(least)}, mean {_duration(mean)}{graph}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


if __name__ == "__main__":
    sys.exit(main())
