"""How a model spells it, and how what was found becomes one operation of a kernel.

This imports ``patterns`` and IREE's MLIR bindings, no PyTorch: it sees a program, not tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from patterns import canonical, torch_ir, views
from patterns.contracts import Quantization
from patterns.operation import Operation, PatternFamily, Support, Types
from patterns.recogniser import NearMiss, Raised
from patterns.sites import Ledger
from patterns.torch_ir import TensorType

from .contract import LayerNorm, LayerNormSpec

LAYER_NORM = "vmfuse_layer_norm.layer_norm"
FUSED = "vmfuse_layer_norm.layer_norm_fp8"

# --- what fits -------------------------------------------------------------------------------------


def _why_no_norm(norm: LayerNorm, operands: Types, results: Types) -> str | None:
    """x, [weight], [bias] -> y."""
    x, *vectors = operands or (None,)
    if x is None or not x.shape or x.shape[-1] is None or "float" not in x.dtype:
        return f"its x is {x}"
    if len(vectors) > 2 or any(vector is None or vector.shape != x.shape[-1:] for vector in vectors):
        return f"its weight and bias are {', '.join(map(str, vectors))}, and x {x}"
    return None if list(results) == [x] else f"it makes {', '.join(map(str, results))} of {x}"


def _why_no_kernel(spec: LayerNormSpec, operands: Types, results: Types) -> str | None:
    """x, [weight], [bias] -> [y], q, scale."""
    dtypes = [dtype for dtype in (spec.dtype, spec.weight_dtype, spec.bias_dtype) if dtype is not None]
    if [operand and (operand.dtype, operand.shape[-1:]) for operand in operands] != [
        (dtype, (spec.hidden,)) for dtype in dtypes
    ]:
        return f"it reads {', '.join(map(str, operands))}, and not rows of {spec.hidden} {', '.join(dtypes)}"
    x = operands[0]
    assert x is not None
    made = _written(x, spec)
    return None if list(results) == made else f"its results are {', '.join(map(str, results))}"


def _written(x: TensorType, spec: LayerNormSpec) -> list[TensorType]:
    """The types of what a kernel for ``spec`` writes."""
    return [x] * spec.writes_y + list(canonical.quantized_types(x, spec.quantization))


# --- what is found ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of LayerNorm: its operands, and what it carries."""

    operands: list[ir.Value]
    norm: LayerNorm

    def raised(self, y: ir.Value | TensorType) -> Raised:
        return Raised(LAYER_NORM, self.norm, self.operands, [y])


def _read(x: ir.Value, weight: ir.Value, bias: ir.Value, eps: ir.Value) -> _Call | str:
    """The call of these arguments, or why it is none that is understood here."""
    vectors = [value for value in (weight, bias) if torch_ir.constant(value) is not None]
    number, type_ = torch_ir.constant(eps), torch_ir.tensor_type(x)
    if vectors == [bias]:
        return "it has a bias and no weight"
    if not isinstance(number, float):
        return "its eps is computed; it must be a constant"
    if type_ is None or not type_.shape or type_.shape[-1] is None:
        return "the size of the last axis is unknown until run time; a kernel is made for one size"
    return _Call([x, *vectors], LayerNorm(number))


