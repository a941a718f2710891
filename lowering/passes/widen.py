"""Step 6, widen: make an operation on 16-bit floats or small integers one of 32 bits, rounded once.

PyTorch computes an operation on bfloat16 or float16 in float32 and rounds its result once, however many steps
the operation has.  The torch dialect's lowering takes each step in the element type, sums included.  So the
operands are widened and the result is narrowed.  8-bit and 16-bit integers are computed in 32 bits, of which
the low ones are the result: many of their operations have no lowering, and unsigned ones pass for signed.

What only moves elements is left alone, and so are products of matrices, whose sums are float32 already.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from iree.compiler import ir

from patterns import torch_ir

from .schema import overload

_WIDER = {
    "bfloat16": "float32",
    "float16": "float32",
    "uint8": "int32",
    "int8": "int32",
    "int16": "int32",
}

_SMALL_FLOATS = {"bfloat16", "float16"}

# Elements come out as they went in.  Besides what returns a view of its operand.
_MOVES = (
    *("_to_copy", "_unsafe_view", "clone", "contiguous", "copy", "lift_fresh_copy", "to", "type_as"),
    *(
        "cat",
        "stack",
        "flip",
        "roll",
        "rot90",
        "repeat",
        "repeat_interleave",
        "tile",
        "tril",
        "triu",
        "unfold",
    ),
    *("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "pixel_shuffle", "pixel_unshuffle"),
    *("empty", "empty_like", "fill", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like"),
    *("new_empty", "new_full", "new_ones", "new_zeros", "scalar_tensor"),
    *("embedding", "gather", "index", "index_copy", "index_fill", "index_put", "index_select", "take"),
    *("take_along_dim", "scatter", "diagonal_scatter", "select_scatter", "slice_scatter"),
    *("masked_fill", "masked_scatter", "masked_select", "nonzero", "where", "sort", "topk"),
)
_BOUNDS = ("aten::clamp", "aten::clamp_max", "aten::clamp_min")
_PRODUCTS = ("_int_mm", "bmm", "convolution", "dot", "matmul", "mm", "mv", "scaled_dot_product_attention")


def widen(function: ir.Operation) -> int:
    """Compute in 32 bits what ``function`` computes in fewer, in place; returns how many operations."""
    block, widening = torch_ir.block_of(function), _Widening()
    count = sum(widening.rewrite(op.operation) for op in list(block.operations))
    torch_ir.erase_dead(block)
    return count


@dataclass
class _Widening:
    """The rewriting of one block; what is read more than once is widened once."""

    _wide: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def rewrite(self, op: ir.Operation) -> bool:
        """Widen ``op`` if it computes in a narrow type, and tell whether it does."""
        schema = _computed(op)
        if schema is None:
            return False
        with ir.InsertionPoint(op), op.location:
            operands = [
                _wide_dtype(value) if argument.name == "dtype" else self._widened(value)
                for value, argument in zip(_rounded_numbers(op, schema), schema.arguments, strict=True)
            ]
            new = ir.Operation.create(
                op.name,
                results=[
                    _wide_type(result).torch() if _is_narrow(result) else result.type for result in op.results
                ],
                operands=operands,
                attributes={name: op.attributes[name] for name in op.attributes},
            )
            _replace(op, new)
        return True

    def _widened(self, value: ir.Value) -> ir.Value:
        if not _is_narrow(value):
            return value
        if value not in self._wide:
            self._wide[value] = _cast(value, _wide_type(value))
        return self._wide[value]


def _computed(op: ir.Operation) -> torch._C.FunctionSchema | None:
    """The schema of ``op`` if it computes elements in a narrow type."""
    name = torch_ir.op_name(op)
    found = overload(name)
    if found is None or not name.startswith("torch.aten.") or not any(map(torch_ir.tensor_type, op.results)):
        return None
    schema = found._schema
    moves = any(result.alias_info is not None for result in schema.returns)
    packet = schema.name.removeprefix("aten::")
    if moves or packet in _MOVES or packet in _PRODUCTS or len(schema.arguments) != len(op.operands):
        return None
    return schema if any(map(_is_narrow, (*op.operands, *op.results))) else None


def _rounded_numbers(op: ir.Operation, schema: torch._C.FunctionSchema) -> list[ir.Value]:
    """The operands of ``op``, a number among them rounded to the type of the tensor it meets.

    So PyTorch does on the CPU, whether it is a Python number or a tensor without axes; but a factor or a
    divisor stays a float32.
    """
    operands = list(op.operands)
    if schema.name in _BOUNDS and torch_ir.dtype_of(op.result) == "uint8":
        return [_rounded(value, "uint8") for value in operands]
    pair = [argument.name for argument in schema.arguments[:2]] == ["self", "other"]
    if not pair or schema.name == "aten::mul" or (schema.name == "aten::div" and len(operands) == 2):
        return operands
    dtypes = {type_.dtype for type_ in map(torch_ir.tensor_type, operands[:2]) if type_ and type_.shape}
    if len(dtypes) != 1 or not dtypes <= _SMALL_FLOATS | {"uint8"}:
        return operands
    numbers = [argument.name in ("self", "other", "alpha") for argument in schema.arguments]
    return [_rounded(v, *dtypes) if number else v for v, number in zip(operands, numbers, strict=True)]


def _rounded(value: ir.Value, dtype: str) -> ir.Value:
    type_, number = torch_ir.tensor_type(value), torch_ir.constant(value)
    if dtype == "uint8":
        return torch_ir.make_int(number % 256) if isinstance(number, int) and type_ is None else value
    if type_ is not None:
        return value if type_.shape else _cast(value, replace(type_, dtype=dtype))
    if not isinstance(number, float):
        return value
    return torch_ir.make_float(torch_ir.rounded(number, dtype))


def _is_narrow(value: ir.Value) -> bool:
    return torch_ir.dtype_of(value) in _WIDER


def _wide_type(value: ir.Value) -> torch_ir.TensorType:
    type_ = torch_ir.tensor_type(value)
    assert type_ is not None
    return replace(type_, dtype=_WIDER[type_.dtype])


def _wide_dtype(value: ir.Value) -> ir.Value:
    """A result's dtype, given as an argument, where that is narrow: the wider one."""
    dtype = torch_ir.dtype_constant(value)
    return torch_ir.make_dtype(_WIDER[dtype]) if dtype in _WIDER else value


def _cast(value: ir.Value, type_: torch_ir.TensorType) -> ir.Value:
    return torch_ir.make("torch.prims.convert_element_type", type_, [value, torch_ir.make_dtype(type_.dtype)])


def _replace(op: ir.Operation, new: ir.Operation) -> None:
    """Let ``new`` stand for ``op``, its results narrowed."""
    for old, result in zip(op.results, new.results, strict=True):
        type_ = torch_ir.tensor_type(old)
        narrow = result if type_ is None or old.type == result.type else _cast(result, type_)
        old.replace_all_uses_with(narrow)
    op.erase()
