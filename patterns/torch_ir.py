"""Read and build torch-dialect IR: types, constants, and the few operations passes create.

The IREE wheel registers the torch dialect without Python classes for it, so operations are
handled by name here, and nowhere else.
"""

from __future__ import annotations

import math
import re
import struct
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cmp_to_key, lru_cache
from typing import Any

from iree.compiler import ir

# For every operation handed to Python the bindings look for a module of its dialect, in the file system and
# again each time while there is none: nine tenths of the time of every pass.  Empty ones end the search.
for _dialect in ("torch", "torch_c"):
    _module = f"iree.compiler.dialects.{_dialect}"
    sys.modules.setdefault(_module, types.ModuleType(_module))

_VTENSOR = re.compile(r"!torch\.vtensor<\[([^\]]*)\],\s*([\w]+)>")

# MLIR's spelling of an element type, PyTorch's name of it, and the code torch ops pass around.
_ELEMENTS = (
    ("f64", "float64", 7),
    ("f32", "float32", 6),
    ("f16", "float16", 5),
    ("bf16", "bfloat16", 15),
    ("f8E4M3FN", "float8_e4m3fn", 24),
    ("f8E4M3FNUZ", "float8_e4m3fnuz", 26),
    ("f8E5M2", "float8_e5m2", 23),
    ("f8E8M0FNU", "float8_e8m0fnu", 44),
    ("si64", "int64", 4),
    ("si32", "int32", 3),
    ("si16", "int16", 2),
    ("si8", "int8", 1),
    ("ui8", "uint8", 0),
    ("i1", "bool", 11),
)
_DIGITS = re.compile(r"\d+")
_DTYPE_OF = {element: dtype for element, dtype, _ in _ELEMENTS}
_ELEMENT_OF = {dtype: element for element, dtype, _ in _ELEMENTS}
_CODE_OF = {dtype: code for _, dtype, code in _ELEMENTS}
_DTYPE_OF_CODE = {code: dtype for _, dtype, code in _ELEMENTS}
# PyTorch's names of what a tensor of a program can hold.
DTYPES = frozenset(_ELEMENT_OF)


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a torch value; a dimension is None when only known at run time."""

    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"

    def with_last(self, size: int, dtype: str | None = None) -> TensorType:
        return replace(self, shape=(*self.shape[:-1], size), dtype=dtype or self.dtype)

    @property
    def spelling(self) -> str:
        """``!torch.vtensor<[?,8],bf16>``"""
        dims = ",".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"!torch.vtensor<[{dims}],{_ELEMENT_OF[self.dtype]}>"

    def torch(self) -> ir.Type:
        """The type of a value of the torch dialect."""
        return ir.Type.parse(self.spelling)

    def builtin(self) -> ir.RankedTensorType:
        """``tensor<?x8xbf16>``"""
        dynamic = ir.ShapedType.get_dynamic_size()
        return ir.RankedTensorType.get(
            [dynamic if d is None else d for d in self.shape], element_type(self.dtype)
        )


def element_type(dtype: str) -> ir.Type:
    """The builtin element type of a PyTorch dtype name; integers are signless."""
    return ir.Type.parse(re.sub(r"^[su]i", "i", _ELEMENT_OF[dtype]))


@lru_cache(maxsize=4096)
def _parse_tensor_type(text: str) -> TensorType | None:
    found = _VTENSOR.fullmatch(text)
    if not found or found[2] not in _DTYPE_OF:
        return None
    dims = [dim.strip() for dim in found[1].split(",") if dim.strip()]
    return TensorType(tuple(None if dim == "?" else int(dim) for dim in dims), _DTYPE_OF[found[2]])


def tensor_type(value: ir.Value) -> TensorType | None:
    """The value's tensor type; None for scalars, lists and tensors of unknown rank or dtype."""
    return _parse_tensor_type(str(value.type))


def dtype_of(value: ir.Value) -> str | None:
    """The dtype of a tensor; None for anything else."""
    type_ = tensor_type(value)
    return type_.dtype if type_ is not None else None


def producer(value: ir.Value) -> ir.Operation | None:
    """The operation that makes ``value``; None for a block argument."""
    owner = value.owner
    return owner.operation if isinstance(owner, (ir.Operation, ir.OpView)) else None


def op_name(op: ir.Operation) -> str:
    """The operation's name; for ``torch.operator`` the name it carries."""
    if op.name == "torch.operator":
        return ir.StringAttr(op.attributes["name"]).value
    return op.name


# The sizes a dynamic tensor had for the example arguments, one array per result of its operation; and what
# torch.export called them.
_EXAMPLE = "example"
_FACTORS = "factors"


