"""Steps that are sites: norms, gates and routings in all spellings."""

from __future__ import annotations

from .graph import Step
from .scope import FLOATS, Scope, Value

_EPS = ("1e-6", "1e-5", "0.01")


def _row(v: Value) -> bool:
    return v.last >= 8


def named_norm(s: Scope) -> Step:
    """A call of an operation."""
    x, out, eps = s.real(_row), s.out(), s.choice(_EPS)
    weight = s.choice(["None", s.weight((x.last,), x.dtype), s.weight((x.last,), s.choice(FLOATS))])
    torch_weight = "None" if weight == "None" else f"{weight}.to({x}.dtype)"
    code = s.choice(
        [
            f"{out} = torch.ops.lowering.rms_norm({x}, {weight}, {eps})",
            f"{out} = F.rms_norm({x}, ({x.last},), {torch_weight}, {eps})",
        ]
    )
    return Step(code, (out,), ("rms_norm",))


def layer_norm(s: Scope) -> Step:
    """torch's LayerNorm, with weight and bias, one or neither."""
    x, out = s.real(_row), s.out()
    weight, bias = (s.choice(["None", s.weight((x.last,), x.dtype)]) for _ in range(2))
    return Step(
        f"{out} = F.layer_norm({x}, ({x.last},), {weight}, {bias}, {s.choice(_EPS)})", (out,), ("layer_norm",)
    )


def added_norm(s: Scope) -> Step:
    """A residual add and its norm, as one operation."""
    x = s.real(_row)
    r = s.real(x.like, lambda v: v.dtype == x.dtype)
    out, total, weight = s.out(), s.out(), s.weight((x.last,), x.dtype)
    code = f"{out}, {total} = torch.ops.lowering.add_rms_norm({x}, {r}, {weight}, {s.choice(_EPS)})"
    return Step(code, (out, total), ("rms_norm",))


_SQUARES = ("h.pow(2)", "h * h", "h.square()", "h ** 2")


def _means(square: str, axis: int, hidden: int) -> list[str]:
    """The mean of squares of h, whose last axis is also ``axis`` and has ``hidden`` elements."""
    return [
        f"({square}).mean(-1, keepdim=True)",
        f"torch.mean({square}, dim=-1, keepdim=True)",
        f"({square}).mean({axis}, keepdim=True)",
        f"({square}).mean(-1).unsqueeze(-1)",
        f"({square}).mean(-1)[..., None]",
        f"({square}).sum(-1, keepdim=True) / {hidden}",
        f"({square}).sum(-1, keepdim=True) * (1.0 / {hidden})",
        f"({square}).sum(-1, keepdim=True).div({hidden})",
    ]


def _scalings(eps: object) -> list[str]:
    """h over the root of m; the usual way three times as often."""
    return [f"h = h * torch.rsqrt(m + {eps})"] * 3 + [
        f"h = torch.rsqrt({eps} + m) * h",
        f"h = h / torch.sqrt(m + {eps})",
        f"h = h * (m + {eps}).pow(-0.5)",
    ]


def _weightings(out: str, weight: str) -> list[str]:
    """The result: h times a weight, or none, rounded before, after or not at all."""
    return [
        f"{out} = {weight} * h.to(x.dtype)",
        f"{out} = h.to(x.dtype) * {weight}",
        f"{out} = (h * (1.0 + {weight}.float())).type_as(x)",
        f"{out} = (h * {weight}.float()).to(x.dtype)",
        f"{out} = h.to(x.dtype)",
        f"{out} = h * {weight}.float()",
        f"{out} = h",
    ]


def written_norm(s: Scope) -> Step:
    """A norm written out: a residual, a mean or a gate before it in some, and the statistics of groups."""
    x, out, eps = s.real(_row), s.out(), s.choice(_EPS)
    square, groups = s.choice(_SQUARES), 2 if x.last % 64 == 0 and s.chance(0.2) else 1
    hidden = x.last // groups
    mean = s.choice(_means(square, x.rank - (groups == 1), hidden))
    lines = []
    if s.chance(0.3) and (others := [v for v in s.values.values() if v.like(x) and v.dtype == x.dtype]):
        lines.append(f"x = {x} + {s.choice(others)}")
        total = s.chance(0.5)
    else:
        lines.append(f"x = {x}")
        total = False
    lines.append("h = x.float()")
    op = "layer_norm" if s.chance(0.2) else "rms_norm"
    if not total and s.chance(0.2):
        lines.append(f"h = h * F.silu({s.real(x.like)}.float())")
    if groups > 1:
        lines.append(f"h = h.unflatten(-1, ({groups}, {hidden}))")
    if op == "layer_norm":
        lines.append("h = h - h.mean(-1, keepdim=True)")
    lines.append(f"m = {mean}")
    lines.append(s.choice(_scalings(eps)))
    if groups > 1:
        lines.append("h = h.flatten(-2)")
    weight = s.weight((x.last,), s.choice([x.dtype, *FLOATS]))
    lines.append(s.choice(_weightings(out, weight)))
    outs = (out,)
    if total:
        outs = (out, s.out())
        lines.append(f"{outs[1]} = x")
    return Step("\n".join(lines), outs, (op,))


