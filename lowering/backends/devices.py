"""Tell IREE about a target: compiler flags, and the device where it has no description of it.

IREE's own table of CUDA targets stops before sm_90 as far as its code generation goes, so their
descriptions are written in ``cuda``; everything else comes from IREE's flags.
"""

from __future__ import annotations

from iree.compiler import ir

from ..targets import Target
from .registry import backend_of

# What depends on weights alone has been folded.  Evaluating the rest while compiling would store a second,
# transposed copy of large weights in the program; run at load, a dispatch with several results mixes them up.
_COMMON_FLAGS = (
    "--iree-opt-const-eval=false",
    "--iree-opt-const-expr-hoisting=false",
    "--iree-input-demote-f64-to-f32=false",
)

# Where a model's file and this process's directory are is the compiling user's business, and would make every
# checkout's program another one.
_NO_SOURCE_PATHS = (
    "--iree-vm-bytecode-module-strip-source-map=true",
    "--iree-llvmcpu-debug-symbols=false",
    "--iree-hal-executable-debug-level=0",
)


def flags(target: Target, *, source_paths: bool = False) -> tuple[str, ...]:
    """IREE compiler flags that select the target's device; ``source_paths``: the model's are kept."""
    named = () if source_paths else _NO_SOURCE_PATHS
    return (*_COMMON_FLAGS, *named, *(flag.format(arch=target.arch) for flag in backend_of(target).flags))


def declare_device(module: ir.Module, target: Target) -> None:
    """Write the device description that IREE lacks onto ``module``; nothing to do where flags suffice."""
    with module.context:
        device = backend_of(target).device(target)
        if device is not None:
            module.operation.attributes["hal.device.targets"] = ir.ArrayAttr.get([device])
