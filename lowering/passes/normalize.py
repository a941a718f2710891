"""Step 2, normalize: spell casts, views and splits in one way; drop checks, dead code and duplicates.

What torch.export adds for its own purposes (metadata assertions, aliases, clones of immutable
values) hides uses from the patterns; it goes here and nowhere else.  A tensor that is widened and
then viewed is viewed and then widened, so that ``x.float().view(..)`` and ``x.view(..).float()`` are
one thing; casts, views and constants that are there twice are merged, so that a pattern finds the same
value where a model writes the same expression again.
"""

from __future__ import annotations

from typing import Any

from iree.compiler import ir

from patterns import torch_ir, view_chains, views

from .regroup import multiply_whole_rows
from .scatters import compute_before_scatters

_CHECKS = (
    "torch.aten._assert_tensor_metadata",
    "torch.aten._assert_scalar",
    "torch.aten._assert_async.msg",
    "torch.aten.sym_constrain_range",
    "torch.aten.sym_constrain_range_for_size",
    "torch.bind_symbolic_shape",
)
_CASTS = {"torch.aten._to_copy": 1, "torch.aten.to.dtype": 1, "torch.prims.convert_element_type": 1}
_IDENTITIES = (
    "torch.aten.alias",
    "torch.aten.clone",
    "torch.aten.detach",
    "torch.aten.contiguous",
    "torch.aten.lift_fresh_copy",
)
_VIEWS = ("torch.aten._unsafe_view", "torch.aten.reshape")
# Besides constants and views.
_MERGED = ("torch.prim.ListConstruct", "torch.prims.convert_element_type")


def normalize(function: ir.Operation) -> None:
    """Bring the body of one imported function into normal form, in place."""
    block = torch_ir.block_of(function)
    for op in [op.operation for op in block.operations]:
        name = torch_ir.op_name(op)
        if name in _CHECKS:
            op.erase()
        elif name == "util.global.load":
            op.move_before(block.operations[0])
        elif name == "torch_c.from_builtin_tensor":
            _follow_operand(op)
        elif name in _CASTS:
            _normalize_cast(op)
        elif name in _IDENTITIES or _is_noop(op, name):
            op.result.replace_all_uses_with(op.operands[0])
        elif name in _VIEWS:
            _rename(op, "torch.aten.view")
        elif name == "torch.prim.ListUnpack":
            _split_to_slices(op)
    torch_ir.erase_dead(block)
    compute_before_scatters(block)
    multiply_whole_rows(block)
    _merge_equal(block)
    torch_ir.erase_dead(block)


def _merge_equal(block: ir.Block) -> None:
    """Views in a row are one, and stand before casts that widen; equal casts, views and constants are one."""
    first: dict[Any, ir.Value] = {}
    for op in [op.operation for op in block.operations]:
        if not _can_merge(op):
            continue
        if views.is_view(op) and (value := view_chains.composed(op)) is not None:
            op.result.replace_all_uses_with(value)
            op = torch_ir.producer(value)
            if op is None or not views.is_view(op):
                continue
        for each in _view_first(op) if views.is_view(op) else (op,):
            value = first.setdefault(_identity(each), each.result)
            if value != each.result:
                each.result.replace_all_uses_with(value)


def _can_merge(op: ir.Operation) -> bool:
    name = op.name
    return name.startswith("torch.constant.") or name in _MERGED or views.is_view(op)


def _identity(op: ir.Operation) -> Any:
    return op.name, tuple(op.operands), op.result.type, op.attributes.get("value", None)


def _view_first(view: ir.Operation) -> tuple[ir.Operation, ...]:
    """View first, then widen, where ``view`` is of something widened; returns both, or ``view`` alone."""
    narrow, wide = torch_ir.widened_from(view.operands[0]), torch_ir.tensor_type(view.result)
    if narrow == view.operands[0] or wide is None:
        return (view,)
    dtype = torch_ir.dtype_of(narrow)
    assert dtype is not None
    code = torch_ir.producer(view.operands[0]).operands[1]  # type: ignore[union-attr]
    with ir.InsertionPoint(view), view.location:
        first = torch_ir.make(
            view.name, torch_ir.TensorType(wide.shape, dtype), [narrow, *list(view.operands)[1:]]
        )
        cast = torch_ir.make("torch.prims.convert_element_type", wide, [first, code])
    makers = first.owner.operation, cast.owner.operation
    for maker in makers:
        torch_ir.set_example(maker, [torch_ir.example_shape(view.result)])
    view.result.replace_all_uses_with(cast)
    return makers


