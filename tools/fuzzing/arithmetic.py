"""Steps of plain arithmetic: elementwise, casts, comparisons, reductions, products."""

from __future__ import annotations

import torch

from .graph import Step
from .scope import FLOATS, INTS, Scope, Value

_UNARY = (
    "{x} * 0.3",
    "{x} + 1.7",
    "{x} - 0.3",
    "1.0 / (2.0 + {x} * {x})",
    "3 - {x}",
    "-{x}",
    "{x}.abs()",
    "torch.relu({x})",
    "torch.sigmoid({x})",
    "torch.tanh({x})",
    "F.silu({x})",
    "F.gelu({x})",
    "F.gelu({x}, approximate='tanh')",
    "F.softplus({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.hardswish({x})",
    "torch.exp({x}.clamp(max=3))",
    "torch.log1p({x}.abs())",
    "{x}.abs().sqrt()",
    "torch.erf({x})",
    "torch.cos({x})",
    "torch.sin({x})",
    "{x}.clamp(-1, 1)",
    "{x}.clamp(min=-0.5)",
    "{x}.clamp_max(0.7)",
    "torch.sign({x})",
    "torch.floor({x} * 3)",
    "torch.round({x})",
    "torch.trunc({x})",
    "torch.frac({x})",
    "{x}.pow(2)",
    "{x} ** 3",
    "torch.nan_to_num({x})",
    "torch.square({x})",
    "torch.exp2({x}.clamp(max=3))",
)
_BINARY = (
    "{x} + {y}",
    "{x} - {y}",
    "{x} * {y}",
    "{x} / ({y}.abs() + 0.5)",
    "torch.maximum({x}, {y})",
    "torch.minimum({x}, {y})",
    "torch.where({x} > {y}, {x}, {y})",
    "torch.lerp({x}, {y}, 0.25)",
    "torch.add({x}, {y}, alpha=2)",
    "torch.fmax({x}, {y})",
    "torch.atan2({x}, {y})",
    "torch.remainder({x}, {y}.abs() + 1)",
    "torch.addcmul({x}, {x}, {y}, value=0.5)",
)


def unary(s: Scope) -> Step:
    """A function of one float tensor."""
    x, out = s.real(), s.out()
    return Step(f"{out} = {s.choice(_UNARY).format(x=x)}", (out,))


def binary(s: Scope) -> Step:
    """Of two that have one shape, or broadcast."""
    x, out = s.real(), s.out()
    y = s.real(lambda v: _broadcasts(v, x), lambda v: v.dtype == x.dtype or s.chance(0.2))
    return Step(f"{out} = {s.choice(_BINARY).format(x=x, y=y)}", (out,))


def _broadcasts(v: Value, x: Value) -> bool:
    """Tell whether ``v`` can be read at the shape of ``x``, at each size."""
    if v.rank > x.rank:
        return False
    pairs = zip(v.tensors, x.tensors, strict=True)
    return all(a in (1, b) for v, x in pairs for a, b in zip(v.shape[::-1], x.shape[::-1], strict=False))


def cast(s: Scope) -> Step:
    """Between all dtypes; out-of-range values, whose integer is undefined, are bounded first."""
    x, out = s.pick(lambda v: v.is_float or v.dtype in (*INTS, torch.bool)), s.out()
    targets = [*FLOATS, *FLOATS, *(INTS if x.finite() else ()), torch.bool]
    dtype = s.choice(targets)
    if dtype == torch.bool and x.is_float:
        return Step(f"{out} = {x} > {s.choice([0, 0.5])}", (out,))
    bounded = f"{x}.clamp(0, 100)" if dtype in INTS and x.dtype != torch.bool else x
    return Step(f"{out} = {bounded}.to({dtype})", (out,))


def rounded(s: Scope) -> Step:
    """A detour through a narrower type, which is no detour."""
    x, out, dtype = s.real(), s.out(), s.choice(FLOATS)
    return Step(f"{out} = {x}.to({dtype}).to({s.choice([x.dtype, *FLOATS])})", (out,))


def comparison(s: Scope) -> Step:
    """To a bool."""
    x, out = s.real(), s.out()
    options = [
        "{x} > 0",
        "{x}.isnan()",
        "{x}.isfinite()",
        "{x} == 0",
        "{x} != {x}",
        "~({x} <= 0.5)",
        "{x}.isinf()",
    ]
    return Step(f"{out} = {s.choice(options).format(x=x)}", (out,))


def logical(s: Scope) -> Step:
    """Of bools, and choices by them."""
    m, out = s.pick(lambda v: v.dtype == torch.bool), s.out()
    options = [
        f"~{m}",
        f"{m} & {m}.logical_not()",
        f"{m}.float()",
        f"{m}.any(-1)",
        f"{m}.all(-1)",
        f"{m}.sum(-1)",
    ]
    fits = [v for v in s.values.values() if v.like(m) and v.is_float]
    if fits:
        x = s.choice(fits)
        options += [f"{x}.masked_fill({m}, 0.5)", f"torch.where({m}, {x}, -1.0)", f"{x} * {m}"] * 2
    return Step(f"{out} = {s.choice(options)}", (out,))


