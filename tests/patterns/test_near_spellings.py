"""What is nearly a spelling of a norm, quantization, gate or routing is computed as eager does, and reported.

Tensors are square wherever that hides which axis is meant, and rows and columns differ by powers of two, so
that a statistic of the wrong one is far off.  Several spellings are one program, to compile it once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import lowering

FP8, EPS = torch.float8_e4m3fn, 1e-3
SPELLING = Callable[..., Any]
N = 64


def normed(x: Tensor, statistic: SPELLING, root: SPELLING = torch.rsqrt) -> Tensor:
    return x * root(statistic(x.pow(2)) + EPS)


def mean(x: Tensor, *axes: int, keepdim: bool = True) -> Tensor:
    return x.mean(axes or -1, keepdim=keepdim)


def quantized(x: Tensor, amax: SPELLING, scale: SPELLING = lambda a: a.clamp(min=1e-10) / 448.0) -> Any:
    s = scale(amax(x.abs()))
    return (x / s).clamp(-448, 448).to(FP8), s


def by_row(a: Tensor) -> Tensor:
    return a.amax(-1, keepdim=True)


# -- each is given float32 x, y [64, 64], w [64] and z [8, 8, 64], of other magnitudes everywhere ----------

NORMS: dict[str, SPELLING] = {
    "dropped axis": lambda x, y, w, z: normed(x, lambda a: a.mean(-1)),
    "dropped axis, put back in front": lambda x, y, w, z: normed(x, lambda a: a.mean(-1).unsqueeze(0)),
    "indexed in front": lambda x, y, w, z: normed(x, lambda a: a.mean(-1)[None]),
    "viewed in front": lambda x, y, w, z: normed(x, lambda a: a.mean(-1).view(1, N)),
    "root put in front": lambda x, y, w, z: normed(x, lambda a: a.mean(-1), lambda m: m.rsqrt().unsqueeze(0)),
    "columns": lambda x, y, w, z: normed(x, lambda a: mean(a, 0)),
    "columns, negative": lambda x, y, w, z: normed(x, lambda a: mean(a, -2)),
    "columns, dropped": lambda x, y, w, z: normed(x, lambda a: a.mean(0)),
    "columns for rows": lambda x, y, w, z: normed(x, lambda a: a.mean(0).unsqueeze(-1)),
    "columns, transposed": lambda x, y, w, z: normed(x, lambda a: mean(a, 0).transpose(0, 1)),
    "both axes": lambda x, y, w, z: normed(x, lambda a: mean(a, 0, 1)),
    "all": lambda x, y, w, z: normed(x, torch.mean),
    "middle axis of three": lambda x, y, w, z: normed(z, lambda a: mean(a, 1)),
    "dropped, put in the middle": lambda x, y, w, z: normed(z[..., :8], lambda a: a.mean(-1).unsqueeze(1)),
    "dropped of three": lambda x, y, w, z: normed(z[..., :8], lambda a: a.mean(-1)),
    "sum without its axis": lambda x, y, w, z: normed(x, lambda a: a.sum(-1) / N),
    "sum over a wrong size": lambda x, y, w, z: normed(x, lambda a: a.sum(-1, keepdim=True) / (N - 1)),
    "sum times a wrong size": lambda x, y, w, z: normed(x, lambda a: a.sum(-1, keepdim=True) * (1 / 32)),
    "sum times 1 over a size": lambda x, y, w, z: normed(
        x[:, :48], lambda a: a.sum(-1, keepdim=True) * (1 / 48)
    ),
    "mean of a multiple": lambda x, y, w, z: normed(x, lambda a: mean(a) * 2.0),
    "division by a root": lambda x, y, w, z: x / torch.sqrt(mean(x * x) + EPS),
    "bounded mean": lambda x, y, w, z: x * torch.rsqrt(mean(x * x).clamp(min=EPS)),
    "epsilon taken twice": lambda x, y, w, z: (
        x * torch.rsqrt(torch.add(mean(x * x), torch.tensor(EPS), alpha=2))
    ),
    "epsilon taken away": lambda x, y, w, z: x * torch.rsqrt(mean(x * x) - 1e-9),
    "an epsilon for each row": lambda x, y, w, z: x * torch.rsqrt(mean(x * x) + w.unsqueeze(-1)),
    "a statistic of 16 bits": lambda x, y, w, z: normed(x, mean, lambda m: m.rsqrt().bfloat16()),
    "another tensor's statistic": lambda x, y, w, z: y * torch.rsqrt(mean(x * x) + EPS),
    "its transpose's statistic": lambda x, y, w, z: x * torch.rsqrt(mean(x.T * x.T) + EPS),
    "layer norm of two axes": lambda x, y, w, z: F.layer_norm(z, (8, N), None, None, EPS),
    "variance of a sample": lambda x, y, w, z: (
        (x - mean(x)) * torch.rsqrt(x.var(-1, correction=1, keepdim=True) + EPS)
    ),
    "another tensor's variance": lambda x, y, w, z: (
        (y - mean(y)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "another tensor's mean": lambda x, y, w, z: (
        (x - mean(y)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "means of columns": lambda x, y, w, z: (
        (x - mean(x, 0)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "mean without its axis": lambda x, y, w, z: (
        (x - x.mean(-1)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "variance of columns": lambda x, y, w, z: (
        (x - mean(x)) * torch.rsqrt(x.var(0, correction=0, keepdim=True) + EPS)
    ),
    "twice the mean": lambda x, y, w, z: (
        torch.sub(x, mean(x), alpha=2) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "deviations by a mean of squares": lambda x, y, w, z: (x - mean(x)) * torch.rsqrt(mean(x * x) + EPS),
    "deviation of a sample": lambda x, y, w, z: (x - mean(x)) / (x.std(-1, keepdim=True) + EPS),
    "length": lambda x, y, w, z: F.normalize(x, dim=-1) * N**0.5 * w,
}
OTHERS: dict[str, SPELLING] = {
    "another power": lambda x, y, w, z: normed(x, mean, lambda m: m.pow(-0.25)),
    "mean of other products": lambda x, y, w, z: x * torch.rsqrt(mean(x * x.T).abs() + EPS),
    "a length": lambda x, y, w, z: F.normalize(x, dim=-1),
    "a deviation": lambda x, y, w, z: mean(x * x).sqrt(),
    "picture": lambda x, y, w, z: (x.sigmoid() * 255).round().clamp(0, 255).to(torch.uint8),
    "largest values": lambda x, y, w, z: x.topk(3, dim=-1)[0],
    "best and their sum": lambda x, y, w, z: (x.softmax(-1).cumsum(-1), x.argmax(-1)),
}
# The norm itself is one; what it is multiplied with is no weight of it.
WEIGHTS: dict[str, SPELLING] = {
    "a weight of rows": lambda x, y, w, z: normed(x, mean) * w.unsqueeze(-1),
    "a weight of elements": lambda x, y, w, z: normed(x, mean) * y,
    "a whole number": lambda x, y, w, z: normed(x, mean) * (w * 8).to(torch.int32),
    "a weight added": lambda x, y, w, z: normed(x, mean) * torch.add(w, w, alpha=2),
    "a residual taken twice": lambda x, y, w, z: normed(torch.add(x, y, alpha=2), mean),
    "a residual of columns": lambda x, y, w, z: normed(x + w, mean),
    "a residual of rows": lambda x, y, w, z: normed(x + w.unsqueeze(-1), mean),
}
QUANTIZATIONS: dict[str, SPELLING] = {
    "dropped axis": lambda x, y, w, z: quantized(x, lambda a: a.amax(-1)),
    "put back in front": lambda x, y, w, z: quantized(x, lambda a: a.amax(-1).unsqueeze(0)),
    "viewed in front": lambda x, y, w, z: quantized(x, lambda a: a.amax(-1).view(1, N)),
    "transposed": lambda x, y, w, z: quantized(x, by_row, lambda a: (a.clamp(min=1e-10) / 448.0).T),
    "columns": lambda x, y, w, z: quantized(x, lambda a: a.amax(0, keepdim=True)),
    "columns, dropped": lambda x, y, w, z: quantized(x, lambda a: a.amax(0)),
    "columns for rows": lambda x, y, w, z: quantized(x, lambda a: a.amax(0).unsqueeze(-1)),
    "max of columns": lambda x, y, w, z: quantized(x, lambda a: a.max(0, keepdim=True).values),
    "max, dropped": lambda x, y, w, z: quantized(x, lambda a: a.max(-1).values),
    "its transpose": lambda x, y, w, z: quantized(x, lambda a: by_row(a.T)),
    "dropped of three": lambda x, y, w, z: quantized(z[..., :8], lambda a: a.amax(-1)),
    "put in the middle": lambda x, y, w, z: quantized(z[..., :8], lambda a: a.amax(-1).unsqueeze(1)),
    "another tensor": lambda x, y, w, z: quantized(x, lambda a: by_row(y.abs())),
    "without a magnitude": lambda x, y, w, z: (
        (x / by_row(x)).clamp(-448, 448).to(FP8),
        by_row(x),
    ),
    "the least": lambda x, y, w, z: quantized(x, lambda a: a.amin(-1, keepdim=True)),
    "a power that is none": lambda x, y, w, z: quantized(
        x, by_row, lambda a: torch.exp2(torch.log2(a.clamp(min=1e-4) / 448.0))
    ),
    "a power rounded down": lambda x, y, w, z: quantized(
        x, by_row, lambda a: torch.exp2(torch.floor(torch.log2(a.clamp(min=1e-4) / 448.0)))
    ),
    "a logarithm of a ceiling": lambda x, y, w, z: quantized(
        x, by_row, lambda a: torch.exp2(torch.log2(torch.ceil(a.clamp(min=1e-4) / 448.0)))
    ),
    "a power and one more": lambda x, y, w, z: quantized(
        x, by_row, lambda a: torch.exp2(torch.ceil(torch.log2(a.clamp(min=1e-4) / 448.0)) + 1)
    ),
    "another base": lambda x, y, w, z: quantized(
        x, by_row, lambda a: torch.pow(4.0, torch.ceil(torch.log2(a.clamp(min=1e-4) / 448.0)))
    ),
    "bounds swapped": lambda x, y, w, z: (x / (by_row(x.abs()) / 448.0)).clamp(448, -448).to(FP8),
    "a given scale": lambda x, y, w, z: (x / w).clamp(-448, 448).to(FP8),
    "a given scale of rows": lambda x, y, w, z: (x / w.unsqueeze(-1)).clamp(-448, 448).to(FP8),
    "a zero point": lambda x, y, w, z: (
        (torch.round(x / 8.0) + torch.round(w.unsqueeze(-1))).clamp(-128, 127).to(torch.int8)
    ),
    "a zero point taken away": lambda x, y, w, z: (
        (torch.round(x / by_row(x.abs()) * 64) - 3).clamp(-128, 127).to(torch.int8)
    ),
    "a quotient cut off": lambda x, y, w, z: (
        torch.div(x, by_row(x.abs()) / 127.0, rounding_mode="trunc").clamp(-127, 127).to(torch.int8)
    ),
}
GATES: dict[str, SPELLING] = {
    "up of rows": lambda x, y, w, z: F.silu(x) * w.unsqueeze(-1),
    "up of columns": lambda x, y, w, z: F.silu(x) * w,
    "gate of columns": lambda x, y, w, z: F.silu(w) * x,
    "another constant": lambda x, y, w, z: F.silu(x * 2) * y,
    "sigmoid": lambda x, y, w, z: torch.sigmoid(x) * y,
    "quick gelu": lambda x, y, w, z: x * torch.sigmoid(1.702 * x) * y,
    "another cube": lambda x, y, w, z: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.05 * x.pow(3)))) * y,
    "a root that is another": lambda x, y, w, z: 0.5 * x * (1 + torch.erf(x / 1.5)) * y,
    "clamped": lambda x, y, w, z: F.silu(x.clamp(max=7.0)) * (y.clamp(-5, 7) + 1),
    "up of 16 bits": lambda x, y, w, z: y.bfloat16() * F.gelu(x),
    "gate of 16 bits": lambda x, y, w, z: F.silu(x.bfloat16()) * y,
    "two kinds of 16 bits": lambda x, y, w, z: F.silu(x.bfloat16()) * y.half(),
    "activated in 16 bits": lambda x, y, w, z: F.silu(x.bfloat16()).float() * y.bfloat16().float(),
    "written out in 16 bits": lambda x, y, w, z: x.bfloat16() * torch.sigmoid(x.bfloat16()) * y.bfloat16(),
    "rounded afterwards": lambda x, y, w, z: (F.silu(x) * y).bfloat16(),
}
# The reasons of those that are products of an activation; the others are none of one.
WHY_NO_GATE = {
    "up of rows": "the row kernel's gate and other factor have one shape",
    "up of columns": "the row kernel's gate and other factor have one shape",
    "gate of columns": "the row kernel's gate and other factor have one shape",
    "up of 16 bits": "its gate is float32 and the other factor bfloat16",
    "gate of 16 bits": "its gate is bfloat16 and the other factor float32",
    "two kinds of 16 bits": "its gate is bfloat16 and the other factor float16",
    "activated in 16 bits": "its activation is computed in bfloat16, and its product in float32",
    "written out in 16 bits": "its activation is written out in bfloat16",
    "rounded afterwards": "its product in float32 is read by prims.convert_element_type",
}


ROUTINGS: dict[str, SPELLING] = {
    "a bias of tokens": lambda x, y, w, z: routed(x, w.unsqueeze(-1)),
    "a bias of both": lambda x, y, w, z: routed(x, y),
    "softmax": lambda x, y, w, z: routed(x, w, torch.nn.Softmax(-1)),
    "softmax without a bias": lambda x, y, w, z: routed(x, None, torch.nn.Softmax(-1)),
    "square root of softplus": lambda x, y, w, z: routed(x, w, lambda v: F.softplus(v).sqrt()),
    "the chosen alone": lambda x, y, w, z: chosen_alone(x),
    "the best taken from the bias": lambda x, y, w, z: routed(x, w, alpha=-1),
    "a total without its axis": lambda x, y, w, z: routed(x[:4], w, keepdim=False),
}


def routed(
    gating: Tensor, bias: Tensor | None, score: SPELLING = torch.sigmoid, alpha: int = 1, keepdim: bool = True
) -> Tensor:
    """Weights of the 4 best experts; ids are left out, since equal choices may come in any order."""
    scores = score(gating / 32)
    choices = scores if bias is None else torch.add(scores, bias, alpha=alpha)
    weights = scores.gather(-1, choices.topk(4, dim=-1)[1])
    return weights / weights.sum(-1, keepdim=keepdim)


def chosen_alone(gating: Tensor) -> Tensor:
    """As gpt-oss has it: the softmax of the largest."""
    values, ids = gating.topk(4, dim=-1)
    return values.softmax(-1) * ids


# -- what is one, in other words ----------------------------------------------------------------------------

SAME: dict[str, SPELLING] = {
    "sum over the size": lambda x, y, w, z: normed(x, lambda a: a.sum(-1, keepdim=True) / N),
    "sum times 1 over the size": lambda x, y, w, z: normed(x, lambda a: a.sum(-1, keepdim=True) * (1 / N)),
    "sum of three axes": lambda x, y, w, z: normed(z, lambda a: a.sum(2, True) / a.shape[-1]),
    "power": lambda x, y, w, z: normed(x, mean, lambda m: m**-0.5) * w,
    "1 over a root": lambda x, y, w, z: normed(x, mean, lambda m: 1.0 / torch.sqrt(m)) * w,
    "1 over a power": lambda x, y, w, z: normed(x, mean, lambda m: 1.0 / m**0.5),
    "unsqueezed": lambda x, y, w, z: normed(x, lambda a: a.mean(-1).unsqueeze(-1)),
    "indexed": lambda x, y, w, z: normed(x, lambda a: a.mean(1)[..., None]),
    "viewed": lambda x, y, w, z: normed(x, lambda a: a.mean(-1).view(N, 1)),
    "root unsqueezed": lambda x, y, w, z: normed(z, lambda a: a.mean(-1), lambda m: m.rsqrt().unsqueeze(2)),
    "not widened in the product": lambda x, y, w, z: (
        x.bfloat16() * torch.rsqrt(mean(x.bfloat16().float().pow(2)) + EPS) * w.bfloat16().float()
    ).bfloat16(),
    "epsilon first": lambda x, y, w, z: x * torch.rsqrt(EPS + mean(torch.square(x))),
    "no epsilon": lambda x, y, w, z: x * torch.rsqrt(mean(x * x)),
}


class Spelled(nn.Module):
    """Some spellings of the same four tensors, as one program."""

    def __init__(self, spellings: list[SPELLING]):
        super().__init__()
        self.spellings = spellings

    def forward(self, x: Tensor, y: Tensor, w: Tensor, z: Tensor) -> Any:
        return [spelling(x, y, w, z) for spelling in self.spellings]


def tensors() -> tuple[Tensor, ...]:
    rows, columns = torch.arange(N) % 7, torch.arange(N) % 5
    spread = torch.exp2((rows.unsqueeze(-1) + columns).float())
    x, y = torch.randn(N, N) * spread, torch.randn(N, N) * spread.T
    blocks = torch.exp2((torch.arange(8)[:, None, None] + torch.arange(8)[:, None]).float() / 2)
    return x, y, torch.rand(N) + 0.5, torch.randn(8, 8, N) * blocks


def assert_close(got: Any, expected: Any, name: str) -> None:
    """To a few last places of float32; one code of 500 may be the next, where a quotient is nearly a tie."""
    for ours, eager in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert ours.dtype == eager.dtype and ours.shape == eager.shape, name
        if eager.dtype.itemsize == 1:
            assert (ours.float() != eager.float()).float().mean() <= 2e-3, name
        else:
            torch.testing.assert_close(ours, eager, rtol=2e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


def compiled(spellings: dict[str, SPELLING]) -> lowering.Report:
    """The report on a program of ``spellings``, once it has computed what eager does."""
    module, arguments = Spelled(list(spellings.values())), tensors()
    program = lowering.compile(module, arguments)
    results = lowering.load(program.vmfb)(*arguments)
    for name, got, expected in zip(spellings, results, module(*arguments), strict=True):
        assert_close(got, expected, name)
    return program.report


def parts(spellings: dict[str, SPELLING], size: int) -> list[dict[str, SPELLING]]:
    items = list(spellings.items())
    return [dict(items[start : start + size]) for start in range(0, len(items), size)]


def test_nearly_a_norm() -> None:
    for spellings in parts(NORMS, 18):
        report = compiled(spellings)
        assert [site.op for site in report.sites if site.fused] == []
        assert len(report.sites) >= len(spellings), "every one is a site"
        assert all(site.reason for site in report.sites)


def test_what_is_nothing_like_one_is_no_site() -> None:
    assert lowering.explain(Spelled(list(OTHERS.values())), tensors()).sites == ()


def test_a_norm_times_something_that_is_no_weight() -> None:
    report = compiled(WEIGHTS)
    assert {site.op for site in report.sites} == {"rms_norm"}
    assert len(report.sites) == len(WEIGHTS)


def test_nearly_a_quantization() -> None:
    for spellings in parts(QUANTIZATIONS, 14):
        report = compiled(spellings)
        assert [site.op for site in report.sites if site.fused] == []
        assert [site.op for site in report.sites] == ["group_quant"] * len(spellings)


def test_other_codes_and_values_are_named() -> None:
    found = {
        "uint8": lambda x, y, w, z: (x / by_row(x.abs()) * 127).round().clamp(0, 255).to(torch.uint8),
        "int32": lambda x, y, w, z: quantized((x * 8).to(torch.int32), by_row),
        "float64": lambda x, y, w, z: quantized(x.double(), by_row),
    }
    for name, spelling in found.items():
        (site,) = lowering.explain(Spelled([spelling]), tensors()).sites
        assert (site.op, site.status) == ("group_quant", "unfused") and name in (site.reason or ""), site


def test_a_number_has_no_rows() -> None:
    spellings = [
        lambda x, y, w, z: normed(x.sum(), mean),
        lambda x, y, w, z: quantized(x.sum(), by_row),
    ]
    report = lowering.explain(Spelled(spellings), tensors())
    assert [(site.op, site.status) for site in report.sites] == [
        ("rms_norm", "unfused"),
        ("group_quant", "unfused"),
    ]
    assert "has no axes" in (report.sites[0].reason or "") and report.sites[1].reason


def test_nearly_a_gate() -> None:
    """The quantization has a kernel, and the activation before it is no part of that."""
    quant = torch.ops.lowering.group_quant
    report = compiled({name: lambda *a, f=f: quant(f(*a), 32) for name, f in GATES.items()})
    quantizations = [site.reason or "" for site in report.sites if site.op == "group_quant" and site.reason]
    gates = [site for site in report.sites if site.op != "group_quant"]
    assert [site.op for site in gates if site.fused] == ["silu_mul"] * 2, "of a product, of a clamp"
    reasons = iter([site.reason or "" for site in gates if not site.fused])
    for name in (name for name in GATES if name in WHY_NO_GATE):
        assert WHY_NO_GATE[name] in next(reasons), name
    assert next(reasons, None) is None
    assert len(quantizations) == len(GATES) - 2
    assert all("is no part of this kernel: between them is " in reason for reason in quantizations)


def test_nearly_a_routing() -> None:
    report = compiled(ROUTINGS)
    assert [site.op for site in report.sites] == ["grouped_topk"] * len(ROUTINGS)
    apart = [name for name, site in zip(ROUTINGS, report.sites, strict=True) if not site.fused]
    assert apart == ["a bias of tokens", "a bias of both", "the best taken from the bias"]
    assert all(
        "are not those of the routing kernel" in (site.reason or "")
        for site in report.sites
        if not site.fused
    )


def test_the_same_in_other_words() -> None:
    report = compiled(SAME)
    assert [site.op for site in report.sites if site.fused] == ["rms_norm"] * len(SAME)


# -- casts that round -------------------------------------------------------------------------------------


class Cast(nn.Module):
    """What a cast between the two 16-bit floats loses, in each part of what fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(256) + 0.5).half(), requires_grad=False)

    def forward(self, x: Tensor, large: Tensor, residual: Tensor) -> Any:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        blocks = large.half().view(8, 2, 128)  # overflows
        s = blocks.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
        total = x.float() + residual.bfloat16().float()
        gate = F.silu(x.float()) * residual.bfloat16().float()
        again = x.half().float()
        return (
            (h * self.weight.bfloat16()).to(x.dtype),
            ((blocks / s).clamp(-448, 448).to(FP8), s),
            (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
            torch.ops.lowering.group_quant(gate, 128),
            (again * torch.rsqrt(again.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
        )


def test_a_cast_between_16_bit_floats_is_no_widening() -> None:
    """What is dropped is 8 bits and more of a number, in each of them."""
    x = torch.randint(-8, 9, (8, 256)).bfloat16()
    residual = (torch.randn(8, 256) * 100).half()
    arguments, module = (x, torch.randn(8, 256).bfloat16() * 40000, residual), Cast()
    program = lowering.compile(module, arguments)
    (unfused,) = [site for site in program.report.sites if not site.fused]
    assert "a kernel writes float16, as it reads" in (unfused.reason or "")
    for got, expected in zip(lowering.load(program.vmfb)(*arguments), module(*arguments), strict=True):
        for ours, eager in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            if eager.dtype == torch.float32:
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=0.0, equal_nan=True)
                continue
            different = (ours.float() != eager.float()) & ~(ours.isnan() & eager.isnan())
            assert different.float().mean() <= 1e-2, "the last place of a few, where sums round otherwise"
