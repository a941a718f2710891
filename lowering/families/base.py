"""Say what a family of kernels is to the compiler: what it computes, from which sources, on which targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iree.compiler import ir

from patterns.operation import PatternFamily

from ..targets import Target
from .instance import KernelInstance

# What an operation that got no kernel computes: a key that tells it from others of its name, and a function
# of its tensor operands in plain PyTorch.
Reference = tuple[Any, Callable[..., Any]]


@dataclass(frozen=True)
class Family:
    """One kind of fused operation: all that the compiler knows of it.

    name
        For people and for errors.
    patterns
        How a model's spellings of it are found and fused.
    spec
        What specialises a kernel, the frozen dataclass that the fused operation carries.
    instance
        The kernel for a spec on a target; raises CompileError with the sentence of ``why_unsupported``.
    why_unsupported
        A sentence saying why no kernel computes a spec on a target; None if one does.
    sources
        The device sources, by file name, each with the headers it includes: the family's own, or those of
        this project.
    references
        By the name of a raised operation: what it computes where it gets no kernel.  Such a function may
        raise CompileError where there is nothing to compute.
    directory
        Where the sources lie; None for those of this project.
    """

    name: str
    patterns: PatternFamily
    spec: type
    instance: Callable[[Any, Target], KernelInstance]
    why_unsupported: Callable[[Any, Target], str | None]
    sources: Mapping[str, tuple[str, ...]]
    references: Mapping[str, Callable[[ir.Operation], Reference]] = field(default_factory=dict)
    directory: Path | None = None

    def __post_init__(self) -> None:
        kernels = [operation for operation in self.patterns.operations if operation.is_kernel]
        if [operation.carries for operation in kernels] != [self.spec]:
            carried = ", ".join(operation.carries.__name__ for operation in kernels) or "none"
            raise ValueError(
                f"family {self.name}: one operation of a kernel carries {self.spec.__name__}, not {carried}"
            )
        if self.directory is not None:
            missing = [name for name in self.sources if not (self.directory / name).is_file()]
            if missing:
                raise ValueError(f"family {self.name}: {self.directory} has no {', '.join(missing)}")
        unknown = set(self.references) - {operation.name for operation in self.patterns.operations}
        if unknown:
            raise ValueError(
                f"family {self.name}: references of {', '.join(sorted(unknown))}, which it has not"
            )
