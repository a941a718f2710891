"""act(gate) * up written out, raised to ``vmfuse.gated_activation``.

Only where it is quantized: an activation nobody quantizes is better left to the code generator,
which can put it behind the product that makes it.
"""

from __future__ import annotations

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import Activation, GatedActivation
from .match import Const, OneOf, Op, Var, first_match
from .recogniser import Raised

_GATE = Var("gate")
_ACTIVATED = OneOf(
    Op("torch.aten.silu", _GATE),
    Op("torch.aten.gelu", _GATE, Const("approximate")),
)
_GATED = Op("torch.aten.mul.Tensor", _ACTIVATED, Var("up"), commutative=True)


class DecomposedGate:
    """``silu(gate) * up`` and ``gelu(gate) * up`` of two tensors, or of the halves of one."""

    roots = ("torch.aten.mul.Tensor",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        found = first_match(_GATED, op.result)
        if found is None or not views.is_quantized(op.result):
            return None
        gate, up = found["gate"], found["up"]
        type_ = torch_ir.tensor_type(op.result)
        if type_ is None or not gate.type == up.type == op.result.type:
            return None
        packed = _halves_of(gate, up)
        contract = GatedActivation(
            activation=_activation(found.get("approximate")),
            # In float32 nothing is rounded in between, and one contract is enough.
            rounding="once" if type_.dtype == "float32" else "twice",
            packed=packed is not None,
        )
        operands = [gate, up] if packed is None else [packed]
        return Raised(canonical.GATED_ACTIVATION, contract, operands, [op.result])


def _activation(approximate: str | None) -> Activation:
    if approximate is None:
        return "silu"
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _halves_of(gate: ir.Value, up: ir.Value) -> ir.Value | None:
    """The tensor whose first half along the last axis is ``gate`` and whose second is ``up``, or None."""
    first, second = _last_axis_slice(gate), _last_axis_slice(up)
    if first is None or second is None or first[0] != second[0]:
        return None
    whole = torch_ir.tensor_type(first[0])
    if whole is None or whole.shape[-1] is None or whole.shape[-1] % 2:
        return None
    half = whole.shape[-1] // 2
    return first[0] if first[1] == (0, half) and second[1] == (half, 2 * half) else None


def _last_axis_slice(value: ir.Value) -> tuple[ir.Value, tuple[int, int]] | None:
    """What ``value`` is a slice of along the last axis, and from where to where."""
    op = torch_ir.producer(value)
    if op is None or op.name != "torch.aten.slice.Tensor":
        return None
    source = torch_ir.tensor_type(op.operands[0])
    axis, start, end, step = (torch_ir.constant(operand) for operand in list(op.operands)[1:])
    if source is None or source.shape[-1] is None or axis not in (-1, len(source.shape) - 1) or step != 1:
        return None
    if not (start is None or isinstance(start, int)) or not (end is None or isinstance(end, int)):
        return None
    size = source.shape[-1]
    return op.operands[0], slice(start, end).indices(size)[:2]


RECOGNISERS = (DecomposedGate(),)
