"""What the row kernel must compute, in eager PyTorch, and the check that it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from lowering.families.instance import KernelInstance
from lowering.families.row import instance
from lowering.targets import Target
from patterns.contracts import Quantization, RowSpec
from tests.families.host_kernels import Launch, assert_same, run
from tests.families.row_cases import integer_inputs


def check(
    case: RowSpec,
    target: Target,
    launcher: Callable[[KernelInstance], Launch],
    sizes: Iterable[tuple[int, int]] = ((5, 0), (2, 3), (0, 0)),
) -> None:
    """Equal to the reference bit for bit, for (rows, elements the pointers are off their alignment)."""
    kernel = instance(case, target)
    for rows, shift in sizes:
        inputs = integer_inputs(case, rows, seed=rows)
        actual = run(kernel, launcher(kernel), inputs, rows, shift)
        assert_same(actual, reference(case, inputs), (kernel.entry, rows, shift))


def reference(spec: RowSpec, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Every output of ``spec`` for its inputs, in the dispatch's order, in eager torch."""
    given = list(tensors)
    x, dtype = given.pop(0), getattr(torch, spec.dtype)
    outputs = []
    y = x.float()
    gate = given.pop(0) if spec.gate and spec.norm else None
    if spec.gate and not spec.norm:
        y = _gated(spec, x, given.pop(0) if not spec.gate.packed else None)
    if spec.norm:
        x32 = x.float()
        if spec.norm.residual:
            x32 = x32 + given.pop(0).float()
            total = x32.to(dtype)
            x32 = total.float() if spec.norm.residual == "rounded" else x32
            outputs += [total] if spec.writes_sum else []
        if gate is not None and spec.gate_first:
            x32 = _gated(spec, gate, x).float()
        weight = given.pop(0) if spec.weight_dtype else None
        y = _normed(spec, x32, weight, given.pop(0) if spec.bias_dtype else None)
    if gate is not None and not spec.gate_first:
        y = _gated(spec, gate, y)
    if spec.writes_y:
        outputs.append(y.to(getattr(torch, spec.y_dtype)))
    for quantization in spec.quantizations:
        if quantization.static:
            outputs.append(_by_given_scale(y.float(), given.pop(0), quantization))
        else:
            outputs += _quantized(y.float(), quantization)
    return outputs


def _normed(
    spec: RowSpec, x32: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    assert spec.norm
    dtype = getattr(torch, spec.dtype)
    if weight is not None and spec.norm.weight_offset:
        weight = weight.float() + spec.norm.weight_offset
    groups = x32.unflatten(-1, (-1, spec.norm.group or spec.hidden))
    if spec.norm.statistic == "variance":
        groups = groups - groups.mean(-1, keepdim=True)
    rstd = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + spec.norm.eps)
    value = (groups * rstd).flatten(-2)
    if spec.norm.rounding == "twice":
        value = value.to(dtype)
        value = value if weight is None else value * weight
        return value if bias is None else value + bias
    if spec.norm.bias == "once" and bias is not None:
        last = (groups, rstd) if weight is None else (value, weight)
        product = (last[0].double() * last[1].double()).reshape(x32.shape)
        value = (product + bias.double()).float()
    else:
        value = value if weight is None else value * weight.float()
        value = value if bias is None else value + bias.float()
    return value.to(getattr(torch, spec.y_dtype)) if spec.norm.rounding == "once" else value


def _gated(spec: RowSpec, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert spec.gate
    if up is None:
        gate, up = gate.chunk(2, -1)
    dtype = up.dtype
    value = ACTIVATIONS[spec.gate.activation](gate.float())
    if spec.gate.rounding == "twice":
        return value.to(dtype) * up
    value = value * up.float()
    return value.to(dtype) if spec.gate.rounding == "once" else value


ACTIVATIONS = {
    "silu": lambda g: g / (1 + torch.exp(-g)),
    "gelu": lambda g: g / 2 * (1 + torch.erf(g * math.sqrt(0.5))),
    "gelu_tanh": lambda g: g / (1 + torch.exp(-math.sqrt(8 / math.pi) * (g + 0.044715 * g**3))),
}


def _by_given_scale(y: torch.Tensor, scale: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    factor = scale if quantization.quotient == "inverse" else 1.0 / scale
    q = y / scale if quantization.quotient == "true" else y * factor
    q = q.clamp(quantization.least, quantization.qmax)
    return _converted(q, quantization.dtype)


def _converted(q: torch.Tensor, dtype: str) -> torch.Tensor:
    return (q.nan_to_num(0.0).round() if dtype == "int8" else q).to(getattr(torch, dtype))


def _quantized(y: torch.Tensor, quantization: Quantization) -> list[torch.Tensor]:
    rows, hidden = y.shape
    groups = y.unflatten(-1, (quantization.groups(hidden), hidden // quantization.groups(hidden)))
    amax = groups.abs().amax(-1).clamp(min=quantization.amax_floor, max=quantization.amax_ceiling)
    scale = _scale(amax, quantization)
    divisor, factor = scale.unsqueeze(-1), _inverse(amax, quantization).unsqueeze(-1)
    ways = {"true": groups / divisor, "reciprocal": groups * (1.0 / divisor), "inverse": groups * factor}
    q = ways[quantization.quotient]
    q = q.clamp(-quantization.qmax, quantization.qmax).reshape(rows, hidden)
    return [_converted(q, quantization.dtype), _laid_out(scale, quantization.layout)]


def _inverse(amax: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    qmax = torch.tensor(quantization.qmax, dtype=torch.float32)
    return qmax / amax if quantization.inverse == "true" else qmax * (1.0 / amax)


def _scale(amax: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    qmax = torch.tensor(quantization.qmax, dtype=torch.float32)
    if quantization.scale_division == "inverse":
        return 1.0 / _inverse(amax, quantization)
    scale = amax / qmax if quantization.scale_division == "true" else amax * (1.0 / qmax)
    scale = scale.clamp(min=quantization.scale_floor)
    if quantization.scale == "ue8m0":
        fraction, exponent = torch.frexp(scale)
        exponent = (exponent - (fraction == 0.5).int()).clamp(-126, 127)
        exponent = torch.where(scale > 1e38, 127, torch.where(scale < 2.0**-126, -126, exponent))
        kept = scale.isnan() | (scale.isinf() & quantization.infinite)
        scale = torch.where(kept, scale, torch.exp2(exponent.double()).float())
    return scale


def _laid_out(scale: torch.Tensor, layout: str) -> torch.Tensor:
    rows, groups = scale.shape
    padded = (rows + 3) // 4 * 4
    if layout == "ue8m0_packed":
        codes = torch.zeros((groups + 3) // 4, padded, 4, dtype=torch.uint8)
        for g in range(groups):
            codes[g // 4, :rows, g % 4] = (scale[:, g].contiguous().view(torch.int32) >> 23).to(torch.uint8)
        return codes.view(torch.int32).squeeze(-1)
    if layout == "column_tma":
        return torch.nn.functional.pad(scale.T, (0, padded - rows))
    return scale.T.contiguous() if layout == "column" else scale
