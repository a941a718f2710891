"""Respell sorts and top-k as ranks, which need no operand to be updated in place.

IREE's sort swaps neighbours in the very tensor it is given, and two sorts of one program may be given the
same one.  Here an element's rank is the number of elements that stand before it, those that are smaller and,
of the equal ones, those with a smaller index; the r-th result is the element of rank r.  It takes as many
comparisons as a sort by insertion, but each is independent of all others.

Elements are compared as integers made from their bits, in torch's order: a NaN is larger than everything and
equal to every other NaN, and the two zeros are equal.
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg, tensor

from patterns import torch_ir

from . import tensors

_LESS, _AT_MOST = arith.CmpIPredicate.slt, arith.CmpIPredicate.sle


def _sort(op: ir.Operation, axis: int, descending: int) -> list[ir.Value] | None:
    flag = torch_ir.constant(op.operands[descending])
    return _ranked(op, op.operands[axis], flag, None) if isinstance(flag, bool) else None


def _topk(op: ir.Operation) -> list[ir.Value] | None:
    largest = torch_ir.constant(op.operands[3])
    if not isinstance(largest, bool):
        return None
    return _ranked(op, op.operands[2], largest, lambda: tensors.from_torch_int(op.operands[1]))


def _kthvalue(op: ir.Operation) -> list[ir.Value] | None:
    """The k-th smallest: the element of one rank."""
    source, axis = torch_ir.tensor_type(op.operands[0]), torch_ir.constant(op.operands[2])
    if source is None or not source.shape or not isinstance(axis, int):
        return None
    axis %= len(source.shape)
    first = tensors.from_torch_int(op.operands[1])
    first = arith.SubIOp(first, tensors.index(1)).result
    value = torch_ir.to_builtin(op.operands[0])
    index = _of_ranks(_ranks(_apart(_keys(value, source.dtype, False)), axis), axis, 1, first)
    made = []
    for result, taken in zip(op.results, (_taken(value, index, axis), _widened(index)), strict=True):
        wanted = torch_ir.tensor_type(result)
        assert wanted is not None
        if len(wanted.shape) < len(source.shape):
            taken = _without(taken, axis)
        made.append(torch_ir.from_builtin(tensors.cast(taken, wanted.builtin()), wanted))
    return made


def _ranked(
    op: ir.Operation, axis: ir.Value, descending: bool, count: Callable[[], ir.Value] | None
) -> list[ir.Value] | None:
    """The elements of the first ranks along an axis, and their indices; of all ranks without ``count``."""
    source, number = torch_ir.tensor_type(op.operands[0]), torch_ir.constant(axis)
    types = [torch_ir.tensor_type(result) for result in op.results]
    if source is None or not isinstance(number, int) or None in types:
        return None
    value = torch_ir.to_builtin(op.operands[0])
    if not source.shape:
        zero = arith.ConstantOp(ir.IntegerType.get_signless(64), 0).result
        results = [value, tensor.FromElementsOp(types[1].builtin(), [zero]).result]  # type: ignore[union-attr]
    else:
        number %= len(source.shape)
        wanted = types[0].shape[number]  # type: ignore[union-attr]
        length = wanted if wanted is not None else count() if count else tensors.sizes(value)[number]
        keys = _apart(_keys(value, source.dtype, descending))
        index = _of_ranks(_ranks(keys, number), number, length)
        results = [_taken(value, index, number), _widened(index)]
    return [
        torch_ir.from_builtin(tensors.cast(result, type_.builtin()), type_)  # type: ignore[union-attr]
        for result, type_ in zip(results, types, strict=True)
    ]


def _keys(value: ir.Value, dtype: str, descending: bool) -> ir.Value:
    """Integers in the order of the elements, or in the opposite one."""
    shape = tensors.sizes(value)
    width = 64 if dtype in ("int64", "float64") else 32
    type_ = ir.IntegerType.get_signless(width)

    def key(element: ir.Value, _: ir.Value) -> ir.Value:
        made = _float_key(element, type_) if "float" in dtype else _integer_key(element, dtype, type_)
        return arith.XOrIOp(made, _number(-1, type_)).result if descending else made

    same = ir.AffineMap.get_identity(len(shape))
    init = tensors.empty(shape, type_)
    return tensors.generic([value], init, [same, same], [tensors.PARALLEL] * len(shape), key)


def _integer_key(element: ir.Value, dtype: str, type_: ir.Type) -> ir.Value:
    if element.type == type_:
        return element
    unsigned = dtype in ("bool", "uint8")
    return (arith.ExtUIOp if unsigned else arith.ExtSIOp)(type_, element).result


def _float_key(element: ir.Value, type_: ir.IntegerType) -> ir.Value:
    """The bits of a float, those below the sign turned where it is negative."""
    wide = ir.F64Type.get() if type_.width == 64 else ir.F32Type.get()
    if element.type != wide:
        element = arith.ExtFOp(wide, element).result
    largest = (1 << (type_.width - 1)) - 1
    infinity = 0x7F800000 if type_.width == 32 else 0x7FF << 52
    bits = arith.BitcastOp(type_, element).result
    magnitude = arith.AndIOp(bits, _number(largest, type_)).result
    negative = arith.CmpIOp(_LESS, bits, _number(0, type_)).result
    key = arith.SelectOp(negative, arith.SubIOp(_number(0, type_), magnitude).result, magnitude).result
    is_nan = arith.CmpIOp(_LESS, _number(infinity, type_), magnitude).result
    return arith.SelectOp(is_nan, _number(largest, type_), key).result


def _number(value: int, type_: ir.Type) -> ir.Value:
    return arith.ConstantOp(type_, value).result


def _apart(keys: ir.Value) -> ir.Value:
    """Have ``keys`` computed before they are compared: once, and not for each pair.

    IREE's code generation for NVIDIA GPUs does not come to an end where they are made of bfloat16 meanwhile.
    """
    dynamic = [size for size in tensors.sizes(keys) if not isinstance(size, int)]
    barrier = "iree_tensor_ext.compute_barrier.start"
    return ir.Operation.create(barrier, results=[keys.type], operands=[keys, *dynamic]).result


def _ranks(keys: ir.Value, axis: int) -> ir.Value:
    """For each element, how many along ``axis`` stand before it."""
    shape, i32 = tensors.sizes(keys), ir.IntegerType.get_signless(32)
    rank = len(shape)
    this = ir.AffineMap.get(rank + 1, 0, _axes(rank))
    other = ir.AffineMap.get(rank + 1, 0, _axes(rank, axis))

    def counted(mine: ir.Value, theirs: ir.Value, count: ir.Value) -> ir.Value:
        is_earlier = arith.CmpIOp(arith.CmpIPredicate.ult, _place(rank), _place(axis)).result
        equal_too = arith.CmpIOp(_AT_MOST, theirs, mine).result
        smaller = arith.CmpIOp(_LESS, theirs, mine).result
        before = arith.SelectOp(is_earlier, equal_too, smaller).result
        return arith.AddIOp(count, arith.ExtUIOp(i32, before).result).result

    kinds = [tensors.PARALLEL] * rank + [tensors.REDUCTION]
    return tensors.generic([keys, keys], _zeros(shape, i32), [this, other, this], kinds, counted)


def _of_ranks(ranks: ir.Value, axis: int, length: tensors.Size, first: ir.Value | None = None) -> ir.Value:
    """The index along ``axis`` of the elements of ``length`` ranks, from ``first`` on."""
    shape, i32 = tensors.sizes(ranks), ir.IntegerType.get_signless(32)
    rank = len(shape)
    result = ir.AffineMap.get(rank + 1, 0, _axes(rank))
    other = ir.AffineMap.get(rank + 1, 0, _axes(rank, axis))

    def found(its: ir.Value, index: ir.Value) -> ir.Value:
        wanted = _place(axis)
        wanted = wanted if first is None else arith.AddIOp(wanted, first).result
        is_it = arith.CmpIOp(arith.CmpIPredicate.eq, its, arith.IndexCastOp(i32, wanted).result).result
        place = arith.IndexCastOp(i32, _place(rank)).result
        return arith.AddIOp(index, arith.SelectOp(is_it, place, _number(0, i32)).result).result

    kinds = [tensors.PARALLEL] * rank + [tensors.REDUCTION]
    init = _zeros([*shape[:axis], length, *shape[axis + 1 :]], i32)
    return tensors.generic([ranks], init, [other, result], kinds, found)


def _taken(value: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    """The elements of ``value`` at ``index`` along ``axis``."""
    shape = tensors.sizes(index)
    same = ir.AffineMap.get_identity(len(shape))

    def taken(place: ir.Value, _: ir.Value) -> ir.Value:
        places = [_place(number) for number in range(len(shape))]
        places[axis] = arith.IndexCastOp(ir.IndexType.get(), place).result
        return tensor.ExtractOp(value, places).result

    init = tensors.empty(shape, ir.RankedTensorType(value.type).element_type)
    return tensors.generic([index], init, [same, same], [tensors.PARALLEL] * len(shape), taken)


def _widened(index: ir.Value) -> ir.Value:
    shape, i64 = tensors.sizes(index), ir.IntegerType.get_signless(64)
    same = ir.AffineMap.get_identity(len(shape))
    kinds = [tensors.PARALLEL] * len(shape)
    init = tensors.empty(shape, i64)
    return tensors.generic([index], init, [same, same], kinds, lambda x, _: arith.ExtSIOp(i64, x).result)


def _without(value: ir.Value, axis: int) -> ir.Value:
    """``value`` without an axis, which has one element."""
    rank = ir.RankedTensorType(value.type).rank
    if rank == 1:
        return tensors.collapse(value, [])
    start = min(axis, rank - 2)
    pairs = [[number] for number in range(start)] + [[start, start + 1]]
    return tensors.collapse(value, pairs + [[number] for number in range(start + 2, rank)])


def _axes(rank: int, moved: int | None = None) -> list[ir.AffineExpr]:
    """The axes of a tensor among those of a loop over it; ``moved`` is the loop's last one."""
    return [ir.AffineExpr.get_dim(rank if axis == moved else axis) for axis in range(rank)]


def _place(axis: int) -> ir.Value:
    return linalg.IndexOp(axis).result


def _zeros(shape: list[tensors.Size], element: ir.Type) -> ir.Value:
    return linalg.fill(_number(0, element), outs=[tensors.empty(shape, element)])


RULES = {
    "torch.aten.sort": lambda op: _sort(op, 1, 2),
    "torch.aten.sort.stable": lambda op: _sort(op, 2, 3),
    "torch.aten.topk": _topk,
    "torch.aten.kthvalue": _kthvalue,
}
