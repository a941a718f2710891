"""List the machines a program can be compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import UsageError

Backend = Literal["cpu", "cuda", "hip"]


OCP = ("float8_e4m3fn", "float8_e5m2")
FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz")


@dataclass(frozen=True)
class Target:
    """One machine, and the facts about it that kernels are made by.

    arch: what the kernel compiler is told.  wave: the lanes of a wave.  multiprocessors: what runs workgroups
    side by side, compute units included; 0 where it differs from host to host.  floats: the 8-bit floats that
    its instructions convert to and multiply; all of them on the cpu, whose kernels convert by themselves.
    """

    name: str
    backend: Backend
    arch: str
    wave: int
    multiprocessors: int
    floats: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def torch_build(self) -> str | None:
        """Name what PyTorch must be built for to hold its tensors: ``CUDA``, ``ROCm``; None for any build."""
        return {"cpu": None, "cuda": "CUDA", "hip": "ROCm"}[self.backend]

    @property
    def has_precise_functions(self) -> bool:
        """Tell whether the functions of its device library are as good as PyTorch's: those of AMD's are."""
        return self.backend == "hip"

    @property
    def is_gpu(self) -> bool:
        """Tell whether kernels run in workgroups of many lanes, in a memory of their own."""
        return self.wave > 1


TARGETS = (
    Target("cpu", "cpu", "native", 1, 0, ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")),
    Target("sm_90", "cuda", "sm_90a", 32, 132, OCP, ("h100", "h200", "sm_90a")),
    Target("sm_100", "cuda", "sm_100a", 32, 148, OCP, ("b200", "sm_100a")),
    Target("gfx950", "hip", "gfx950", 64, 256, OCP, ("mi350x", "mi355x")),
    Target("gfx942", "hip", "gfx942", 64, 304, FNUZ, ("mi300x",)),
)

_BY_NAME = {name: target for target in TARGETS for name in (target.name, *target.aliases)}


def resolve(name: str) -> Target:
    """The target called ``name`` (case-insensitive; a canonical name or an alias).

    Raises UsageError naming every known target.
    """
    try:
        return _BY_NAME[name.lower()]
    except KeyError:
        known = ", ".join("/".join((t.name, *t.aliases)) for t in TARGETS)
        raise UsageError(f"unknown target {name!r}; known targets: {known}") from None
