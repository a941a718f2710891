"""Runs single steps of the compiler on torch-dialect MLIR and prints what they leave.

    python -m tools.opt model.mlir --steps normalize,raise --report
    python -m tools.opt - --steps normalize,raise,sink,fuse,layout,dispatch --target sm_90 < model.mlir

The steps are those of the README, in the order given; every function with a body is taken by
itself, with a ledger of its own, so one file can hold many small cases.  With ``--report`` each
function is followed by its sites and what became of them, as comments.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from iree.compiler import ir

from lowering.errors import LoweringError
from lowering.passes import verify
from lowering.steps import BY_NAME, State, run
from lowering.targets import Target, resolve
from patterns.sites import NOT_REACHED, Ledger, SiteRecord

# A kernel is machine code; a few bytes of it are enough to look at.
_LONGEST_ELEMENTS = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(transform(_read(options.file), options.steps, resolve(options.target), report=options.report))
    except (LoweringError, OSError, ir.MLIRError) as error:
        print(f"opt.py: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def transform(text: str, steps: Sequence[str], target: Target, *, report: bool = False) -> str:
    """The MLIR ``steps`` make of ``text``; ``report`` adds each function's sites behind it."""
    with ir.Context(), ir.Location.unknown(), tempfile.TemporaryDirectory() as directory:
        module = ir.Module.parse(text)
        ledgers = {}
        for function in _functions(module):
            ledger = ledgers[_name(function)] = Ledger()
            state = State(module, function, target, ledger, Path(directory))
            run([BY_NAME[step] for step in steps], state, verified=True)
        verify.verify(module, "print")
        printed = []
        for op in module.body.operations:
            printed.append(op.operation.get_asm(use_local_scope=True, large_elements_limit=_LONGEST_ELEMENTS))
            if report and op.operation.name == "func.func" and _name(op.operation) in ledgers:
                records = ledgers[_name(op.operation)].records
                printed += [f"// site {number}: {describe(record)}" for number, record in enumerate(records)]
                printed += [f"// {r.op}: {r.text}" for r in ledgers[_name(op.operation)].remarks]
        return "\n".join(printed)


def describe(record: SiteRecord) -> str:
    """One line of the ledger."""
    site = f"{record.op} at line {record.location.rpartition(':')[2]}"
    if record.fused:
        return f"{site} fused as {record.pattern}" + (f" in {record.kernel}" if record.kernel else "")
    return f"{site} open" if record.reason == NOT_REACHED else f"{site} unfused: {record.reason}"


def _functions(module: ir.Module) -> list[ir.Operation]:
    """The functions the file holds, before any step adds its own."""
    functions = [op.operation for op in module.body.operations if op.operation.name == "func.func"]
    return [function for function in functions if len(function.regions[0].blocks)]


def _name(function: ir.Operation) -> str:
    return ir.StringAttr(function.attributes["sym_name"]).value


def _read(file: str) -> str:
    return sys.stdin.read() if file == "-" else Path(file).read_text()


def _steps(text: str) -> list[str]:
    steps = [name for name in text.split(",") if name]
    for name in steps:
        if name not in BY_NAME:
            raise argparse.ArgumentTypeError(f"unknown step {name!r}; the steps are {', '.join(BY_NAME)}")
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opt.py",
        description="Run single steps of the compiler on torch-dialect MLIR and print the result.",
    )
    parser.add_argument("file", nargs="?", default="-", help="MLIR text; - or nothing: standard input")
    parser.add_argument(
        "--steps",
        type=_steps,
        default=[],
        metavar="NAMES",
        help=f"any of {','.join(BY_NAME)}, in the order to run them",
    )
    parser.add_argument(
        "--target", default="cpu", help="whose kernels fuse and dispatch ask for (default: cpu)"
    )
    parser.add_argument(
        "--report", action="store_true", help="print each function's sites behind it, as comments"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
