"""``torch.ops.lowering.packed_matmul``, floats times a weight of packed integers, and ``repack``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dtype, check_rank, check_shape, shape_text

BITS = (4, 8)
_PIECE = 4 << 20  # codes that are moved at a time, 16 bytes of memory each


def unpacked_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The values [N, K] that codes stand for, (code - zero) * scale in the dtype of the scales.

    Arguments as for ``packed_matmul``.
    """
    values = codes.to(torch.int32)
    if bits < 8:
        shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=codes.device)
        values = ((values.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)
    grouped = values.unflatten(1, (scale.shape[1], -1))
    grouped = grouped - (1 << (bits - 1) if zero is None else zero.to(torch.int32).unsqueeze(-1))
    return (grouped.to(scale.dtype) * scale.unsqueeze(-1)).flatten(1)


def packed_matmul_reference(
    a: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """a . w^T + bias, w being ``unpacked_weight`` rounded to a's dtype.  Arguments as for ``packed_matmul``.

    Sources: compressed-tensors pack-quantized, GPTQ (GPTQModel), AWQ (gemm).
    """
    return torch.nn.functional.linear(a, unpacked_weight(codes, scale, zero, bits).to(a.dtype), bias)


@torch.library.custom_op(
    "lowering::packed_matmul",
    mutates_args=(),
    schema=(
        "(Tensor a, Tensor codes, Tensor scale, Tensor? zero=None, Tensor? bias=None, *, int bits=4) "
        "-> Tensor"
    ),
)
def packed_matmul(
    a: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
) -> Tensor:
    """out[..., n] = sum over k of a[..., k] * w[n, k] + bias[n], w = (code - zero) * scale.

    a: [..., K] float32, bfloat16 or float16.  codes: uint8 [N, K * bits / 8]; of a byte the lowest bits come
    first; bits: 4 or 8.  scale: [N, K/G], a float.  zero: uint8 [N, K/G], or None for 2^(bits - 1).
    bias: [N] in a's dtype, or None.
    w is rounded to the dtype of the scales and then to a's.  Returns [..., N] in a's dtype, accumulated in
    float32, the bias added there, and rounded once; the order of accumulation is free.
    Raises ValueError naming the argument that does not fit.
    Sources: compressed-tensors pack-quantized, GPTQ (GPTQModel), AWQ (gemm).
    """
    _check(a, codes, scale, zero, bias, bits)
    return packed_matmul_reference(a, codes, scale, zero, bias, bits).contiguous()


@packed_matmul.register_fake
def _(
    a: Tensor, codes: Tensor, scale: Tensor, zero: Any = None, bias: Any = None, *, bits: int = 4
) -> Tensor:
    _check(a, codes, scale, zero, bias, bits)
    return a.new_empty((*a.shape[:-1], codes.shape[0]))


def _check(
    a: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> None:
    _check_bits(bits)
    check_dtype("a", a, FLOAT_DTYPES)
    check_dtype("codes", codes, (torch.uint8,))
    check_dtype("scale", scale, FLOAT_DTYPES)
    check_rank("a", a, 1)
    depth = a.shape[-1]
    if codes.dim() != 2 or codes.shape[1] * 8 != depth * bits:
        raise ValueError(f"codes: expected bytes [N, {depth} * {bits} / 8], got {shape_text(codes)}")
    if scale.dim() != 2 or scale.shape[0] != codes.shape[0]:
        raise ValueError(f"scale: expected shape [{codes.shape[0]}, groups], got {shape_text(scale)}")
    if scale.shape[1] == 0 or depth % scale.shape[1]:
        raise ValueError(f"scale: {scale.shape[1]} groups do not divide the last axis of a, {depth}")
    if zero is not None:
        check_dtype("zero", zero, (torch.uint8,))
        check_shape("zero", zero, scale.shape)
    if bias is not None:
        check_dtype("bias", bias, (a.dtype,))
        check_shape("bias", bias, codes.shape[:1])


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not available; choose one of {', '.join(map(str, BITS))}")


@torch.library.custom_op(
    "lowering::repack",
    mutates_args=(),
    schema=(
        "(Tensor words, int bits, int axis, int[] order, int size, Tensor? columns=None, *, "
        "bool transposed=False, int above=0, int to_bits=4) -> Tensor"
    ),
)
def repack(
    words: Tensor,
    bits: int,
    axis: int,
    order: list[int],
    size: int,
    columns: Tensor | None = None,
    *,
    transposed: bool = False,
    above: int = 0,
    to_bits: int = 4,
) -> Tensor:
    """Put the codes that ``words`` hold as a checkpoint has them into bytes, as ``packed_matmul`` takes them.

    words: int32 [R, C], each of 32 / bits codes that follow each other along ``axis``, of which ``size`` are
    taken; order: the place in its word, counted from the lowest bits, of each of them.  The codes are
    [N, K], or [K, N] where ``transposed``.  columns: int64 [K], which of them comes where.  above: what is
    added to each, modulo 2^to_bits.
    Returns uint8 [N, K * to_bits / 8], of each byte the lowest bits first.
    Raises ValueError naming the argument that does not fit.
    """
    rows, depth = _repacked(words, bits, axis, order, size, columns, transposed, to_bits)
    if transposed:
        words, axis = words.t(), 1 - axis
    in_byte, result = 8 // to_bits, words.new_empty((rows, depth * to_bits // 8), dtype=torch.uint8)
    shifts = torch.tensor([bits * place for place in order], dtype=torch.int32, device=words.device)
    unit = len(order) if axis == 0 else 1  # rows that share their words
    step = max(1, _PIECE // max(1, depth) // unit) * unit
    for first in range(0, rows, step):
        last = min(rows, first + step)
        codes = _codes(words[first // unit : -(-last // unit)], shifts, axis, bits)[: last - first, :depth]
        codes = (codes if columns is None else codes.index_select(1, columns)) + above
        parts = codes.bitwise_and((1 << to_bits) - 1).unflatten(1, (-1, in_byte))
        result[first:last] = sum(parts[..., i] << (i * to_bits) for i in range(in_byte))
    return result


def _codes(words: Tensor, shifts: Tensor, axis: int, bits: int) -> Tensor:
    """The codes of ``words``, int32 from 0 on."""
    shifts = shifts.view(-1, *(1,) * (1 - axis))
    return ((words.unsqueeze(axis + 1) >> shifts) & ((1 << bits) - 1)).flatten(axis, axis + 1)


@repack.register_fake
def _(
    words: Tensor,
    bits: int,
    axis: int,
    order: list[int],
    size: int,
    columns: Any = None,
    *,
    transposed: bool = False,
    above: int = 0,
    to_bits: int = 4,
) -> Tensor:
    rows, depth = _repacked(words, bits, axis, order, size, columns, transposed, to_bits)
    return words.new_empty((rows, depth * to_bits // 8), dtype=torch.uint8)


def _repacked(
    words: Tensor,
    bits: int,
    axis: int,
    order: list[int],
    size: int,
    columns: Tensor | None,
    transposed: bool,
    to_bits: int,
) -> tuple[int, int]:
    """N and K of the codes.  Raises ValueError naming the argument that does not fit."""
    check_dtype("words", words, (torch.int32,))
    _check_bits(bits)
    _check_bits(to_bits)
    if words.dim() != 2 or axis not in (0, 1):
        raise ValueError(f"words: expected a matrix and axis 0 or 1, got {shape_text(words)} and {axis}")
    if sorted(order) != list(range(32 // bits)):
        raise ValueError(f"order: expected the places 0 to {32 // bits - 1}, got {list(order)}")
    shape = list(words.shape)
    if not shape[axis] * len(order) - len(order) < size <= shape[axis] * len(order):
        raise ValueError(f"size: {size} codes do not fill {shape[axis]} words of {len(order)}")
    shape[axis] = size
    rows, depth = reversed(shape) if transposed else shape
    if depth * to_bits % 8:
        raise ValueError(f"size: rows of {depth} codes of {to_bits} bits are no whole bytes")
    if columns is not None:
        check_dtype("columns", columns, (torch.int64,))
        check_shape("columns", columns, (depth,))
    return rows, depth