def integer(s: Scope) -> Step:
    """Of integers: wrap, divide, shift."""
    x, out = s.pick(lambda v: v.dtype in INTS), s.out()
    options = [
        "{x} + {x}",
        "{x} * 3",
        "{x} // 3",
        "{x} % 5",
        "{x}.clamp(-3, 50)",
        "{x} & 7",
        "{x} - 9",
        "{x}.abs()",
    ]
    options += [
        "torch.div({x}, 3, rounding_mode='trunc')",
        "{x} / 4",
        "{x} >> 1",
        "{x} ^ 5",
        "{x}.sum(-1)",
        "{x}.amax(-1)",
    ]
    return Step(f"{out} = {s.choice(options).format(x=x)}", (out,))


def reduction(s: Scope) -> Step:
    """Along one axis or several."""
    x, out = s.real(lambda v: v.rank >= 1), s.out()
    axis, keep = s.axis(x), s.choice(["", ", keepdim=True"])
    name = s.choice(["sum", "mean", "amax", "amin", "logsumexp", "var", "std", "argmax", "argmin", "prod"])
    if name in ("argmax", "argmin") and not distinct(x, axis):
        name = "amax"
    if name == "prod":
        return Step(f"{out} = torch.tanh({x}).prod({axis}{keep})", (out,))
    options = [f"{x}.{name}({axis}{keep})"] * 3 + [
        f"torch.softmax({x}, {axis})",
        f"torch.log_softmax({x}, {axis})",
    ]
    options += [f"{x}.float().cumsum({axis})", f"{x}.sum()", f"{x}.mean()"]
    return Step(f"{out} = {s.choice(options)}", (out,))


def distinct(x: Value, axis: int) -> bool:
    """Tell whether no two values along an axis are so near each other that rounding decides their order."""
    for t in x.tensors:
        if not bool(t.float().isfinite().all()):
            return False
        ordered = t.double().sort(axis)[0]
        gaps = ordered.diff(dim=axis)
        if bool((gaps <= 1e-4 * ordered.abs().amax(axis, keepdim=True)).any()):
            return False
    return True


def ordered(s: Scope) -> Step:
    """Sorts and top-ks of values whose order is certain; stable sorts of any."""
    x = s.real(lambda v: v.rank >= 1 and min(t.shape[-1] for t in v.tensors) >= 2)
    values, ids, axis = s.out(), s.out(), s.axis(x)
    largest = s.chance(0.5)
    if not distinct(x, axis):
        if not x.finite():
            code = f"{values} = torch.sort({x}, {axis}, descending={largest})[0]"
            return Step(code, (values,))
        code = f"{values}, {ids} = torch.sort({x}, dim={axis}, stable=True, descending={largest})"
        return Step(code, (values, ids))
    top = s.choice([k for k in (1, 2, 4) if all(k <= t.shape[axis] for t in x.tensors)])
    code = s.choice(
        [
            f"{values}, {ids} = torch.topk({x}, {top}, {axis}, {largest})",
            f"{values}, {ids} = torch.sort({x}, {axis}, {largest})",
            f"{values}, {ids} = {x}.max({axis})",
            f"{values}, {ids} = {x}.min({axis}, keepdim=True)",
            f"{ids} = torch.argsort({x}, {axis}, {largest})\n{values} = torch.gather({x}, {axis}, {ids})",
        ]
    )
    return Step(code, (values, ids))


def product(s: Scope) -> Step:
    """With a weight, or with itself."""
    x, out = s.real(lambda v: v.rank >= 2 and v.last >= 8), s.out()
    width = s.choice([16, 64, 96])
    rows = s.weight((width, x.last), x.dtype, "normal")
    columns = s.weight((x.last, width), x.dtype, "normal")
    code = s.choice(
        [
            f"{out} = F.linear({x}, {rows}) / {x.last}",
            f"{out} = {x} @ {columns} / {x.last}",
            f"{out} = {x} @ {x}.transpose(-1, -2) / {x.last}",
            f"{out} = torch.einsum('...i,...j->...ij', {x}[..., :4], {x}[..., :8])",
            f"{out} = torch.einsum('...k,hk->...h', {x}, {rows}) / {x.last}",
        ]
    )
    return Step(code, (out,))


STEPS = (
    (4, unary),
    (3, binary),
    (3, cast),
    (1, rounded),
    (1, comparison),
    (2, logical),
    (2, integer),
    (2, reduction),
    (2, ordered),
    (1, product),
)
