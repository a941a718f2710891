"""Give torch-mlir indices as it takes them: counted from the front, int64, no masks; nothing over nothing.

It reads other forms as something else, or dies of them.  Most rules mend an operation where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg, tensor

from patterns import torch_ir
from patterns.torch_ir import TensorType

from . import tensors


def _count_from_front(op: ir.Operation) -> None:
    """Count the axis of a scatter from the front."""
    source, axis = torch_ir.tensor_type(op.operands[0]), torch_ir.constant(op.operands[1])
    if source is not None and isinstance(axis, int) and axis < 0:
        op.operands[1] = torch_ir.make_int(axis % max(len(source.shape), 1))


def spelled(op: ir.Operation) -> list[ir.Value | None] | None:
    """A mask as the places where it is set, and narrower indices widened; the indices, if they are known."""
    given = torch_ir.producer(op.operands[1])
    if given is None or given.name != "torch.prim.ListConstruct":
        return None
    found: list[ir.Value] = []
    for index in given.operands:
        type_ = torch_ir.tensor_type(index)
        if type_ is None or type_.dtype == "int64":
            found.append(index)
        elif type_.dtype == "bool":
            found.extend(_places(index, len(type_.shape)))
        else:
            code = torch_ir.make_dtype("int64")
            wide = TensorType(type_.shape, "int64")
            found.append(torch_ir.make("torch.prims.convert_element_type", wide, [index, code]))
    if found != list(given.operands):
        op.operands[1] = _listed(found)
    return [index if torch_ir.tensor_type(index) is not None else None for index in found]


def _listed(indices: list[ir.Value]) -> ir.Value:
    optional = ir.Type.parse("!torch.list<optional<vtensor>>")
    return ir.Operation.create("torch.prim.ListConstruct", results=[optional], operands=indices).result


def _count_indices_from_front(op: ir.Operation) -> None:
    """Count from the front the indices of an update, each along an axis of the first operand.

    Several axes of indices become one, of indices and values alike: torch-mlir does so itself, and takes the
    second unknown size for 1.
    """
    indices = spelled(op)
    known = {
        axis: torch_ir.to_builtin(index) for axis, index in enumerate(indices or ()) if index is not None
    }
    if not known:
        return
    sizes, shape = tensors.sizes(torch_ir.to_builtin(op.operands[0])), broadcast(list(known.values()))
    given = list(torch_ir.producer(op.operands[1]).operands)  # type: ignore[union-attr]
    for axis, index in known.items():
        given[axis] = _torch(_in_one_axis(_from_front(index, sizes[axis], shape), 0, len(shape)), "int64")
    op.operands[1] = _listed(given)
    values = torch_ir.tensor_type(op.operands[2])
    if len(shape) > 1 and values is not None:
        first, full = _with_indexed(sizes, list(known), shape)
        whole = _broadcast_to(torch_ir.to_builtin(op.operands[2]), full)
        op.operands[2] = _torch(_in_one_axis(whole, first, len(shape)), values.dtype)


def _from_front(index: ir.Value, size: tensors.Size, shape: Sequence[tensors.Size]) -> ir.Value:
    """``index``, which may count from the end of an axis of ``size``, with this ``shape``."""
    element = ir.IntegerType.get_signless(64)
    return _broadcast_to(index, shape, lambda at: arith.IndexCastOp(element, wrapped(at, size)).result)


def _broadcast_to(
    value: ir.Value, shape: Sequence[tensors.Size], change: Callable[[ir.Value], ir.Value] = lambda x: x
) -> ir.Value:
    """``value``, each element changed, with this shape: what has one element along an axis is repeated."""
    rank = len(shape)
    maps = [aligned(value, 0, rank, rank), ir.AffineMap.get_identity(rank)]
    init = tensors.empty(shape, ir.RankedTensorType(value.type).element_type)
    return tensors.generic([value], init, maps, [tensors.PARALLEL] * rank, lambda x, _: change(x))


def _in_one_axis(value: ir.Value, first: int, count: int) -> ir.Value:
    """``value`` with ``count`` axes from ``first`` on as one; as it is where they are one or none."""
    rank = ir.RankedTensorType(value.type).rank
    if count < 2:
        return value
    behind = [[axis] for axis in range(first + count, rank)]
    return tensors.collapse(
        value, [[axis] for axis in range(first)] + [[*range(first, first + count)]] + behind
    )


def _torch(value: ir.Value, dtype: str) -> ir.Value:
    sizes = tensors.sizes(value)
    return torch_ir.from_builtin(
        value, TensorType(tuple(size if isinstance(size, int) else None for size in sizes), dtype)
    )


def _with_indexed(
    sizes: Sequence[tensors.Size], axes: Sequence[int], shape: Sequence[tensors.Size]
) -> tuple[int, list[tensors.Size]]:
    """Where the axes of indices stand among those left alone, and the sizes of all of them.

    Where the first of the indexed ones does if they are next to each other, else in front.
    """
    first = 0 if axes[-1] - axes[0] >= len(axes) else axes[0]
    found = [size for axis, size in enumerate(sizes) if axis not in axes]
    found[first:first] = shape
    return first, found


def _indexed(op: ir.Operation) -> list[ir.Value] | None:
    """Several indices together, which torch-mlir takes only where their sizes are known."""
    indices, result = spelled(op), torch_ir.tensor_type(op.result)
    if indices is None or result is None or sum(index is not None for index in indices) < 2:
        return None
    if any("complex" in str(value.type) for value in (op.operands[0], op.result)):
        return None
    value = torch_ir.to_builtin(op.operands[0])
    known = [None if index is None else torch_ir.to_builtin(index) for index in indices]
    gathered = _gather(value, [*known, *[None] * (ir.RankedTensorType(value.type).rank - len(known))])
    return [torch_ir.from_builtin(tensors.cast(gathered, result.builtin()), result)]


def _gather(value: ir.Value, indices: list[ir.Value | None]) -> ir.Value:
    """The elements of ``value`` at indices along some of its axes."""
    given = [axis for axis, index in enumerate(indices) if index is not None]
    shape = broadcast([index for index in indices if index is not None])
    kept = [axis for axis, index in enumerate(indices) if index is None]
    sizes = tensors.sizes(value)
    first, result = _with_indexed(sizes, given, shape)
    # The axis of the result that each axis left alone has become.
    place = {axis: number if number < first else number + len(shape) for number, axis in enumerate(kept)}
    maps = [aligned(index, first, len(shape), len(result)) for index in indices if index is not None]

    def gathered(*elements: ir.Value) -> ir.Value:
        at = dict(zip(given, elements, strict=False))
        places = [
            wrapped(at[axis], sizes[axis]) if axis in at else linalg.IndexOp(place[axis]).result
            for axis in range(len(sizes))
        ]
        return tensor.ExtractOp(value, places).result

    return tensors.generic(
        [index for index in indices if index is not None],
        tensors.empty(result, ir.RankedTensorType(value.type).element_type),
        [*maps, ir.AffineMap.get_identity(len(result))],
        [tensors.PARALLEL] * len(result),
        gathered,
    )


def broadcast(indices: list[ir.Value]) -> list[tensors.Size]:
    """The common shape of indices: sizes that are known to be 1 give way, and known ones are preferred."""
    shapes = [tensors.sizes(index) for index in indices]
    rank = max(map(len, shapes))
    found: list[tensors.Size] = []
    for axis in range(-rank, 0):
        sizes = [shape[axis] for shape in shapes if len(shape) >= -axis]
        sizes = [size for size in sizes if size != 1] or [1]
        found.append(next((size for size in sizes if isinstance(size, int)), sizes[0]))
    return found


def aligned(index: ir.Value, first: int, rank: int, loops: int) -> ir.AffineMap:
    """Map loops to where an index is read, whose axes are the last of the ``rank`` from ``first`` on."""
    type_ = ir.RankedTensorType(index.type)
    start = first + rank - type_.rank
    places = [
        ir.AffineExpr.get_constant(0) if type_.shape[axis] == 1 else ir.AffineExpr.get_dim(start + axis)
        for axis in range(type_.rank)
    ]
    return ir.AffineMap.get(loops, 0, places)


def wrapped(element: ir.Value, size: tensors.Size) -> ir.Value:
    """An index that may count from the end."""
    place = arith.IndexCastOp(ir.IndexType.get(), element).result
    from_end = arith.AddIOp(place, tensors.index(size)).result
    negative = arith.CmpIOp(arith.CmpIPredicate.slt, place, tensors.index(0)).result
    return arith.SelectOp(negative, from_end, place).result


def _places(mask: ir.Value, rank: int) -> list[ir.Value]:
    """The indices along each axis of the elements that are set."""
    places = torch_ir.make("torch.aten.nonzero", TensorType((None, rank), "int64"), [mask])
    one = torch_ir.make_int(1)
    return [
        torch_ir.make(
            "torch.aten.select.int", TensorType((None,), "int64"), [places, one, torch_ir.make_int(axis)]
        )
        for axis in range(rank)
    ]


def _selected(op: ir.Operation) -> list[ir.Value] | None:
    """The elements where a mask is set; torch-mlir has no form of it for a mask of another shape."""
    source, mask = (torch_ir.tensor_type(value) for value in list(op.operands)[:2])
    result = torch_ir.tensor_type(op.result)
    if source is None or mask is None or result is None or source.shape != mask.shape:
        return None
    places = [torch_ir.to_builtin(place) for place in _places(op.operands[1], len(mask.shape))]
    gathered = _gather(torch_ir.to_builtin(op.operands[0]), [*places])
    return [torch_ir.from_builtin(tensors.cast(gathered, result.builtin()), result)]


def _rank_of_mask(op: ir.Operation) -> None:
    """The mask of an attention has the leading axes of its query, of size 1."""
    query, mask = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(op.operands[3])
    while query is not None and mask is not None and len(mask.shape) < len(query.shape):
        mask = TensorType((1, *mask.shape), mask.dtype)
        op.operands[3] = torch_ir.make("torch.aten.unsqueeze", mask, [op.operands[3], torch_ir.make_int(0)])


def _over_nothing(op: ir.Operation) -> list[ir.Value] | None:
    """A sum of no products is zero."""
    a, b = list(op.operands)[:2]
    before, result = torch_ir.tensor_type(a), torch_ir.tensor_type(op.result)
    if before is None or result is None or before.shape[-1:] != (0,) or len(result.shape) < 2:
        return None
    last = 0 if op.name == "torch.aten.linear" else -1
    sizes = [*tensors.sizes(torch_ir.to_builtin(a))[:-1], tensors.sizes(torch_ir.to_builtin(b))[last]]
    total = zeros(result, sizes)
    if op.name == "torch.aten.linear" and torch_ir.tensor_type(op.operands[2]) is not None:
        total = torch_ir.make("torch.aten.add.Tensor", result, [total, op.operands[2], torch_ir.make_int(1)])
    return [total]


def _added_to_nothing(op: ir.Operation) -> list[ir.Value] | None:
    """``addmm``: what is added to a sum of no products."""
    addend, a, b, beta, _ = op.operands
    before, result = torch_ir.tensor_type(a), torch_ir.tensor_type(op.result)
    if before is None or result is None or before.shape[-1:] != (0,):
        return None
    sizes = [tensors.sizes(torch_ir.to_builtin(a))[0], tensors.sizes(torch_ir.to_builtin(b))[1]]
    return [torch_ir.make("torch.aten.add.Tensor", result, [zeros(result, sizes), addend, beta])]


def zeros(type_: TensorType, sizes: Sequence[tensors.Size]) -> ir.Value:
    """Zeros of a type and these sizes."""
    builtin = type_.builtin()
    element = builtin.element_type
    is_float = not isinstance(element, ir.IntegerType)
    zero = ir.FloatAttr.get(element, 0.0) if is_float else ir.IntegerAttr.get(element, 0)
    filled = linalg.fill(arith.ConstantOp(element, zero).result, outs=[tensors.empty(sizes, element)])
    return torch_ir.from_builtin(tensors.cast(filled, builtin), type_)


_INDEXINGS = (
    "torch.aten.index.Tensor",
    "torch.aten.index.Tensor_hacked_twin",
    "torch.aten._unsafe_index.Tensor",
)
_MENDED = {
    "torch.aten.scatter.src": _count_from_front,
    "torch.aten.scatter.value": _count_from_front,
    "torch.aten.scatter.reduce": _count_from_front,
    "torch.aten.scatter_add": _count_from_front,
    "torch.aten.scatter_reduce.two": _count_from_front,
    "torch.aten.index_put": _count_indices_from_front,
    "torch.aten.index_put.hacked_twin": _count_indices_from_front,
    "torch.aten.scaled_dot_product_attention": _rank_of_mask,
}

RULES: dict[str, Callable[[ir.Operation], list[ir.Value] | None]] = {
    **_MENDED,  # type: ignore[dict-item]
    **dict.fromkeys(_INDEXINGS, _indexed),
    "torch.aten.masked_select": _selected,
    "torch.aten.mm": _over_nothing,
    "torch.aten.bmm": _over_nothing,
    "torch.aten.matmul": _over_nothing,
    "torch.aten.linear": _over_nothing,
    "torch.aten.addmm": _added_to_nothing,
}
