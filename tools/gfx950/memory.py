"""The memory kernels may touch: host memory, registered piece by piece, with what is defined in it."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .errors import LaunchError
from .native import AllocationStruct

Table = ctypes.Array[AllocationStruct]


@dataclass
class Allocation:
    """``size`` bytes at the host address ``base``; ``shadow`` has ones for undefined bits, or is None."""

    base: int
    size: int
    writable: bool
    shadow: np.ndarray | None
    owner: object = field(default=None, repr=False)  # keeps the bytes alive


class Memory:
    """Allocations by address.  Device pointers are host addresses."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._allocations: dict[int, Allocation] = {}
        self._table: Table | None = None

    def add(
        self, address: int, size: int, *, writable: bool = True, defined: bool = True, owner: object = None
    ) -> int:
        """Register ``size`` bytes at ``address`` and return the address.

        With ``defined`` false nothing has been written there yet, and reading it is watched.  Raises
        LaunchError if it overlaps what is registered.
        """
        if overlapped := self._overlapping(address, size):
            raise LaunchError(
                f"{size} bytes at {address:#x} overlap the {overlapped.size} at {overlapped.base:#x}, which "
                "are registered already. Remove those first."
            )
        shadow = None if defined else np.full(size, 0xFF, np.uint8)
        bisect.insort(self._bases, address)
        self._allocations[address] = Allocation(address, size, writable, shadow, owner)
        self._table = None
        return address

    def add_array(self, array: np.ndarray, *, writable: bool = True, defined: bool = True) -> int:
        """Register the bytes of a C-contiguous array, and keep it alive."""
        if not array.flags.c_contiguous:
            raise LaunchError(
                "Only contiguous arrays can be memory of a kernel: pass np.ascontiguousarray(x)."
            )
        return self.add(array.ctypes.data, array.nbytes, writable=writable, defined=defined, owner=array)

    def remove(self, address: int) -> None:
        """Forget the allocation that starts at ``address``."""
        del self._allocations[address]
        self._bases.remove(address)
        self._table = None

    def find(self, address: int) -> Allocation | None:
        """The allocation that holds ``address``, if any."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        allocation = self._allocations[self._bases[index]]
        return allocation if address < allocation.base + allocation.size else None

    def define(self, address: int, size: int) -> None:
        """Say that the host has written ``size`` bytes at ``address``."""
        allocation = self.find(address)
        if allocation is not None and allocation.shadow is not None:
            allocation.shadow[address - allocation.base :][:size] = 0

    def undefined_bytes(self, address: int, size: int) -> np.ndarray:
        """Which of ``size`` bytes at ``address`` hold bits that nothing has defined: a bool each."""
        allocation = self.find(address)
        if allocation is None:
            raise LaunchError(f"Nothing is registered at {address:#x}.")
        if allocation.shadow is None:
            return np.zeros(size, bool)
        return allocation.shadow[address - allocation.base :][:size] != 0

    @contextmanager
    def temporarily(self, *arrays: np.ndarray) -> Iterator[None]:
        """Register arrays for a while, to be read only; what is defined in them is said by ``define``."""
        addresses = [self.add_array(array, writable=False, defined=False) for array in arrays]
        try:
            yield
        finally:
            for address in addresses:
                self.remove(address)

    def table(self) -> Table:
        """The allocations sorted by address, as the native executor takes them."""
        if self._table is None:
            rows = [_row(self._allocations[base]) for base in self._bases]
            self._table = (AllocationStruct * max(1, len(rows)))(*rows)
        return self._table

    def __len__(self) -> int:
        return len(self._bases)

    def _overlapping(self, address: int, size: int) -> Allocation | None:
        before = self.find(address)
        if before is not None:
            return before
        index = bisect.bisect_left(self._bases, address)
        after = self._allocations[self._bases[index]] if index < len(self._bases) else None
        return after if after is not None and after.base < address + size else None


def _row(allocation: Allocation) -> AllocationStruct:
    shadow = None if allocation.shadow is None else allocation.shadow.ctypes.data
    return AllocationStruct(allocation.base, allocation.size, shadow, int(allocation.writable), 0)