def _follow_operand(op: ir.Operation) -> None:
    """Parameters are known from the start: their casts stand right behind the (hoisted) loads."""
    source = torch_ir.producer(op.operands[0])
    if source is not None and source.name == "util.global.load":
        op.move_after(source)


def _normalize_cast(op: ir.Operation) -> None:
    source, dtype = op.operands[0], op.operands[_CASTS[op.name]]
    before, after = torch_ir.tensor_type(source), torch_ir.tensor_type(op.result)
    if before is None or after is None:
        return
    if before == after:
        op.result.replace_all_uses_with(source)
    elif torch_ir.constant(dtype) is not None and op.name != "torch.prims.convert_element_type":
        with ir.InsertionPoint(op), op.location:
            cast = torch_ir.make(
                "torch.prims.convert_element_type", after, [source, torch_ir.make_dtype(after.dtype)]
            )
        torch_ir.set_example(cast.owner.operation, [torch_ir.example_shape(op.result)])
        op.result.replace_all_uses_with(cast)


def _split_to_slices(unpack: ir.Operation) -> None:
    """The parts of a split are slices like any other."""
    split = torch_ir.producer(unpack.operands[0])
    if split is None or split.name != "torch.aten.split_with_sizes":
        return
    source, sizes, axis = split.operands[0], torch_ir.constant(split.operands[1]), split.operands[2]
    if sizes is torch_ir.NOT_CONSTANT:
        return
    example, start = torch_ir.example_shape(source), 0
    for size, part in zip(sizes, unpack.results, strict=True):
        type_ = torch_ir.tensor_type(part)
        assert type_ is not None
        with ir.InsertionPoint(unpack), unpack.location:
            bounds = [torch_ir.make_int(value) for value in (start, start + size, 1)]
            piece = torch_ir.make("torch.aten.slice.Tensor", type_, [source, axis, *bounds])
        if example is not None:  # the parts of a list have none of their own
            place = torch_ir.constant(axis) % len(example)
            torch_ir.set_example(piece.owner.operation, [(*example[:place], size, *example[place + 1 :])])
        part.replace_all_uses_with(piece)
        start += size


def _is_noop(op: ir.Operation, name: str) -> bool:
    """A view or expand to its own type; a slice of everything; a squeeze of nothing; a product with one."""
    if name in ("torch.aten.mul.Scalar", "torch.aten.div.Scalar"):
        return torch_ir.constant(op.operands[1]) == 1 and op.operands[0].type == op.result.type
    if name in ("torch.aten.view", *_VIEWS, "torch.aten.expand"):
        # One unknown size is settled by the others in a view; an expand may really repeat it.
        type_, unknown = torch_ir.tensor_type(op.result), 0 if name == "torch.aten.expand" else 1
        return (
            type_ is not None and type_.shape.count(None) <= unknown and op.operands[0].type == op.result.type
        )
    if name == "torch.aten.squeeze.dim":  # of an axis that is not of one element
        before, after = torch_ir.tensor_type(op.operands[0]), torch_ir.tensor_type(op.result)
        return before is not None and after is not None and len(before.shape) == len(after.shape)
    if name == "torch.aten.slice.Tensor":
        start, end, step = (torch_ir.constant(operand) for operand in list(op.operands)[2:])
        return start in (0, None) and end in (None, 2**63 - 1) and step == 1
    return False


def _rename(op: ir.Operation, name: str) -> None:
    with ir.InsertionPoint(op), op.location:
        new = ir.Operation.create(name, results=[op.result.type], operands=list(op.operands))
    torch_ir.set_example(new, [torch_ir.example_shape(op.result)])
    op.result.replace_all_uses_with(new.result)
