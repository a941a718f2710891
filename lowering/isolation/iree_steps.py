"""Run IREE's steps, each in a process of its own, and say what there is to say when one fails.

A failure is a CompileError that names the step, the model's line where it is known, and what to do.  Where
the phases are dumped it comes with the IR that makes IREE fail and the command that shows it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iree.compiler import ir

from patterns import torch_ir

from ..errors import CompileError
from . import process as isolation

_TORCH_TO_IREE = "builtin.module(torch-to-iree)"
_DEBUG = "LOWERING_DEBUG"
# Session flags that every program is compiled with: its IR is IREE's own by then.
_INPUT = "--iree-input-type=none"
_FAILS = "it fails on {}; write that with other operations"
_NOT_LOWERED = "nothing lowers {}; write it with operations that IREE knows"
# What is left where no pattern took the operation that reads it.
_CONSTANT = "nothing lowers torch.constant."


@dataclass(frozen=True)
class Step:
    """Hold the words for a step that fails: its name if it died, or what a program that it rejects does."""

    name: str
    rejected: str


LOWER = Step("torch-mlir (torch-to-iree)", "the model uses an operation that cannot be lowered")
COMPILE = Step("IREE's compiler", "IREE could not compile the program")


class TimedOut(CompileError):
    """A step that took more time than it may."""


class Unplaced(CompileError):
    """A failure of which it is not known which operation of the model it is about."""

    def __init__(self, step: Step, summary: str, message: str, rest: Sequence[str]):
        self.step, self._summary, self._message, self._rest = step, summary, message, rest
        lines = [summary] if message == _FAILS else [f"{summary}:", message]
        super().__init__("\n  ".join([*lines, *rest]))

    def placed(self, op: ir.Operation) -> CompileError:
        """The same error about ``op``."""
        message = self._message
        if message == _FAILS or _CONSTANT in message:
            name = ir.StringAttr(op.attributes["name"]).value if op.name == "torch.operator" else op.name
            message = (_FAILS if message == _FAILS else _NOT_LOWERED).format(name)
        lines = [f"{self._summary}:", f"{torch_ir.location(op)}: {message}", *self._rest]
        return CompileError("\n  ".join(lines))


class Iree:
    """IREE's two steps.  reproducers: the directory for the IR of a failure, if any is wanted."""

    def __init__(self, reproducers: Path | None = None):
        self._reproducers = reproducers
        isolation.start()

    def lower(self, module: ir.Module) -> ir.Module:
        """Lower the torch dialect's operations to IREE's own; returns a new module in the same context."""
        try:
            return isolation.run_passes(module, _TORCH_TO_IREE)
        except isolation.Failed as failed:
            command = ("iree-opt", f"--pass-pipeline={_TORCH_TO_IREE}")
            raise _error(LOWER, failed, self._rest(module, failed, command)) from None

    def compile(self, module: ir.Module, flags: Sequence[str]) -> bytes:
        """Compile the program to a vmfb."""
        return self._compile(module, flags, streams=False)[0]

    def compile_and_look(self, module: ir.Module, flags: Sequence[str]) -> tuple[bytes, ir.Module]:
        """The same, and the program in IREE's stream dialect, in the same context."""
        vmfb, streams = self._compile(module, flags, streams=True)
        assert streams is not None
        return vmfb, streams

    def _compile(
        self, module: ir.Module, flags: Sequence[str], *, streams: bool
    ) -> tuple[bytes, ir.Module | None]:
        flags = (_INPUT, *flags)
        try:
            return isolation.compile_module(module, flags, streams=streams)
        except isolation.Failed as failed:
            # The archive is temporary, and IREE fails without it just as well.
            kept = [flag for flag in flags if not flag.startswith("--iree-parameter-import")]
            command = ("iree-compile", *kept, "-o", os.devnull)
            raise _error(COMPILE, failed, self._rest(module, failed, command)) from None

    def _rest(self, module: ir.Module, failed: isolation.Failed, command: Sequence[str]) -> list[str]:
        """Say how to see the failure again, and all that the compiler wrote where that is wanted."""
        rest = []
        if self._reproducers is not None:
            rest = [f"reproduce it with: {shlex.join([*command, str(self._reproduce(module))])}"]
        elif failed.cause is not None:
            rest = ["--dump-phases-to (dump_phases_to=) writes what makes it fail, for a report to IREE"]
        if os.environ.get(_DEBUG) and failed.output.strip():
            rest.append(failed.output.strip())
        return rest

    def _reproduce(self, module: ir.Module) -> Path:
        """Write ``module``, complete and with the objects that it names."""
        assert self._reproducers is not None
        text = module.operation.get_asm(enable_debug_info=True)
        for name in dict.fromkeys(re.findall(r'path = "([^"]+)"', text)):
            if Path(name).is_file():
                kept = shutil.copy(name, self._reproducers)
                text = text.replace(f'"{name}"', f'"{Path(kept).absolute()}"')
        path = self._reproducers / "reproducer.mlir"
        path.write_text(text)
        return path


def _error(step: Step, failed: isolation.Failed, rest: Sequence[str]) -> CompileError:
    if failed.cause is not None:
        died = Unplaced(step, f"{step.name} {failed.cause}", _FAILS, rest)
        # A search would take as long again for each of its parts.
        return TimedOut(str(died)) if failed.late else died
    said = _said(failed.diagnostics)
    placed = [f"{where}: {text}" for where, text in said if where != "unknown" and _CONSTANT not in text]
    if not placed:
        return Unplaced(step, step.rejected, said[0][1] if said else _FAILS, rest)
    return CompileError("\n  ".join([f"{step.rejected}:", *placed, *rest]))


def _said(diagnostics: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first errors in plain words, each with the model's line."""
    plain = [(torch_ir.model_line(location), _plain(message)) for location, message in diagnostics]
    return list(dict.fromkeys(plain))[:3]


_ILLEGAL = re.compile(
    r"failed to legalize (?:unresolved )?operation '([^']+)'(?:.*?\bname = \"([^\"]+)\")?", re.S
)


def _plain(message: str) -> str:
    """The first line of an MLIR error; which operation, where it is about one nothing lowers."""
    illegal = _ILLEGAL.match(message)
    if illegal:
        return _NOT_LOWERED.format(illegal[2] or illegal[1])
    return message.splitlines()[0][:300]
