"""Steps that quantize, as the operation with every scheme and written out, and those that read the codes."""

from __future__ import annotations

import torch

from .graph import Step
from .scope import FLOATS, FP8, Scope, Value


def _group(s: Scope, v: Value) -> int:
    sizes = [g for g in (32, 64, 128) if v.last % g == 0]
    return s.choice([0, *sizes, *sizes])


def _row(v: Value) -> bool:
    return v.last >= 16


def named_quantization(s: Scope) -> Step:
    """``torch.ops.lowering.group_quant``."""
    x, q, scale = s.real(_row), s.out(), s.out()
    group = _group(s, x)
    dtype = s.choice(["float8_e4m3fn"] * 4 + ["float8_e4m3fnuz", "float8_e5m2", "int8", "int8"])
    if dtype == "int8" and not x.finite():
        dtype = "float8_e4m3fn"  # what torch makes of a NaN in int8 is undefined
    options = [f"dtype=torch.{dtype}"] if dtype != "float8_e4m3fn" else []
    layouts = ["row", "row", "column", "column_tma"]
    if s.chance(0.3):
        options.append("scale='ue8m0'")
        layouts += ["ue8m0_packed"] if group else []
    layout = s.choice(layouts)
    options += [f"scale_layout='{layout}'"] if layout != "row" else []
    for option in (
        "amax_floor=1e-4",
        "scale_floor=1e-3",
        "scale_division='reciprocal'",
        "quotient='reciprocal'",
    ):
        options += [option] if s.chance(0.15) else []
    if dtype != "int8" and s.chance(0.15):
        options.append("amax_ceiling=2.0")
    arguments = ", ".join([str(x), str(group), *options])
    code = f"{q}, {scale} = torch.ops.lowering.group_quant({arguments})"
    return Step(code, (q, scale), ("group_quant",), (scale,) if layout != "row" else ())


_QMAX = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


def written_quantization(s: Scope) -> Step:
    """Written out."""
    x, q, scale = s.real(_row, lambda v: v.rank >= 1), s.out(), s.out()
    group = _group(s, x) or x.last
    dtype = s.choice(["float8_e4m3fn", "float8_e4m3fn", "float8_e5m2", "int8"])
    if dtype == "int8" and not x.finite():
        dtype = "float8_e4m3fn"
    qmax = _QMAX[dtype]
    views = [f"{x}.unflatten(-1, (-1, {group}))", f"{x}.unflatten(-1, ({x.last // group}, {group}))"]
    views += [
        f"{x}.reshape(*{x}.shape[:-1], -1, {group})",
        f"{x}.view(*{x}.shape[:-1], {x.last // group}, {group})",
    ]
    views += [f"{x}.reshape(-1, {group})"]
    grouped = group != x.last or s.chance(0.3)
    lines = [f"g = {s.choice(views) if grouped else x}.float()"]
    lines.append(
        s.choice(
            [
                "m = g.abs().amax(-1, keepdim=True)",
                "m = g.abs().max(-1, keepdim=True)[0]",
                "m = g.abs().amax(-1).unsqueeze(-1)",
                "m = g.abs().amax(-1)[..., None]",
                "m = torch.maximum(g.amax(-1, keepdim=True), -g.amin(-1, keepdim=True))",
            ]
        )
    )
    floor = ["m.clamp(min=1e-10)", "m.clamp_min(1e-4)", "torch.maximum(m, torch.tensor(1e-10))", "m + 1e-10"]
    lines.append(f"m = {s.choice(floor)}")
    lines.append(s.choice([f"s = m / {qmax}", f"s = m * (1.0 / {qmax})", f"s = m / torch.tensor({qmax})"]))
    if s.chance(0.2):
        lines.append("s = torch.exp2(torch.ceil(torch.log2(s)))")
    quotient = s.choice(["g / s", "g / s", "g * (1.0 / s)", "g * torch.reciprocal(s)"])
    stored = f"({quotient}).clamp(-{qmax}, {qmax})"
    stored = f"({quotient}).round().clamp(-{qmax}, {qmax})" if dtype == "int8" else stored
    lines.append(f"{q} = {stored}.to(torch.{dtype})")
    if grouped and s.chance(0.8):
        lines.append(f"{q} = {q}.reshape({x}.shape)")
    lines.append(f"{scale} = s" if s.chance(0.5) else f"{scale} = s.squeeze(-1)")
    return Step("\n".join(lines), (q, scale), ("group_quant",))


def other_quantization(s: Scope) -> Step:
    """Give what is near one and is none that a kernel computes."""
    x, q = s.real(_row, lambda v: v.rank >= 2), s.out()
    scale = s.choice(
        [
            f"{x}.abs().amax(-1)",
            f"{x}.abs().amax(-2, keepdim=True)",
            f"{x}.abs().amax()",
            f"{x}.amax(-1, keepdim=True).abs()",
            f"({x} * 0.5).abs().amax(-1, keepdim=True)",
            "torch.tensor(3.5)",
        ]
    )
    stored = f"({x}.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn)"
    code = f"s = {scale}.float().clamp(min=1e-6) / 448.0\n{q} = {stored}"
    return Step(code, (q,))


def dequantized(s: Scope) -> Step:
    """Codes as floats again."""
    q, out = s.pick(lambda v: v.dtype in (*FP8, torch.int8)), s.out()
    dtype = str(s.choice(FLOATS))
    code = s.choice([f"{out} = {q}.to({dtype})", f"{out} = {q}.to(torch.float32) * 0.125"])
    return Step(code, (out,))


def cast_to_fp8(s: Scope) -> Step:
    """A plain cast."""
    x, out = s.real(lambda v: v.magnitude() < 400 or not v.finite()), s.out()
    return Step(f"{out} = {x}.to({s.choice(FP8)})", (out,))


STEPS = (
    (4, named_quantization),
    (4, written_quantization),
    (1, other_quantization),
    (2, dequantized),
    (1, cast_to_fp8),
)
