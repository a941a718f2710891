"""Describe a kernel of a family, ready to be compiled: its source, its constants, what it is given."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from patterns.contracts import Quantization, ScaleLayout, Spec

from ..targets import Target


@dataclass(frozen=True)
class GridRule:
    """Say how many workgroups a kernel has for any number of rows.

    ``few`` holds (up to so many rows, workgroups of each row), in order; beyond it a workgroup takes ``rows``
    rows, and there are at most ``most`` workgroups.  Never zero, since CUDA does not skip an empty grid.
    ``columns`` consecutive workgroups share what is one's by the above.
    """

    rows: int
    most: int | None = None
    few: tuple[tuple[int, int], ...] = ()
    columns: int = 1

    def workgroups(self, rows: int) -> int:
        for up_to, each in self.few:
            if 0 < rows <= up_to:
                return rows * each * self.columns
        wanted = max(1, -(-rows // self.rows))
        return min(wanted, self.most or wanted) * self.columns


Dimension = int | Literal["T", "T4"]
Access = Literal["read", "write"]


@dataclass(frozen=True)
class Binding:
    """One tensor of a dispatch, dense and row major.

    ``shape`` holds ints and the symbols ``T`` (rows) and ``T4`` (rows rounded up to 4).  Scales have their
    physical shape: [T, Gn] in ``row`` layout, [Gn, T] in ``column``, [Gn, T4] in ``column_tma``, and in
    ``ue8m0_packed`` int32 [ceil(Gn/4), T4], four exponents in each; ``layout`` says which.  ``quantization``
    is the one whose values or scales these are.  ``columns`` are the first column that the kernel touches and
    the one after the last, where that is a part of each row.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...]
    access: Access
    quantization: Quantization | None = None
    layout: ScaleLayout = "row"
    columns: tuple[int, int] | None = None

    @property
    def has_rows(self) -> bool:
        """Tell whether it has a row for each of the dispatch's, unlike a weight."""
        return len(self.shape) == 2 and self.shape[0] == "T"


@dataclass(frozen=True)
class KernelInstance:
    """A kernel ready to be compiled and dispatched.

    On a GPU the parameters are one pointer per binding, in order, then ``rows`` as i32.  On the CPU
    they are a base pointer and an i64 element offset per binding, then i32 ``rows`` and i32 workgroup.
    """

    entry: str
    target: Target
    spec: Spec
    source: str
    defines: tuple[tuple[str, str], ...]
    bindings: tuple[Binding, ...]
    block: tuple[int, int, int]
    grid_rule: GridRule
    dynamic_shared: int = 0

    @classmethod
    def named(
        cls,
        stem: str,
        target: Target,
        spec: Spec,
        source: str,
        defines: tuple[tuple[str, str], ...],
        bindings: tuple[Binding, ...],
        grid_rule: GridRule,
        threads: int = 1,
        dynamic_shared: int = 0,
    ) -> KernelInstance:
        """Make the instance whose entry is ``stem`` and what tells its ``defines`` from others.

        threads: of a workgroup, on a GPU; on the CPU a workgroup is one call.
        """
        entry = f"{stem}_{digest(defines)}"
        block = (threads if target.is_gpu else 1, 1, 1)
        defines = (("ENTRY", entry), *defines)
        return cls(entry, target, spec, source, defines, bindings, block, grid_rule, dynamic_shared)

    def grid(self, rows: int) -> tuple[int, int, int]:
        """Workgroups for ``rows`` rows."""
        return self.grid_rule.workgroups(rows), 1, 1

    def shape(self, binding: Binding, rows: int) -> tuple[int, ...]:
        """The sizes of ``binding`` when there are ``rows`` rows."""
        sizes = {"T": rows, "T4": (rows + 3) // 4 * 4}
        return tuple(d if isinstance(d, int) else sizes[d] for d in binding.shape)

    def elements(self, binding: Binding, rows: int) -> int:
        """Count the elements of ``binding`` that the kernel touches."""
        *leading, last = self.shape(binding, rows)
        first, end = binding.columns or (0, last)
        return math.prod(leading) * (end - first)


def listed(names: Iterable[str]) -> str:
    """Join ``names`` for a sentence: ``a, b or c``."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def rounded32(value: float) -> float:
    """Round ``value`` to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def float32_literal(value: float) -> str:
    """``value`` rounded to float32 as a C hexadecimal literal."""
    return rounded32(value).hex() + "f"


def bits32(value: float) -> str:
    """The bits of ``value`` rounded to float32, as a C literal."""
    return f"0x{struct.unpack('I', struct.pack('f', value))[0]:08x}u"


def digest(defines: tuple[tuple[str, str], ...]) -> str:
    """Hash ``defines``, which tells instances of different ones apart in their names."""
    return hashlib.sha256(json.dumps(defines).encode()).hexdigest()[:8]
