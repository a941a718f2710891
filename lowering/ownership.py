"""Arguments belong to the caller: a program only reads them.

IREE updates a tensor in place where an operation is the last to read it, and takes an argument for such a
tensor: its copy-on-write asks whether a value has another reader, not whose memory it is.  So every argument
gets one more reader, the barrier at the end of the function.  IREE then puts a copy before each operation
that would write into an argument, and none where nothing is written: what is only read is not copied.
"""

from __future__ import annotations

from iree.compiler import ir

_BARRIER = "hal.tensor.barrier"
_IMPORT = "hal.tensor.import"


def keep_arguments(module: ir.Module) -> None:
    """Make no function of ``module``, as it is after IREE's torch pipeline, write into its arguments."""
    for function in (op.operation for op in module.body.operations if op.operation.name == "util.func"):
        operations = [op.operation for block in function.regions[0].blocks for op in block.operations]
        imported = [op.results[0] for op in operations if op.name == _IMPORT]
        for barrier in (op for op in operations if op.name == _BARRIER):
            _read_until(barrier, [value for value in imported if value not in set(barrier.operands)])


def _read_until(barrier: ir.Operation, values: list[ir.Value]) -> None:
    """Have ``barrier`` wait for ``values`` as well; what it gave before it still gives."""
    *tensors, fence = barrier.operands
    joined = [*tensors, *values]
    with ir.InsertionPoint(barrier), barrier.location:
        new = ir.Operation.create(
            _BARRIER, results=[value.type for value in joined], operands=[*joined, fence]
        )
    for old, result in zip(barrier.results, new.results, strict=False):
        old.replace_all_uses_with(result)
    barrier.erase()