def other_norm(s: Scope) -> Step:
    """What is near a norm of rows and is none: statistics of another axis or of another tensor."""
    x, out = s.real(lambda v: v.rank >= 2 and v.last >= 8), s.out()
    code = s.choice(
        [
            f"{out} = {x} * torch.rsqrt({x}.pow(2).mean(-2, keepdim=True) + 1e-6)",
            f"{out} = {x} * torch.rsqrt({x}.pow(2).mean(-1) + 1e-6)",
            f"{out} = {x} * torch.rsqrt({x}.pow(2).mean(-1).unsqueeze(0) + 1e-6)",
            f"{out} = {x} * torch.rsqrt({x}.pow(2).mean(0) + 1e-6)",
            f"{out} = {x} * torch.rsqrt({x}.pow(2).mean() + 1e-6)",
            f"{out} = {x} * torch.rsqrt({x}.pow(2).mean((-1, -2), keepdim=True) + 1e-6)",
            f"{out} = ({x}.float() * torch.rsqrt({x}.float().var(-1, keepdim=True) + 1e-6)).to({x}.dtype)",
            f"{out} = {x} * torch.rsqrt({x}.abs().mean(-1, keepdim=True) + 1e-6)",
            f"{out} = F.normalize({x}, dim=-1)",
            f"{out} = {x} / torch.linalg.vector_norm({x}, dim=-1, keepdim=True).clamp(min=1e-6)",
        ]
    )
    return Step(code, (out,))


_ACTIVATIONS = {
    "silu_mul": ("F.silu({g})", "({g} * torch.sigmoid({g}))", "({g} / (1 + torch.exp(-{g})))"),
    "gelu_mul": ("F.gelu({g})",),
    "gelu_tanh_mul": ("F.gelu({g}, approximate='tanh')",),
}


def gate(s: Scope) -> Step:
    """act(gate) * up, which nothing need quantize."""
    lines, g, u = _gate_operands(s)
    out, activation = s.out(), s.choice([text for texts in _ACTIVATIONS.values() for text in texts])
    product = [f"{activation.format(g=g)} * {u}", f"{u} * {activation.format(g=g)}"]
    return Step("\n".join([*lines, f"{out} = {s.choice(product)}"]), (out,))


def quantized_gate(s: Scope) -> Step:
    """act(gate) * up and its quantization: two sites."""
    lines, g, u = _gate_operands(s)
    op = s.choice(list(_ACTIVATIONS))
    y = s.choice([f"{_ACTIVATIONS[op][0].format(g=g)} * {u}", f"{u} * {_ACTIVATIONS[op][0].format(g=g)}"])
    if op == "silu_mul" and s.chance(0.3):
        y = f"torch.ops.lowering.silu_mul(torch.cat([{g}, {u}], -1))"
    q, scale = s.out(), s.out()
    lines.append(f"{q}, {scale} = torch.ops.lowering.group_quant({y}, {s.choice([0, 32, 64])})")
    return Step("\n".join(lines), (q, scale), (op, "group_quant"))


def _gate_operands(s: Scope) -> tuple[list[str], str, str]:
    """Lines that name them, the gate and the other factor."""
    x = s.real(lambda v: v.last >= 32 and v.last % 32 == 0)
    if s.chance(0.5) and x.last >= 64 and x.last % 64 == 0:
        half = x.last // 2
        split = [f"g, u = {x}.chunk(2, -1)", f"g, u = {x}[..., :{half}], {x}[..., {half}:]"]
        return [s.choice([*split, f"u, g = {x}.split({half}, dim=-1)"])], "g", "u"
    other = s.real(x.like, lambda v: v.dtype == x.dtype or s.chance(0.1))
    return [], str(x), str(other)


def routing(s: Scope) -> Step:
    """The operation, or its written form, of float32 scores whose order is certain."""
    x = s.real(lambda v: v.last in (8, 16, 32, 64), lambda v: v.finite())
    bias, weights, ids = s.weight((x.last,), FLOATS[0], "normal"), s.out(), s.out()
    groups, top = s.choice([1, 2, 4]), s.choice([1, 2, 3])
    of_groups = f"topk={top}, num_expert_group={groups}, topk_group={s.choice([1, groups])}"
    scaled = f"renormalize={s.chance(0.5)}, routed_scaling_factor=2.5"
    named = f"{weights}, {ids} = torch.ops.lowering.grouped_topk({x}, {bias}, {of_groups}, {scaled})"
    written = "\n".join(
        [
            f"p = {x}.float().sigmoid()",
            f"{ids} = torch.topk(p + {bias}, {top}, dim=-1, sorted=True)[1]",
            f"{weights} = p.gather(-1, {ids})",
            f"{weights} = {weights} / ({weights}.sum(-1, keepdim=True) + 1e-20) * 2.5",
        ]
    )
    return Step(s.choice([named, written]), (weights, ids), ("grouped_topk",))


def softmax_routing(s: Scope) -> Step:
    """A softmax and its largest, in both orders, with and without the mask of those chosen."""
    x = s.real(lambda v: v.last in (8, 16, 32, 64), lambda v: v.finite())
    weights, ids, top = s.out(), s.out(), s.choice([1, 2, 4])
    code = s.choice(
        [
            f"{weights}, {ids} = torch.topk(torch.softmax({x}.float(), -1), {top}, dim=-1)",
            f"{weights}, {ids} = torch.topk({x}.float(), {top}, dim=-1)\n{weights} = {weights}.softmax(-1)",
            f"{weights}, {ids} = torch.topk(torch.softmax({x}.float(), -1), {top}, dim=-1)\n"
            f"{weights} = torch.zeros_like({x}).scatter(-1, {ids}, {weights}.to({x}.dtype))",
            f"{weights}, {ids} = torch.topk({x}.float(), {top}, dim=-1)\n"
            f"{weights} = F.one_hot({ids}, {x.last}).sum(-2)",
        ]
    )
    return Step(code, (weights, ids))


STEPS = (
    (3, named_norm),
    (2, layer_norm),
    (2, added_norm),
    (5, written_norm),
    (2, other_norm),
    (2, gate),
    (2, quantized_gate),
    (1, routing),
    (1, softmax_routing),
)
