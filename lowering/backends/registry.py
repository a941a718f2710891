"""The backends by name, as ``Target.backend`` has it."""

from __future__ import annotations

from ..targets import Target
from . import cpu, cuda, hip
from .base import Backend

BACKENDS: dict[str, Backend] = {"cpu": cpu.BACKEND, "cuda": cuda.BACKEND, "hip": hip.BACKEND}


def backend_of(target: Target) -> Backend:
    """The backend that makes machine code for ``target``."""
    return BACKENDS[target.backend]
