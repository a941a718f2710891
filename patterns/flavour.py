"""Make a quantization to one of the two flavours of e4m3 a quantization to the other.

One bit pattern has half the value in fnuz that it has in fn (the OCP flavour); only -0 and the NaNs are
others.  So a quantization to half the largest value with scales twice as large makes the same codes, and
every product of a code and its scale stays what it was, bit for bit.  A quantization that uses more of
fnuz than fn has (240, where half of 448 is 224) is rounded anew instead, to the whole range of fn.

This is only done where nothing but such products sees codes and scales.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import LARGEST_FINITE, Quantization
from .sites import Ledger

_FN, _FNUZ = "float8_e4m3fn", "float8_e4m3fnuz"
_OTHER = {_FN: _FNUZ, _FNUZ: _FN}
_CAST = "torch.prims.convert_element_type"
# What codes, and what scales, may be widened to: types in which half and twice the value are exact.
_WIDE = ("bfloat16", "float16", "float32")
_WIDE_SCALES = ("bfloat16", "float32")


def use_flavours(function: ir.Operation, ledger: Ledger, hardware: Collection[str]) -> None:
    """Retarget, in place, every quantization to the e4m3 that ``hardware`` lacks; the ledger notes each."""
    for op in [op.operation for op in torch_ir.block_of(function).operations]:
        if torch_ir.op_name(op) != canonical.GROUP_QUANT:
            continue
        old = canonical.quantization(op)
        if old.dtype in hardware or _OTHER.get(old.dtype) not in hardware:
            continue
        new, site = retargeted(old), canonical.site_of(op)
        seen = "its scale is given" if old.static else _why_seen(op)
        if seen is not None:
            ledger.note(site, f"kept as {old.dtype}: {seen}")
            continue
        _change(op, new)
        same = "codes and products are the same" if _is_exact(old) else "codes are rounded anew"
        ledger.retarget(site, new, f"retargeted from {old.dtype} to {new.dtype}, limit {new.qmax:g}: {same}")


def retargeted(quantization: Quantization) -> Quantization:
    """The quantization to the other e4m3 with the same products, as far as that flavour's range allows."""
    dtype = _OTHER[quantization.dtype]
    factor = 0.5 if dtype == _FNUZ else 2.0
    limit = min(quantization.qmax * factor, LARGEST_FINITE[dtype])
    return replace(
        quantization,
        dtype=dtype,
        limit=None if limit == LARGEST_FINITE[dtype] else limit,
        scale_floor=quantization.scale_floor / factor,
    )


def _is_exact(old: Quantization) -> bool:
    return old.dtype == _FN or 2 * old.qmax <= LARGEST_FINITE[_FN]


def _why_seen(quant: ir.Operation) -> str | None:
    """Who sees codes or scales apart from each other; None if nobody does."""
    codes = _derived(quant.results[0], _WIDE)
    scales = _derived(quant.results[1], _WIDE_SCALES)
    for values, what in ((codes, "codes"), (scales, "scales")):
        for value in values:
            for user in torch_ir.users(value):
                if user.results and user.results[0] in values:
                    continue
                if user.name == "func.return":
                    return f"the program returns its {what}"
                if not _undoes(user, codes, scales):
                    return f"{_spelled(user)} at {torch_ir.location(user)} reads its {what}"
    return None


def _undoes(user: ir.Operation, codes: list[ir.Value], scales: list[ir.Value]) -> bool:
    """Tell whether ``user`` multiplies codes by their scales, and so sees neither."""
    operands = list(user.operands)
    if torch_ir.op_name(user) == canonical.BLOCK_SCALED_MATMUL:
        a, b, a_scale, b_scale, *_ = operands
        return a in codes and a_scale in scales and b not in codes and b_scale not in scales
    if user.name == "torch.aten.mul.Tensor":
        first, second = operands
        return (first in codes and second in scales) or (first in scales and second in codes)
    return False


def _derived(value: ir.Value, wide: Collection[str]) -> list[ir.Value]:
    """``value`` and everything that is a view of it, or it widened."""
    found = [value]
    for source in found:
        for user in torch_ir.users(source):
            if not user.results or user.operands[0] != source:
                continue
            result = torch_ir.tensor_type(user.result) if len(user.results) == 1 else None
            widened = user.name == _CAST and result is not None and result.dtype in wide
            if (views.is_view(user) or widened) and user.result not in found:
                found.append(user.result)
    return found


def _change(quant: ir.Operation, new: Quantization) -> None:
    """Give ``quant`` its new contract, and its codes and their views the new element type."""
    quant.attributes["contract"] = canonical.to_attribute(new)
    for value in _derived(quant.results[0], ()):
        type_ = torch_ir.tensor_type(value)
        assert type_ is not None
        value.set_type(replace(type_, dtype=new.dtype).torch())


def _spelled(op: ir.Operation) -> str:
    return torch_ir.op_name(op).removeprefix("torch.")
