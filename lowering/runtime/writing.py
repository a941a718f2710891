"""Hand over the arguments that a model writes to, so that they have their new values after a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..signature import Signature, TensorSpec
from .arguments import passed
from .session import Session

_Range = tuple[int, int]


class Writing:
    """Say what a function writes: in the memory it is passed, or as a tensor that it returns.

    results: by number of an argument, the result that is its new value.  state: by number of a result, the
    name of the state's tensor whose new value it is.  first: the number of the first of these results.
    """

    def __init__(self, signature: Signature):
        arguments = passed(signature.inputs) or ()
        self._names = [argument.name for argument in arguments]
        given = [item for item in signature.written if item.argument < len(arguments)]
        self.arguments = tuple(item.argument for item in given)
        self.results = {item.argument: item.result for item in given if item.result is not None}
        self.state = {
            item.result: signature.state[item.argument - len(arguments)].name
            for item in signature.written
            if item.result is not None and item.argument >= len(arguments)
        }
        self._apart: tuple[list[_Range], list[_Range]] = [], []
        """Of the last call, whose tensors share no memory: addresses and bytes, and between which it lies."""
        self.first = sum(isinstance(leaf, TensorSpec) for leaf in signature.outputs or ())

    def lend(self, values: Sequence[Any], session: Session) -> tuple[list[Any], list[Callable[[], Any]]]:
        """What to pass for ``values``, and what brings new values back that went into copies.

        Raises ArgumentError for a tensor that shares memory with another, or with itself: what the program
        would read there after it has written is not defined.
        """
        prepared, finish = list(values), []
        if not self.arguments:
            return prepared, finish
        # Of the same addresses it was found out before: a graph may have hundreds of weights.
        addresses = [(x.data_ptr(), x.nbytes) if isinstance(x, Tensor) else (0, 0) for x in values]
        if addresses != self._apart[0]:
            self._apart = addresses, self._spans(values, addresses)
        for number in self.arguments:
            if not values[number].is_contiguous():
                self._check_elements(number, values[number])
            if number not in self.results:
                prepared[number], bring_back = session.lend(values[number])
                finish += [bring_back] if bring_back is not None else []
        return prepared, finish

    def _check_elements(self, number: int, tensor: Tensor) -> None:
        # PyTorch's own answer, 1 for elements that are one; it is what an operation in place asks there.
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise ArgumentError(
                f"argument {self._names[number]} is written, and several of its elements are one in memory "
                "(expand): pass a tensor of its own"
            )

    def _spans(self, values: Sequence[Any], addresses: list[_Range]) -> list[_Range]:
        """Where the tensors are, those that have moved compared with the others.  Raises as ``lend``."""
        known, spans = self._apart
        every = range(len(addresses))
        moved = every if len(known) != len(every) else [i for i in every if known[i] != addresses[i]]
        spans = list(spans) if len(known) == len(every) else [(0, 0) for _ in every]
        for number in moved:
            spans[number] = _span(values[number]) if isinstance(values[number], Tensor) else (0, 0)
        for number in self.arguments:
            begin, end = spans[number]
            for other in every if number in moved else moved:
                first, last = spans[other]
                if other != number and first < end and begin < last:
                    raise ArgumentError(
                        f"argument {self._names[number]} is written and shares memory with argument "
                        f"{self._names[other]}: pass a copy of one of them"
                    )
        return spans


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
