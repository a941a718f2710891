"""Compile a PyTorch model to one IREE program in which each norm + quantization chain is one kernel.

    compiled = lowering.compile(module, args)      # torch.nn.Module -> Compiled
    compiled.save("m.vmfb"); print(compiled.report.summary())
    program = lowering.load("m.vmfb")              # -> Program
    y = program(x)                                 # torch tensors in, torch tensors out

Importing this package registers ``torch.ops.lowering.*`` and nothing else: the compiler is
imported by the first ``compile``, the runtime by the first ``load``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nn, ops
    from .checkpoints.adopt import adopt
    from .checkpoints.decoder import export_decoder
    from .checkpoints.pretrained import from_pretrained
    from .compiler import Compiled, compile, compile_mlir, explain
    from .errors import (
        CheckpointError,
        CompileError,
        LoweringError,
        RunError,
        ToolchainError,
        UnfusedError,
        UsageError,
        VerificationError,
    )
    from .importing.foreign import declare_ops
    from .nn import quantize
    from .report.report import Report
    from .report.sites import Site
    from .runtime.program import Program, load
    from .targets import TARGETS, Target

__version__ = "0.1.0"

# Every public name and the module that defines it. A module's own name means the module itself.
_HOME = {
    "compile": "compiler",
    "compile_mlir": "compiler",
    "explain": "compiler",
    "declare_ops": "importing.foreign",
    "Compiled": "compiler",
    "load": "runtime.program",
    "Program": "runtime.program",
    "nn": "nn",
    "ops": "ops",
    "quantize": "nn",
    "adopt": "checkpoints.adopt",
    "export_decoder": "checkpoints.decoder",
    "from_pretrained": "checkpoints.pretrained",
    "Report": "report.report",
    "Site": "report.report",
    "TARGETS": "targets",
    "Target": "targets",
    "LoweringError": "errors",
    "CheckpointError": "errors",
    "CompileError": "errors",
    "ToolchainError": "errors",
    "UsageError": "errors",
    "UnfusedError": "errors",
    "VerificationError": "errors",
    "RunError": "errors",
}

__all__ = [
    "TARGETS",
    "CheckpointError",
    "CompileError",
    "Compiled",
    "LoweringError",
    "Program",
    "Report",
    "RunError",
    "Site",
    "Target",
    "ToolchainError",
    "UnfusedError",
    "UsageError",
    "VerificationError",
    "adopt",
    "compile",
    "compile_mlir",
    "declare_ops",
    "explain",
    "export_decoder",
    "from_pretrained",
    "load",
    "nn",
    "ops",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` at its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f".{_HOME[name]}", __name__)
    value = home if name == _HOME[name] else getattr(home, name)
    globals()[name] = value
    return value


def _is_command() -> bool:
    """Tell whether this process is one of the commands.

    They answer ``--help`` and most mistakes without the second that importing torch takes, and import ``ops``
    themselves before any model.
    """
    module = sys.orig_argv[2:3] if sys.orig_argv[1:2] == ["-m"] and sys.argv[:1] == ["-m"] else []
    started = PurePath(sys.argv[0]).name if sys.argv else ""
    return started in ("compile-to-vmfb", "run-vmfb") or module in (
        ["lowering.cli.compile"],
        ["lowering.cli.run"],
    )


if not _is_command():
    importlib.import_module(".ops", __name__)  # registers torch.ops.lowering.*


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
