"""Read what an attention computes, of which tensors, and give those of few queries to kernels.

A kernel takes sizes that are known: what a cache of a fixed capacity has when one token is decoded.  The mask
says which keys are looked at, and keys that no query looks at are not read, so a call takes the time of those
that are filled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir, views
from .operation import Operation, PatternFamily, Support, Types
from .sites import Ledger
from .torch_ir import TensorType

ATTENTION = "torch.aten.scaled_dot_product_attention"


@dataclass(frozen=True)
class Attention:
    """Hold what an attention says besides its tensors: query, key and value, and a mask if ``masked``."""

    masked: bool
    causal: bool
    scale: float | None
    grouped: bool

    def axes(self, ranks: list[int]) -> list[list[str]]:
        """Names of the axes of the operands, by rank: what has one name has one size, or size 1."""
        ends = [("queries", "depth"), ("keys", "depth"), ("keys", "width"), ("queries", "keys")]
        return [
            [f"leading{rank - axis}" for axis in range(rank - 2)] + list(end)
            for rank, end in zip(ranks, ends[: len(ranks)], strict=True)
        ]


def attention(op: ir.Operation) -> Attention | None:
    """Read what ``op`` computes; None if it is no attention, or one whose attributes are not constants."""
    if torch_ir.op_name(op) != ATTENTION:
        return None
    mask, dropout, causal, scale, grouped = list(op.operands)[3:]
    values = [torch_ir.constant(value) for value in (dropout, causal, grouped)]
    size = torch_ir.constant(scale)
    if values[0] != 0 or not all(isinstance(flag, bool) for flag in values[1:]):
        return None
    if size is None and str(scale.type) != "!torch.none":
        return None
    return Attention(torch_ir.tensor_type(mask) is not None, values[1], size, values[2])


def tensors(op: ir.Operation) -> list[ir.Value]:
    """The operands of an attention that are tensors."""
    return [operand for operand in op.operands if torch_ir.tensor_type(operand) is not None]


def shared(op: ir.Operation, found: Attention) -> tuple[Attention, list[ir.Value]]:
    """What ``op`` computes of which tensors: keys and values before the model repeats their heads."""
    query, key, value, *mask = operands = tensors(op)
    keys, values = _repeated(key), _repeated(value)
    if found.grouped or keys is None or values is None or _heads(keys) != _heads(values):
        return found, operands
    return replace(found, grouped=True), [query, keys, values, *mask]


def _heads(value: ir.Value) -> int | None:
    type_ = torch_ir.tensor_type(value)
    return type_ and type_.shape[-3]


def _repeated(value: ir.Value) -> ir.Value | None:
    """The x [.., KV, S, E] of which ``value`` [.., H, S, E] has each head several times in a row, or None."""
    whole, flat = torch_ir.tensor_type(value), torch_ir.producer(value)
    if whole is None or flat is None or not views.is_flat_view(flat):
        return None
    expanded = torch_ir.producer(flat.operands[0])
    if expanded is None or expanded.name != "torch.aten.expand":
        return None
    apart = torch_ir.producer(expanded.operands[0])
    if apart is None or not views.is_flat_view(apart) or _is_slice(apart.operands[0]):
        return None
    before, between, after = (
        torch_ir.tensor_type(each) for each in (apart.operands[0], apart.result, expanded.result)
    )
    if before is None or between is None or after is None or len(before.shape) < 3:
        return None
    *leading, heads, length, size = before.shape
    times = after.shape[-3]
    if heads is None or times is None or list(leading).count(None) + (length is None) > 1:
        return None
    expected = [
        (between, [*leading, heads, 1, length, size]),
        (after, [*leading, heads, times, length, size]),
        (whole, [*leading, heads * times, length, size]),
    ]
    return apart.operands[0] if all(list(type_.shape) == shape for type_, shape in expected) else None


def _is_slice(value: ir.Value) -> bool:
    """Tell whether ``value`` is part of a tensor: IREE copies that for a product, and a cache would move."""
    owner = torch_ir.producer(value)
    return owner is not None and owner.name == "torch.aten.slice.Tensor"


# -- kernels ---------------------------------------------------------------------------------------

_PART = 64
"""Keys that a workgroup looks at."""


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of few queries over a fixed number of keys, in two kernels: of parts of them, and of these.

    Reads q [batch * heads * queries, depth], k [batch * shared * keys, depth] and v [batch * shared * keys,
    width], in ``dtype``, and a float32 mask [product of ``mask``, keys] if it has one: a row for each
    sequence, head and query, or one for all of them where that size is 1.  ``heads`` / ``shared`` heads in a
    row have the same keys.  Writes out [batch * heads * queries, width] in ``dtype``:

        out = sum over keys of p * v / sum over keys of p,  p = e^(s - largest s),  s = q . k * scale + mask

    in float32, in an order of the kernel's own, rounded once; p below e^-85 is 0, and so is out where every s
    is -inf.  Vectors of keys that the mask takes from every query are not read, whatever is there.

    Parts of ``part`` keys are written first, float32 [batch * heads * queries, parts * (width + 2)]: of each
    the sums of p * v and of p, for the largest s of its own, and that.  ``joined`` reads them and writes out.
    """

    batch: int
    heads: int
    shared: int
    queries: int
    keys: int
    depth: int
    width: int
    dtype: str
    scale: float
    mask: tuple[int, ...] = ()
    part: int = _PART
    joined: bool = False

    @property
    def parts(self) -> int:
        return -(-self.keys // self.part)

    @property
    def rows(self) -> int:
        """Rows of q and of the result."""
        return self.batch * self.heads * self.queries

    @property
    def row_parts(self) -> int:
        """Elements of a row of parts."""
        return self.parts * (self.width + 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fuse_attention(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Give every attention to kernels where the target has them; the others are IREE's and no sites."""
    for op in [op.operation for op in block.operations]:
        found = attention(op)
        if found is not None:
            _fuse(op, *shared(op, found), support)


def _fuse(op: ir.Operation, found: Attention, operands: Sequence[ir.Value], support: Support) -> None:
    spec = _spec(op, found, operands)
    if spec is None or support(spec) is not None:
        return
    result = torch_ir.tensor_type(op.results[0])
    assert result is not None
    rows, count = [spec.rows, *[spec.batch * spec.shared * spec.keys] * 2], math.prod(spec.mask)
    with ir.InsertionPoint(op), op.location:
        given = [_matrix(value, n) for value, n in zip(operands, rows, strict=False)]
        given += [_matrix(_additive(value), count) for value in operands[3:]]
        parts = _made(spec, given, TensorType((spec.rows, spec.row_parts), "float32"))
        joined = replace(spec, joined=True)
        out = _made(joined, [parts], TensorType((spec.rows, spec.width), spec.dtype))
        op.results[0].replace_all_uses_with(_viewed(out, result.shape))
    op.erase()


def _made(spec: AttentionSpec, operands: Sequence[ir.Value], result: TensorType) -> ir.Value:
    attributes = {"spec": canonical.to_attribute(spec), canonical.SITES: ir.ArrayAttr.get([])}
    return canonical.create(canonical.ATTENTION, operands, [result], **attributes).result


def _spec(op: ir.Operation, found: Attention, operands: Sequence[ir.Value]) -> AttentionSpec | None:
    """Read what ``op`` computes; None where a size is not known, or it is of no form that a kernel has."""
    types = [torch_ir.tensor_type(value) for value in (*operands, *op.results)]
    shapes = [_sizes(type_, 4) for type_ in types]
    if found.causal or None in shapes:
        return None
    q, k, v, *mask, out = [shape for shape in shapes if shape is not None]
    dtypes = {type_.dtype for type_ in (*types[:3], types[-1]) if type_ is not None}
    (batch, heads, queries, depth), (keys, width) = q, v[2:]
    kept = (batch, k[1], keys)
    fits = (
        k == (*kept, depth)
        and v == (*kept, width)
        and out == (batch, heads, queries, width)
        and k[1] > 0
        and heads % k[1] == 0
        and all(m[3] == keys for m in mask)
        and all(size in (1, whole) for m in mask for size, whole in zip(m[:3], q[:3], strict=True))
    )
    if not fits or len(dtypes) != 1:
        return None
    scale = depth**-0.5 if found.scale is None else found.scale
    given = mask[0][:3] if mask else ()
    return AttentionSpec(batch, heads, k[1], queries, keys, depth, width, dtypes.pop(), scale, given)


def _sizes(type_: TensorType | None, rank: int) -> tuple[int, ...] | None:
    """The sizes of a tensor, axes of one element before them; None where one is unknown or it has more."""
    if type_ is None or None in type_.shape or len(type_.shape) > rank or 0 in type_.shape:
        return None
    return (1,) * (rank - len(type_.shape)) + tuple(size for size in type_.shape if size is not None)


def _matrix(value: ir.Value, rows: int) -> ir.Value:
    """``value`` with its last axis as it is, and one before, at the current insertion point."""
    type_ = torch_ir.tensor_type(value)
    assert type_ is not None
    return _viewed(value, (rows, type_.shape[-1]))


def _viewed(value: ir.Value, shape: Sequence[int | None]) -> ir.Value:
    type_ = torch_ir.tensor_type(value)
    assert type_ is not None
    sizes = torch_ir.make_int_list([torch_ir.make_int(size) for size in shape if size is not None])
    return torch_ir.make("torch.aten.view", replace(type_, shape=tuple(shape)), [value, sizes])


def _additive(mask: ir.Value) -> ir.Value:
    """``mask`` as float32 that is added to scores, at the current insertion point."""
    type_ = torch_ir.tensor_type(mask)
    assert type_ is not None
    wanted = replace(type_, dtype="float32")
    if type_.dtype == "bool":
        chosen = [torch_ir.make_float(0.0), torch_ir.make_float(-math.inf)]
        return torch_ir.make("torch.aten.where.Scalar", wanted, [mask, *chosen])
    if type_ == wanted:
        return mask
    return torch_ir.make("torch.prims.convert_element_type", wanted, [mask, torch_ir.make_dtype("float32")])


def _why_no_kernel(spec: AttentionSpec, operands: Types, results: Types) -> str | None:
    parts = TensorType((spec.rows, spec.row_parts), "float32")
    held = spec.batch * spec.shared * spec.keys
    tensors = [TensorType((spec.rows, spec.depth), spec.dtype)]
    tensors += [TensorType((held, size), spec.dtype) for size in (spec.depth, spec.width)]
    tensors += [TensorType((math.prod(spec.mask), spec.keys), "float32")] if spec.mask else []
    given, made = (tensors, parts)
    if spec.joined:
        given, made = [parts], TensorType((spec.rows, spec.width), spec.dtype)
    if list(operands) == given and list(results) == [made]:
        return None
    return f"it takes {', '.join(map(str, operands))} to {', '.join(map(str, results))}, and reads {given}"


FAMILY = PatternFamily(
    operations=(Operation(canonical.ATTENTION, AttentionSpec, _why_no_kernel, is_kernel=True),),
    fuse=fuse_attention,
)
