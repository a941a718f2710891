"""Tell whether the outputs of a kernel are what its spec says, judged against float64.

Independent of how any kernel or any reference in float32 rounds: every output has to lie within the
rounding that its dtype allows of the value computed in float64, whatever lies between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from patterns.contracts import Quantization, RowSpec

# Relative error of a value rounded to bfloat16, and some for the float32 arithmetic before.
_BF16 = 2.0**-8 * 1.1
# Of an activation, relative to its argument: where gelu is near zero its sum cancels.
_ACTIVATION = 2.0**-22
_FLOAT32 = 2.0**-22
# Half a step of each quantized type: relative to the value, and to the scale where steps stop shrinking.
_HALF_STEPS = {"float8_e4m3fn": (2.0**-4, 2.0**-10), "float8_e5m2": (2.0**-3, 2.0**-17), "int8": (0.0, 0.5)}
_ACTIVATIONS = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
}


def problems(spec: RowSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the outputs in ``tensors``, which holds the inputs too; nothing when all is well."""
    y, total, slack = _exact(spec, tensors)
    found = []
    if (
        spec.writes_sum
        and total is not None
        and not torch.equal(tensors["sum"], total.to(tensors["sum"].dtype))
    ):
        found.append("sum: not the rounded sum")
    if spec.writes_y and not _within(tensors["y"].double() - y, _BF16 * y.abs() + slack):
        found.append("y: further from float64 than rounding explains")
    for index, quantization in enumerate(spec.quantizations):
        if quantization.static:
            found += _static_problem(y, slack, tensors[f"q{index}"], tensors[f"scale{index}"], quantization)
            continue
        scale = _logical(tensors[f"scale{index}"], quantization, spec, y.shape[0])
        if scale is None:
            found.append(f"scale{index}: pads that are not zero")
            continue
        problem = _quantized_problem(y, slack, tensors[f"q{index}"], scale, quantization)
        found += [f"{problem[0]}{index}: {problem[1]}"] if problem else []
    return found


def _exact(spec: RowSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """y and the residual sum, if there is one, in float64; and what an activation may be off by besides."""
    x, total = _rows(spec, tensors, "x"), None
    exact = torch.zeros((), dtype=torch.float64, device=x.device)
    if spec.gate and not spec.norm:
        gate, up = x.chunk(2, -1) if spec.gate.packed else (x, _rows(spec, tensors, "up"))
        return _ACTIVATIONS[spec.gate.activation](gate) * up, None, _ACTIVATION * (gate * up).abs()
    if not spec.norm:
        return x, None, exact
    if spec.norm.residual:
        x = total = x + _rows(spec, tensors, "residual")
        if spec.norm.residual == "rounded":
            x = total.to(tensors["x"].dtype).double()
    if spec.gate and spec.gate_first:
        x = _ACTIVATIONS[spec.gate.activation](_rows(spec, tensors, "gate")) * x
    y = _normed(spec, x)
    # What float32 adds to a sum that cancels: units of its terms.
    units = y.abs().amax(-1, keepdim=True) * 8
    if "weight" in tensors:
        y = y * (tensors["weight"].double() + spec.norm.weight_offset)
    if "bias" in tensors:
        y = y + tensors["bias"].double()
        exact = _FLOAT32 * (units + tensors["bias"].double().abs())
    if spec.gate and not spec.gate_first:
        gate = _rows(spec, tensors, "gate")
        y = _ACTIVATIONS[spec.gate.activation](gate) * y
        exact = _ACTIVATION * (gate * y).abs()
    return y, total, exact + (_roundings(spec) - 1) * _BF16 * y.abs()


def _roundings(spec: RowSpec) -> int:
    """Count how often what becomes y is rounded to 16 bits, the last time included."""
    parts = [part.rounding for part in (spec.norm, spec.gate) if part is not None]
    return max(1, sum({"once": 1, "twice": 2, "none": 0}[rounding] for rounding in parts))


def _normed(spec: RowSpec, x: Tensor) -> Tensor:
    assert spec.norm is not None
    groups = x.unflatten(-1, (-1, spec.norm.group or spec.hidden))
    if spec.norm.statistic == "variance":
        groups = groups - groups.mean(-1, keepdim=True)
    rstd = torch.rsqrt((groups * groups).mean(-1, keepdim=True) + spec.norm.eps)
    return (groups * rstd).flatten(-2)


def _rows(spec: RowSpec, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The rows of an input in float64."""
    return tensors[name][:, spec.columns(name)].double()


def _logical(scale: Tensor, quantization: Quantization, spec: RowSpec, rows: int) -> Tensor | None:
    """Scales [T, groups] in float64; None where a pad is not zero."""
    groups = quantization.groups(spec.hidden)
    if quantization.layout == "row":
        return scale.double()
    if quantization.layout == "ue8m0_packed":
        # [ceil(groups/4), T4] words of four bytes each: group, row
        codes = scale.view(torch.uint8).unflatten(-1, (-1, 4)).transpose(1, 2).flatten(0, 1)
        if codes[groups:].any() or codes[:, rows:].any():
            return None
        return torch.exp2(codes[:groups, :rows].double() - 127).T
    return None if scale[:, rows:].any() else scale[:, :rows].double().T


def _quantized_problem(
    y: Tensor, slack: Tensor, q: Tensor, scale: Tensor, quantization: Quantization
) -> tuple[str, str] | None:
    groups = y.unflatten(-1, (scale.shape[-1], -1))
    slack = slack.view_as(groups) if slack.dim() else slack
    of_group = slack.amax(-1) if slack.dim() else slack
    wanted = groups.abs().amax(-1).clamp(min=quantization.amax_floor) / quantization.qmax
    if quantization.scale == "ue8m0":
        power = torch.exp2(torch.log2(scale).round())
        if not torch.equal(power, scale) or not _within(scale - 1.5 * wanted, (0.5 + 2 * _BF16) * wanted):
            return "scale", "not the power of two at or above amax/qmax"
    elif not _within(scale - wanted, _BF16 * wanted + 1.01 * of_group / quantization.qmax):
        return "scale", "further from amax/qmax than rounding explains"
    step = scale.unsqueeze(-1)
    relative, absolute = _HALF_STEPS[quantization.dtype]
    error = q.double().view_as(groups) * step - groups
    if not _within(error, (relative + _BF16) * groups.abs() + 1.01 * absolute * step + slack):
        return "q", "further from y than rounding explains"
    return None


def _static_problem(
    y: Tensor, slack: Tensor, q: Tensor, given: Tensor, quantization: Quantization
) -> list[str]:
    """What is wrong with codes by a given scale: that they are not near y, as far as they reach."""
    step = given.double() ** (-1 if quantization.quotient == "inverse" else 1)
    wanted = y.clamp(quantization.least * step, quantization.qmax * step)
    relative, absolute = _HALF_STEPS[quantization.dtype]
    bound = (relative + _BF16) * y.abs() + 1.01 * absolute * step + slack
    if _within(q.double() * step - wanted, bound):
        return []
    return [f"q: further from y by a scale of {float(given)} than rounding explains"]


def _within(error: Tensor, bound: Tensor) -> bool:
    """NaN is never within."""
    return bool((error.abs() <= bound).all())
