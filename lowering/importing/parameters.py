"""Parameters in IR: a weight stays outside, as a global that names it, and is loaded where it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from iree.compiler import ir
from iree.compiler.dialects import func, util

from patterns import torch_ir

from ..errors import CompileError
from ..signature import INITIAL, PARAMETER_SCOPE


def declare(module: ir.Operation, name: str, tensor: torch.Tensor) -> None:
    """A global that is the parameter ``name``, of the type of ``tensor``.  Raises CompileError for a
    dtype that no program can hold.
    """
    type_ = _as_stored(tensor).builtin()
    with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]), ir.Location.unknown():
        value = ir.Attribute.parse(f'#flow.parameter.named<"{PARAMETER_SCOPE}"::"{name}"> : {type_}')
        util.GlobalOp(name, type_, initial_value=value, sym_visibility=ir.StringAttr.get("private"))


def read(name: str, tensor: torch.Tensor) -> ir.Value:
    """The parameter ``name``, of the type of ``tensor``, at the current insertion point."""
    stored = _as_stored(tensor)
    value = torch_ir.from_builtin(util.GlobalLoadOp(stored.builtin(), name, is_immutable=True).result, stored)
    if tensor.dtype != torch.bool:
        return value
    return torch_ir.make(
        "torch.prims.convert_element_type", type_of(tensor), [value, torch_ir.make_dtype("bool")]
    )


def declare_initial(module: ir.Operation, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A function of ``module`` that returns the initial values of ``state`` which are no zeros; these values.

    They are parameters.  Zeros are nowhere: the runtime makes them.
    """
    stored = {name: tensor for name, tensor in state.items() if _any(tensor)}
    if not stored:
        return {}
    for name, tensor in stored.items():
        declare(module, name, tensor)
    types = [type_of(tensor).torch() for tensor in stored.values()]
    with ir.InsertionPoint(module.regions[0].blocks[0]), ir.Location.unknown():
        function = func.FuncOp(INITIAL, ir.FunctionType.get([], types))
        with ir.InsertionPoint(function.add_entry_block()):
            func.ReturnOp([read(name, tensor) for name, tensor in stored.items()])
    return stored


def _any(tensor: torch.Tensor) -> bool:
    """Tell whether a bit is set."""
    return bool(tensor.contiguous().reshape(-1).view(torch.uint8).any())


def is_storable(dtype: torch.dtype) -> bool:
    """Tell whether a parameter can have this dtype."""
    return str(dtype).removeprefix("torch.") in torch_ir.DTYPES


def type_of(tensor: torch.Tensor) -> torch_ir.TensorType:
    """The type that ``tensor`` has in a program; raises CompileError where no program can hold it."""
    if not is_storable(tensor.dtype):
        raise CompileError(f"a parameter of dtype {tensor.dtype} cannot be compiled")
    return torch_ir.TensorType(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _as_stored(tensor: torch.Tensor) -> torch_ir.TensorType:
    """Bools are bytes in archives; IREE does not read one-bit elements from them."""
    return type_of(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)
