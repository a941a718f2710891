"""Remember how tensors that come in call after call are passed: weights, a cache, a table.

A view costs a microsecond or two to make, and a graph of ``torch.compile`` has hundreds of weights.  It is
remembered while the tensor lives and stays where it is, from the second time on that it is seen, so that
what comes once costs nothing more.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .session import Session

_Kept = tuple[weakref.ref[Tensor], int, list[Any]]
"""A tensor, its address, and a list of its view, which lets go of that when the tensor dies."""


class Views:
    """The views of the arguments of one plan, whose shapes and dtypes are the same in all of its calls."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._seen: dict[int, tuple[int, int]] = {}

    def of(self, values: Sequence[Any], session: Session) -> list[Any]:
        """The arguments, with views for those tensors whose memory is passed as it is."""
        found = self._kept.get
        passed = []
        for number, value in enumerate(values):
            kept = found(number)
            if (
                kept is not None
                and kept[0]() is value
                and kept[1] == value.data_ptr()
                and value.is_contiguous()
            ):
                passed.append(kept[2][0])
            elif isinstance(value, Tensor):
                passed.append(self._new(number, value, session))
            else:
                passed.append(value)
        return passed

    def _new(self, number: int, tensor: Tensor, session: Session) -> Any:
        """The view of a tensor that is not remembered at this place."""
        self._kept.pop(number, None)
        now = id(tensor), tensor.data_ptr()
        if self._seen.get(number) != now or not session.is_direct(tensor):
            self._seen[number] = now
            return session.to_iree(tensor)
        # Of another Python object, which the view keeps alive, so that this one may die.
        view: list[Any] = [session.to_iree(tensor.detach())]
        # In C alone: an interrupt that Python raised in a callback would be lost.
        alive = weakref.ref(tensor, partial(view.__setitem__, 0))
        self._kept[number] = alive, tensor.data_ptr(), view
        return view[0]
