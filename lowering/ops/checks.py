"""Refuse arguments that do not fit, in the same words for every operation of ``torch.ops.lowering``.

Each check raises ValueError with a sentence that begins with the argument's name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patterns.contracts import LARGEST_FINITE

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED_DTYPES = tuple(getattr(torch, name) for name in LARGEST_FINITE)
FP8_DTYPES = tuple(dtype for dtype in QUANTIZED_DTYPES if dtype.is_floating_point)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """``float32 or bfloat16``."""
    return " or ".join(dtype_name(dtype) for dtype in dtypes)


def shape_text(tensor: Tensor | tuple[int, ...] | torch.Size) -> str:
    """``[8, 7168]``; a size only known at run time as its symbol."""
    sizes = tensor.shape if isinstance(tensor, Tensor) else tensor
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Require ``tensor`` to have one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {dtype_names(dtypes)}, got {dtype_name(tensor.dtype)}")


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Require ``tensor`` to have at least ``rank`` dimensions."""
    if tensor.dim() < rank:
        raise ValueError(f"{name}: expected at least {rank} dimension, got a scalar")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...] | torch.Size) -> None:
    """Require ``tensor`` to have the shape ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {shape_text(expected)}, got {shape_text(tensor)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Require ``value`` to be one of ``choices``."""
    if value not in choices:
        offered = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: {value!r} is not available; choose one of {offered}")
