"""Name the tensors that a program carries: one name for one tensor, in all of its functions."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import CompileError


def identity(tensor: Tensor, name: str) -> Hashable:
    """What tells a tensor from others: tied weights are the same memory, seen the same way."""
    return (tensor.data_ptr() or name, tensor.dtype, tuple(tensor.shape), tensor.stride())


@dataclass
class Names:
    """The names that are given, and to what.

    functions: those of the program, which no tensor may have.
    """

    functions: Collection[str] = ()
    _names: dict[Hashable, str] = field(default_factory=dict)
    _owners: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def of(self, function: str, tensor: Tensor, name: str, *, is_constant: bool = False) -> str:
        """The name of a tensor that ``function`` calls ``name``.

        A constant of the graph, whose name says nothing, gets another where that is taken.  Raises
        CompileError where two functions have two tensors of one name.
        """
        key = identity(tensor, name)
        if key in self._names:
            return self._names[key]
        while name in self.functions or (is_constant and name in self._owners):
            name = f"{name}.tensor"
        if name in self._owners:
            other, theirs = self._owners[name]
            raise CompileError(
                f"the functions {other} and {function} have two tensors called {name}, {_described(theirs)} "
                f"and {_described(tensor)}: functions of one program share their weights and state, so give "
                "them the same module, or other names"
            )
        self._owners[name] = function, tensor
        return self._names.setdefault(key, name)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
