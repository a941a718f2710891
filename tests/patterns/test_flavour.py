"""``--fp8 native``: a quantization becomes one of the target's e4m3 flavour where only products see it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lowering
from lowering import compiler
from lowering.targets import resolve
from patterns.contracts import Quantization
from patterns.flavour import retargeted

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
group_quant = torch.ops.lowering.group_quant
rms_norm = torch.ops.lowering.rms_norm


class Layer(nn.Module):
    """A norm, its quantization to ``dtype``, and what ``reads`` does with codes, scales and weight."""

    def __init__(self, reads: Callable[..., Any], dtype: torch.dtype, **scheme: Any):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.Parameter(torch.rand(256, generator=generator).bfloat16(), requires_grad=False)
        weight = torch.randn(256, 256, generator=generator).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(2, 2, generator=generator), requires_grad=False)
        self.reads, self.scheme, self.dtype = reads, scheme, dtype

    def forward(self, x: torch.Tensor) -> Any:
        q, scale = group_quant(rms_norm(x, self.norm, 1e-6), 128, dtype=self.dtype, **self.scheme)
        return self.reads(self, q, scale)


def product(layer: Layer, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    multiply = torch.ops.lowering.block_scaled_matmul
    return multiply(q, layer.weight, scale, layer.weight_scale, torch.bfloat16)


def dequantized(layer: Layer, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (q.unflatten(-1, (2, 128)).float() * scale.unsqueeze(-1)).flatten(-2)


def viewed(layer: Layer, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return product(layer, q.reshape(-1, 256), scale.reshape(-1, 2))


READS = {"product": product, "dequantized": dequantized, "viewed": viewed}
X = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that this CPU has one flavour only, so that retargeted programs run here."""

    def pretend(dtype: str) -> None:
        monkeypatch.setattr(compiler, "resolve", lambda name: replace(resolve(name), floats=(dtype,)))

    return pretend


@pytest.mark.parametrize("reads", READS.values(), ids=READS.keys())
@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_to_fnuz_the_products_are_the_same_bit_for_bit(reads: Callable, scale: str, only: Callable) -> None:
    model = Layer(reads, FN, scale=scale, scale_floor=1e-7)
    kept = lowering.compile(model, (X,))
    only("float8_e4m3fnuz")
    changed = lowering.compile(model, (X,), fp8="native")
    norm, quant = changed.report.sites
    assert norm.fused and norm.note is None and quant.fused
    assert quant.contract == Quantization(
        128, "float8_e4m3fnuz", scale, limit=224.0, scale_floor=pytest.approx(2e-7)
    )
    assert quant.note is not None and "codes and products are the same" in quant.note
    assert changed.report.summary() == kept.report.summary()
    assert torch.equal(lowering.load(changed.vmfb)(X), lowering.load(kept.vmfb)(X))


def test_vllms_limit_of_fnuz_is_the_whole_range_of_fn(only: Callable) -> None:
    model = Layer(dequantized, FNUZ, limit=224.0)
    kept = lowering.compile(model, (X,))
    only("float8_e4m3fn")
    changed = lowering.compile(model, (X,), fp8="native")
    assert changed.report.sites[1].contract == Quantization(128)
    assert torch.equal(lowering.load(changed.vmfb)(X), lowering.load(kept.vmfb)(X))


def test_what_uses_all_of_fnuz_is_rounded_anew(only: Callable) -> None:
    model = Layer(dequantized, FNUZ)
    kept = lowering.compile(model, (X,))
    only("float8_e4m3fn")
    changed = lowering.compile(model, (X,), fp8="native")
    assert "codes are rounded anew" in (changed.report.sites[1].note or "")
    ours, theirs = lowering.load(changed.vmfb)(X), lowering.load(kept.vmfb)(X)
    assert not torch.equal(ours, theirs)
    # Each is within half a step, a sixteenth of the value, of what it rounds.
    torch.testing.assert_close(ours, theirs, rtol=1 / 8, atol=float(theirs.abs().max()) * 2**-9)


SEEN: dict[str, tuple[Callable[..., Any], str]] = {
    "codes returned": (
        lambda layer, q, scale: (q, product(layer, q, scale)),
        "the program returns its codes",
    ),
    "scales returned": (lambda layer, q, scale: (scale, product(layer, q, scale)), "returns its scales"),
    "bits read": (lambda layer, q, scale: q.view(torch.uint8), "reads its codes"),
    "codes added": (lambda layer, q, scale: q.float() + 1.0, r"aten\.add\.Scalar at .*test_flavour\.py:\d+"),
    "scales of another": (
        lambda layer, q, scale: product(layer, q, layer.weight_scale),
        "block_scaled_matmul at .* reads its codes",
    ),
    "both sides": (
        lambda layer, q, scale: torch.ops.lowering.block_scaled_matmul(
            q, q.expand(128, 2, 256).reshape(256, 256), scale, layer.weight_scale, torch.bfloat16
        ),
        "block_scaled_matmul at .* reads its codes",
    ),
}


@pytest.mark.parametrize(("reads", "who"), SEEN.values(), ids=SEEN.keys())
def test_what_something_else_sees_stays_and_says_who(reads: Callable, who: str) -> None:
    report = lowering.explain(Layer(reads, FN), (X[0, :2],), target="gfx942", fp8="native")
    norm, quant = report.sites
    assert norm.fused and not quant.fused
    assert "gfx942 converts to float8_e4m3fnuz" in (quant.reason or "")
    assert quant.note is not None and quant.note.startswith("kept as float8_e4m3fn: ")
    assert re.search(who, quant.note), quant.note


def test_a_gfx942_program_of_a_graph_in_fn() -> None:
    model = Layer(product, FN)
    asis = lowering.explain(model, (X,), target="gfx942")
    assert [site.fused for site in asis.sites] == [True, False]
    assert "--fp8 native" in (asis.sites[1].reason or "")
    native = lowering.compile(model, (X,), target="gfx942", fp8="native")
    assert native.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
def test_where_the_target_has_the_flavour_nothing_changes(target: str) -> None:
    model = Layer(product, FN)
    asis = lowering.explain(model, (X,), target=target)
    assert lowering.explain(model, (X,), target=target, fp8="native").to_json() == asis.to_json()


def test_there_and_back_is_the_same_quantization() -> None:
    quantization = Quantization(128, scale_floor=1e-8, amax_ceiling=12.0)
    assert retargeted(retargeted(quantization)) == quantization


def test_another_word_is_a_usage_error() -> None:
    with pytest.raises(lowering.UsageError, match="fp8 is as-is or native, not 'fnuz'"):
        lowering.explain(nn.ReLU(), (X,), fp8="fnuz")  # pyright: ignore[reportArgumentType]
