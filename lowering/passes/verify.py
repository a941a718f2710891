"""Check a module between two steps: MLIR's own verifier, and every operation's declaration."""

from __future__ import annotations

import os

from iree.compiler import ir

from patterns import torch_ir

from ..errors import LoweringError
from ..families.registry import operation_of

_VARIABLES = ("LOWERING_DEBUG", "LOWERING_VERIFY")


class InvalidIR(LoweringError):
    """A step left IR that does not hold together: a fault of this package, or of a family brought to it."""


def is_wanted() -> bool:
    """Tell whether every step is to be checked: LOWERING_DEBUG is set or, as in tests, LOWERING_VERIFY."""
    return any(os.environ.get(variable, "0") not in ("", "0") for variable in _VARIABLES)


def verify(module: ir.Module, step: str) -> None:
    """Raise InvalidIR, naming ``step``, the operation and the model's line, where ``module`` is not valid."""
    try:
        module.operation.verify()
    except ir.MLIRError as error:
        raise InvalidIR(f"the step {step} left IR that MLIR's verifier rejects: {error}") from error
    for function in module.body.operations:
        if function.operation.name != "func.func":
            continue
        for block in function.operation.regions[0].blocks:
            for op in block.operations:
                _verify(op.operation, step)


def _verify(op: ir.Operation, step: str) -> None:
    operation = operation_of(op)
    reason = None if operation is None else operation.verify(op)
    if reason is not None:
        where, name = torch_ir.location(op), torch_ir.op_name(op)
        raise InvalidIR(f"the step {step} left a {name} that is invalid: {reason} (of {where})")