class NamedLayerNormFp8:
    """``torch.ops.vmfuse_layer_norm.layer_norm_fp8``: two sites, as if it were written out."""

    roots = ("torch.vmfuse_layer_norm.layer_norm_fp8",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        call, y = _read(*op.operands), torch_ir.tensor_type(op.operands[0])
        if isinstance(call, str) or y is None:
            return None
        return Raised(canonical.GROUP_QUANT, Quantization(group=None), [call.raised(y)], list(op.results))


class QuantizedLayerNorm:
    """What ``torch.export`` leaves of ``torch.nn.LayerNorm``, where a quantization reads it.

    Any other is left to vmfuse's own recognisers.  Quantizations are recognised before: a program is
    read from its end.
    """

    roots = ("torch.aten.native_layer_norm",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        call = _quantized(op)
        return None if isinstance(call, str) else call.raised(op.results[0])


def _quantized(op: ir.Operation) -> _Call | str:
    x, shape, weight, bias, eps = op.operands
    type_ = torch_ir.tensor_type(x)
    if type_ is not None and torch_ir.constant(shape) != list(type_.shape[-1:]):
        return f"it norms {torch_ir.constant(shape)} of {type_}; a kernel norms the last axis alone"
    if any(torch_ir.users(statistic) for statistic in list(op.results)[1:]):
        return "its mean or its rstd is read as well, which a kernel does not write"
    if not any(_quantizations(op.results[0])):
        return "its value is not quantized; a kernel computes a LayerNorm and the quantization of its rows"
    return _read(x, weight, bias, eps)


def _quantizations(value: ir.Value) -> list[ir.Operation]:
    """The quantizations that read ``value``, itself or behind views."""
    found = []
    for op in torch_ir.users(value):
        if torch_ir.op_name(op) == canonical.GROUP_QUANT:
            found.append(op)
        elif views.is_view(op):
            found += _quantizations(op.result)
    return found


class OtherLayerNorm:
    """A LayerNorm that was not recognised: one site that says why."""

    roots = QuantizedLayerNorm.roots

    def why_not(self, op: ir.Operation) -> NearMiss | None:
        why = _quantized(op)
        return NearMiss("layer_norm", why) if isinstance(why, str) else None


# --- to a kernel -----------------------------------------------------------------------------------


def fuse_layer_norms(block: ir.Block, ledger: Ledger, support: Support) -> None:
    """Give every LayerNorm and a quantization of it to one kernel, or refuse it with a reason.

    What else reads y, other quantizations too, reads the y that the kernel then writes.  A quantization that
    is not taken is left to the families asked after this one.
    """
    norms = [op.operation for op in block.operations if torch_ir.op_name(op.operation) == LAYER_NORM]
    for norm in norms:
        _fuse(norm, ledger, support)


def _fuse(norm: ir.Operation, ledger: Ledger, support: Support) -> None:
    readers = torch_ir.users(norm.result)
    quants = [op for op in readers if torch_ir.op_name(op) == canonical.GROUP_QUANT]
    reason = "views between it and what quantizes it change its rows"
    for quant in quants:
        spec = _spec(norm, canonical.quantization(quant), writes_y=len(readers) > 1)
        reason = support(spec)
        if reason is None:
            _replace(norm, quant, spec, ledger)
            return
    ledger.refuse(canonical.site_of(norm), reason or "")


def _spec(norm: ir.Operation, quantization: Quantization, *, writes_y: bool) -> LayerNormSpec:
    x, *vectors = [torch_ir.tensor_type(operand) for operand in norm.operands]
    assert x is not None and x.shape[-1] is not None
    weight, bias = [vector.dtype if vector else None for vector in (*vectors, None, None)][:2]
    carried = canonical.from_attribute(LayerNorm, norm.attributes["contract"])
    return LayerNormSpec(x.shape[-1], x.dtype, carried, quantization, weight, bias, writes_y)


def _replace(norm: ir.Operation, quant: ir.Operation, spec: LayerNormSpec, ledger: Ledger) -> None:
    """Put the operation of a kernel in the place of both, and say so in the ledger."""
    sites = (canonical.site_of(norm), canonical.site_of(quant))
    x = torch_ir.tensor_type(norm.operands[0])
    assert x is not None
    replaced = [norm.result] * spec.writes_y + list(quant.results)
    with ir.InsertionPoint(norm), norm.location:
        fused = canonical.create(
            FUSED,
            list(norm.operands),
            _written(x, spec),
            spec=canonical.to_attribute(spec),
            sites=canonical.to_attribute(sites),
        )
    torch_ir.set_example(fused, [torch_ir.example_shape(value) for value in replaced])
    for old, new in zip(replaced, fused.results, strict=True):
        old.replace_all_uses_with(new)
    quant.erase()
    norm.erase()
    for site in sites:
        ledger.fuse(site, "layer_norm_fp8")


FAMILY = PatternFamily(
    operations=(
        Operation(LAYER_NORM, LayerNorm, _why_no_norm, site=lambda norm: "layer_norm", is_producer=True),
        Operation(FUSED, LayerNormSpec, _why_no_kernel, is_kernel=True),
    ),
    recognisers=(NamedLayerNormFp8(), QuantizedLayerNorm()),
    suspicions=(OtherLayerNorm(),),
    fuse=fuse_layer_norms,
)
