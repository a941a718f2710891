"""The table of machines a program can be compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import UsageError

Backend = Literal["cpu", "cuda", "hip"]


@dataclass(frozen=True)
class Target:
    """One machine: ``arch`` is what the kernel compiler is told, ``wave`` the lanes of a wave."""

    name: str
    backend: Backend
    arch: str
    wave: int
    aliases: tuple[str, ...] = ()


TARGETS = (
    Target("cpu", "cpu", "native", 1),
    Target("sm_90", "cuda", "sm_90a", 32, ("h100", "h200", "sm_90a")),
    Target("sm_100", "cuda", "sm_100a", 32, ("b200", "sm_100a")),
    Target("gfx950", "hip", "gfx950", 64, ("mi350x", "mi355x")),
    Target("gfx942", "hip", "gfx942", 64, ("mi300x",)),
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
