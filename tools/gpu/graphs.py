"""Compare calls that are graphs with calls that are IREE's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.errors import RunError

CALLS = 6
"""The first is IREE's, the second is recorded, the others are graphs, at other addresses each."""


def check_graphs(program: Any, plain: Any, inputs: Callable[[int], Sequence[Tensor]]) -> str:
    """Say what the calls of ``program`` are, which have to return the bits that those of ``plain`` return.

    plain: the same, loaded with ``graphs="off"``.  inputs: of a call, by a seed.  The results are kept until the
    last call, and compared then.  Raises RunError for one that differs.
    """
    found, wanted = [], []
    for seed in range(CALLS):
        arguments = inputs(seed)
        found.append(_bits(program(*arguments)))
        wanted.append(_bits(plain(*arguments)))
    for call, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for number, (x, y) in enumerate(zip(one, other, strict=True)):
            if not torch.equal(x, y):
                raise RunError(f"call {call}: result {number} differs in {int((x != y).sum())} bytes")
    return program.explain_call(*inputs(0))


def _bits(results: Any) -> list[Tensor]:
    tensors = results if isinstance(results, tuple) else (results,)
    return [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
