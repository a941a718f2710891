"""Step 6, respell: write as builtin operations what torch-mlir would lower wrongly, or not at all.

Run last, on what is left of the torch dialect when every kernel has been called, so that no recogniser sees
it.  Each ``respell_*`` file is about one kind of operation and has a table of rules; a rule builds, in front
of an operation, what its results are to be replaced by, or leaves it with None.
"""

from __future__ import annotations

from iree.compiler import ir

from patterns import torch_ir

from . import respell_index, respell_numbers, respell_slices, respell_sorts, respell_updates, respell_views

_RULES = {
    **respell_views.RULES,
    **respell_slices.RULES,
    **respell_sorts.RULES,
    **respell_index.RULES,
    **respell_updates.RULES,
    **respell_numbers.RULES,
}


def respell(function: ir.Operation) -> int:
    """Replace what has a rule in the body of ``function``, in place; returns how many operations went."""
    block = torch_ir.block_of(function)
    count = 0
    for op in [op.operation for op in block.operations]:
        rule = _nothing if _is_empty(op) else _RULES.get(torch_ir.op_name(op))
        if rule is None:
            continue
        with ir.InsertionPoint(op), op.location:
            made = rule(op)
        if made is not None:
            for old, new in zip(op.results, made, strict=True):
                old.replace_all_uses_with(new)
            count += 1
    torch_ir.erase_dead(block)
    return count


def _is_empty(op: ir.Operation) -> bool:
    """Tell whether all that ``op`` makes are tensors without elements."""
    types = [torch_ir.tensor_type(result) for result in op.results]
    return bool(types) and all(type_ is not None and 0 in type_.shape for type_ in types)


def _nothing(op: ir.Operation) -> list[ir.Value] | None:
    types = [torch_ir.tensor_type(result) for result in op.results]
    known = [type_ for type_ in types if type_ is not None and None not in type_.shape]
    if len(known) < len(types):
        return None
    return [respell_index.zeros(type_, [size or 0 for size in type_.shape]) for type_ in known]