class ExampleSize(int):
    """A size that a tensor had for the example arguments, and the factors of torch.export's expression of it.

    Sizes with equal factors are equal in every call; () where nothing is known.
    """

    factors: tuple[str, ...]

    def __new__(cls, size: int, factors: Sequence[str] = ()) -> ExampleSize:
        made = super().__new__(cls, size)
        made.factors = tuple(factors)
        return made


def set_example(op: Any, shapes: Sequence[Sequence[int] | None], mlir: Any = ir) -> None:
    """Remember the example sizes of each result of ``op``; None (nothing known) is kept as ().

    mlir: the bindings that ``op`` is of, where they are another library's.
    """
    if any(shapes):
        sizes = [mlir.DenseI64ArrayAttr.get(list(shape or ())) for shape in shapes]
        factors = [["|".join(getattr(size, "factors", ())) for size in shape or ()] for shape in shapes]
        names = [mlir.ArrayAttr.get([mlir.StringAttr.get(text) for text in shape]) for shape in factors]
        op.attributes[_EXAMPLE] = mlir.ArrayAttr.get(sizes)
        op.attributes[_FACTORS] = mlir.ArrayAttr.get(names)


def example_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The sizes of ``value``: its static shape, or what the example arguments gave; None if unknown."""
    type_ = tensor_type(value)
    if type_ is not None and None not in type_.shape:
        return tuple(dim for dim in type_.shape if dim is not None)
    op = producer(value)
    attributes = op.attributes if op is not None else value.owner.owner.attributes
    if _EXAMPLE not in attributes:
        return None
    number = ir.OpResult(value).result_number if op is not None else ir.BlockArgument(value).arg_number
    sizes = ir.DenseI64ArrayAttr(ir.ArrayAttr(attributes[_EXAMPLE])[number])
    names = [ir.StringAttr(name).value for name in ir.ArrayAttr(ir.ArrayAttr(attributes[_FACTORS])[number])]
    return tuple(ExampleSize(s, n.split("|") if n else ()) for s, n in zip(sizes, names, strict=True)) or None


def example_bytes(value: ir.Value) -> int | None:
    """Bytes of a tensor of the example sizes; 0 for what is no tensor, None where sizes are unknown."""
    type_ = tensor_type(value)
    if type_ is None:
        return 0 if "tensor" not in str(value.type) else None
    shape = example_shape(value)
    return None if shape is None else math.prod(shape) * element_bytes(type_.dtype)


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a PyTorch dtype name."""
    return max(1, int(_DIGITS.findall(_ELEMENT_OF[dtype])[0]) // 8)


# On a function: the numbers of the arguments that have new values after a call.
_WRITTEN = "written"


def mark_written(function: ir.Operation, numbers: Sequence[int]) -> None:
    """Remember which arguments of ``function`` its model writes to."""
    if numbers:
        function.attributes[_WRITTEN] = ir.DenseI64ArrayAttr.get(list(numbers))


def is_written(argument: ir.Value) -> bool:
    """Tell whether a model writes to this argument of its function."""
    if producer(argument) is not None:
        return False
    attributes = argument.owner.owner.attributes
    number = ir.BlockArgument(argument).arg_number
    return _WRITTEN in attributes and number in list(ir.DenseI64ArrayAttr(attributes[_WRITTEN]))


def users(value: ir.Value) -> list[ir.Operation]:
    """Every operation that reads ``value``, once per use, in block order; not what is left over."""
    users = (use.owner.operation for use in value.uses)
    return in_block_order([op for op in users if not is_left_over(op)])


def in_block_order(ops: Iterable[ir.Operation]) -> list[ir.Operation]:
    """``ops``, of one block, in its order."""

    def order(a: ir.Operation, b: ir.Operation) -> int:
        return 0 if a == b else -1 if a.is_before_in_block(b) else 1

    return sorted(ops, key=cmp_to_key(order))


# On what a raised spelling was made of: whether something else still reads it.
_READ = "read"


def mark_raised(inside: Sequence[ir.Operation]) -> None:
    """Remember that the operations ``inside``, in block order, are what a recogniser took.

    They are not erased one by one, since other handles to them may be held.
    """
    for op in reversed(inside):
        read = any(users(result) for result in op.results)
        op.attributes[_READ] = ir.BoolAttr.get(read)


def unmark_raised(op: ir.Operation) -> bool:
    """Remove that mark, and tell whether it was there."""
    if _READ not in op.attributes:
        return False
    del op.attributes[_READ]
    return True


def is_left_over(op: ir.Operation) -> bool:
    """Tell whether ``op`` was part of a raised spelling and nothing reads it any more."""
    return _READ in op.attributes and not ir.BoolAttr(op.attributes[_READ]).value


def of_parameters(block: ir.Block) -> set[ir.Operation]:
    """The operations that depend on parameters and constants alone.  Valid until an operation is erased."""
    found = {op.operation for op in block.operations if op.operation.name == "util.global.load"}
    pending = list(found)
    while pending:
        for user in {use.owner.operation for result in pending.pop().results for use in result.uses} - found:
            if all(producer(v) in found or constant(v) is not NOT_CONSTANT for v in user.operands):
                found.add(user)
                pending.append(user)
    return found


NOT_CONSTANT = object()


def constant(value: ir.Value) -> Any:
    """The Python value of a torch constant: int, float, bool, str, None, a one-element tensor or a list.

    Returns NOT_CONSTANT for anything that is computed.
    """
    op = producer(value)
    reader = _CONSTANTS.get(op.name) if op is not None else None
    return reader(op) if op is not None and reader is not None else NOT_CONSTANT


def _one_element(op: ir.Operation) -> Any:
    elements = op.attributes["value"]
    single = isinstance(elements, ir.DenseElementsAttr) and len(elements) == 1
    return elements.get_splat_value().value if single else NOT_CONSTANT


def _items(op: ir.Operation) -> Any:
    items = [constant(operand) for operand in op.operands]
    return NOT_CONSTANT if any(item is NOT_CONSTANT for item in items) else items


def _folded(compute: Callable[..., float]) -> Callable[[ir.Operation], Any]:
    """Read a float32 of constants as it is computed: of float32 numbers, rounded to float32."""

    def read(op: ir.Operation) -> Any:
        values = [constant(operand) for operand in op.operands]
        if tensor_type(op.results[0]) != TensorType((), "float32"):
            return NOT_CONSTANT
        numbers = all(isinstance(value, (int, float)) for value in values)
        return to_float32(compute(*map(to_float32, values))) if numbers and values[-1] != 0 else NOT_CONSTANT

    return read


def _filled(op: ir.Operation) -> Any:
    """The number that fills a tensor without axes; of other dtypes than these one may hold another."""
    type_, number = tensor_type(op.results[0]), constant(op.operands[1])
    whole = type_ == TensorType((), "int32") and isinstance(number, int) and abs(number) < 1 << 31
    return number if whole or type_ == TensorType((), "float32") else NOT_CONSTANT


def to_float32(value: float) -> float:
    """``value`` rounded to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


_CONSTANTS: dict[str, Callable[[ir.Operation], Any]] = {
    "torch.aten.full": _filled,
    "torch.aten.neg": _folded(lambda a: -a),
    "torch.aten.reciprocal": _folded(lambda a: 1 / a),
    "torch.aten.div.Scalar": _folded(lambda a, b: a / b),
    "torch.aten.div.Tensor": _folded(lambda a, b: a / b),
    "torch.constant.int": lambda op: ir.IntegerAttr(op.attributes["value"]).value,
    "torch.constant.float": lambda op: ir.FloatAttr(op.attributes["value"]).value,
    "torch.constant.bool": lambda op: bool(ir.IntegerAttr(op.attributes["value"]).value),
    "torch.constant.str": lambda op: ir.StringAttr(op.attributes["value"]).value,
    "torch.constant.none": lambda op: None,
    "torch.vtensor.literal": _one_element,
    "torch.prim.ListConstruct": _items,
}


def widened_from(value: ir.Value) -> ir.Value:
    """The 16-bit tensor that ``value`` is as float32; ``value`` itself if it is no such cast.

    Between bfloat16 and float16 a cast rounds, whichever way it goes.
    """
    op = producer(value)
    if op is None or op.name != "torch.prims.convert_element_type":
        return value
    widens = dtype_of(op.operands[0]) in ("bfloat16", "float16") and dtype_of(value) == "float32"
    return op.operands[0] if widens else value


def rounded_later(value: ir.Value) -> ir.Value | None:
    """What the float32 ``value`` is rounded to 16 bits as; None if anything but one such cast reads it."""
    casts = users(value)
    if len(casts) != 1 or casts[0].name != "torch.prims.convert_element_type":
        return None
    narrow = dtype_of(casts[0].result) in ("bfloat16", "float16") and dtype_of(value) == "float32"
    return casts[0].result if narrow else None


def is_plain_add(op: ir.Operation) -> bool:
    """Tell whether ``op`` adds two tensors of one type, as they are."""
    if op.name != "torch.aten.add.Tensor" or constant(op.operands[2]) != 1:
        return False
    return op.operands[0].type == op.operands[1].type == op.result.type


def dominates(value: ir.Value, op: ir.Operation) -> bool:
    """Tell whether ``value`` is known where ``op`` stands, in the one block there is."""
    source = producer(value)
    return source is None or source.is_before_in_block(op)


def dtype_constant(value: ir.Value) -> str | None:
    """The dtype name a torch dtype code stands for; None when it is not a constant of a known dtype."""
    code = constant(value)
    return _DTYPE_OF_CODE.get(code) if isinstance(code, int) else None


def make_int(value: int) -> ir.Value:
    """Make a torch integer constant."""
    return _constant(
        "torch.constant.int", "!torch.int", ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)
    )


def rounded(value: float, dtype: str) -> float:
    """``value`` rounded to the float ``dtype``, by way of float32, as PyTorch does."""
    return ir.FloatAttr.get(element_type(dtype), to_float32(value)).value


def make_float(value: float) -> ir.Value:
    """Make a torch float constant."""
    return _constant("torch.constant.float", "!torch.float", ir.FloatAttr.get(ir.F64Type.get(), value))


def make_bool(value: bool) -> ir.Value:
    """Make a torch bool constant."""
    return _constant("torch.constant.bool", "!torch.bool", ir.BoolAttr.get(value))


def make_str(value: str) -> ir.Value:
    """Make a torch string constant."""
    return _constant("torch.constant.str", "!torch.str", ir.StringAttr.get(value))


def make_none() -> ir.Value:
    """Make the torch none constant."""
    return ir.Operation.create("torch.constant.none", results=[ir.Type.parse("!torch.none")]).result


def make_int_list(items: Sequence[ir.Value]) -> ir.Value:
    """Make a torch list of integers."""
    list_type = ir.Type.parse("!torch.list<int>")
    return ir.Operation.create("torch.prim.ListConstruct", results=[list_type], operands=list(items)).result


def make_dtype(dtype: str) -> ir.Value:
    """The constant torch ops take for a dtype."""
    return make_int(_CODE_OF[dtype])


def _constant(name: str, type_: str, value: ir.Attribute) -> ir.Value:
    return ir.Operation.create(name, results=[ir.Type.parse(type_)], attributes={"value": value}).result


def make(name: str, result: TensorType, operands: Sequence[ir.Value]) -> ir.Value:
    """Create an operation with one tensor result at the current insertion point."""
    return ir.Operation.create(name, results=[result.torch()], operands=list(operands)).result


def to_builtin(value: ir.Value) -> ir.Value:
    """A torch tensor as the builtin tensor it is."""
    type_ = tensor_type(value)
    assert type_ is not None, f"not a tensor: {value}"
    return ir.Operation.create(
        "torch_c.to_builtin_tensor", results=[type_.builtin()], operands=[value]
    ).result


def from_builtin(value: ir.Value, type_: TensorType) -> ir.Value:
    """A builtin tensor as a torch tensor of ``type_``."""
    return ir.Operation.create(
        "torch_c.from_builtin_tensor", results=[type_.torch()], operands=[value]
    ).result


# What a pass may erase when nobody reads it: everything in the torch dialect is functional here
# (the importer refuses mutation) except the checks, which have no results; so is linalg on tensors.
_PURE = ("torch.", "torch_c.", "util.global.load", "arith.", "tensor.", "linalg.")


def erase_dead(block: ir.Block) -> int:
    """Erase operations without readers, consumers before producers; returns how many went."""
    erased = 0
    for op in reversed([op.operation for op in block.operations]):
        pure = op.name.startswith(_PURE)
        if pure and op.results and not any(True for result in op.results for _ in result.uses):
            op.erase()
            erased += 1
    return erased


def block_of(function: ir.Operation) -> ir.Block:
    """The single block of a function imported from torch."""
    return function.regions[0].blocks[0]


_FRAME = re.compile(r'"([^"]+)":(\d+):\d+')
_OWN_FRAMES = re.compile(r"<|[/\\](lowering|patterns)([/\\]\w+)+\.py$|[/\\]torch[/\\]")


def location(op: ir.Operation) -> str:
    """``file:line`` of the model's source that ``op`` comes from."""
    return model_line(str(op.location))


def model_line(location: str) -> str:
    """``file:line`` of the model's source in a printed MLIR location.

    The innermost frame that is neither PyTorch's nor this package's; "unknown" when the importer
    recorded none (a model read from plain MLIR).
    """
    frames = _FRAME.findall(location)
    for file, line in frames:
        if not _OWN_FRAMES.search(file):
            return f"{file}:{line}"
    # Code that torch generates and compiles from memory is in no file.
    return next((f"{file}:{line}" for file, line in frames if not file.startswith("<")), "unknown")
