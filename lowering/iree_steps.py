"""What IREE does with a program, each step in a process of its own, and what is said when it fails.

A failure is a CompileError that names the step, the model's line where it is known, and what to do.  Where
the phases are dumped it comes with the IR that makes IREE fail and the command that shows it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from iree.compiler import ir

from patterns import torch_ir

from . import isolation
from .errors import CompileError

_TORCH_TO_IREE = "builtin.module(torch-to-iree)"
_DEBUG = "LOWERING_DEBUG"
# Session flags that every program is compiled with: its IR is IREE's own by then.
_INPUT = "--iree-input-type=none"


class Iree:
    """IREE's two steps.  reproducers: the directory for the IR of a failure, if any is wanted."""

    def __init__(self, reproducers: Path | None = None):
        self._reproducers = reproducers
        isolation.start()

    def lower(self, module: ir.Module) -> ir.Module:
        """The torch dialect's operations as IREE's own; a new module in the same context."""
        command = ("iree-opt", f"--pass-pipeline={_TORCH_TO_IREE}")
        try:
            return isolation.run_passes(module, _TORCH_TO_IREE)
        except isolation.Failed as failed:
            summary = "the model uses an operation that cannot be lowered"
            raise self._error(module, failed, summary, "torch-mlir (torch-to-iree)", command) from None

    def compile(self, module: ir.Module, flags: Sequence[str]) -> bytes:
        """The program, a vmfb."""
        flags = (_INPUT, *flags)
        try:
            return isolation.compile_module(module, flags)
        except isolation.Failed as failed:
            # The archive is temporary, and IREE fails without it just as well.
            kept = [flag for flag in flags if not flag.startswith("--iree-parameter-import")]
            command = ("iree-compile", *kept, "-o", os.devnull)
            summary = "IREE could not compile the program"
            raise self._error(module, failed, summary, "IREE's compiler", command) from None

    def _error(
        self, module: ir.Module, failed: isolation.Failed, summary: str, step: str, command: Sequence[str]
    ) -> CompileError:
        if failed.cause is not None:
            summary = f"{step} {failed.cause}"
        lines = [f"{where}: {message}" for where, message in _said(failed.diagnostics)]
        text = "\n  ".join([f"{summary}:", *lines]) if lines else summary
        if self._reproducers is not None:
            text += f"\n  reproduce it with: {shlex.join([*command, str(self._reproduce(module))])}"
        elif failed.cause is not None:
            text += "\n  --dump-phases-to (dump_phases_to=) writes what makes it fail, for a report to IREE"
        if os.environ.get(_DEBUG) and failed.output.strip():
            text += f"\n{failed.output.strip()}"
        return CompileError(text)

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
        return f"nothing lowers {illegal[2] or illegal[1]}; write it with operations that IREE knows"
    return message.splitlines()[0][:300]
