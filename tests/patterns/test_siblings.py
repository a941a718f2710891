"""Products of one tensor that become one: bit for bit what they were apart, and which of them do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowering
from lowering.passes import join
from lowering.report.report import Report

LOW = torch.ops.lowering
TOKENS = torch.export.Dim("tokens", max=64)
WIDTHS = (192, 64, 128)


def codes(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).to(torch.float8_e4m3fn)


class Blocks(nn.Module):
    """A quantized layer whose scales are of blocks of 64 x 64; each quantizes its input itself."""

    def __init__(self, columns: int, depth: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Buffer(codes(columns, depth))
        self.scale = nn.Buffer(torch.rand(-(-columns // 64), depth // 64) + 0.5)
        self.bias = nn.Buffer(torch.randn(columns)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, scale = LOW.group_quant(x, 64)
        return LOW.block_scaled_matmul(q, self.weight, scale, self.scale, torch.float32, self.bias)


class Whole(nn.Module):
    """The same with one scale for each column, or, with ``one``, for all of them."""

    def __init__(self, columns: int, depth: int, one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Buffer(codes(columns, depth))
        self.scale = nn.Buffer(torch.rand(1 if one else columns, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, scale = LOW.group_quant(x, x.shape[-1])
        return LOW.block_scaled_matmul(q, self.weight, scale, self.scale, torch.float32)


class Packed(nn.Module):
    """A layer whose weights alone are of 4 bits, with zero points and a bias."""

    def __init__(self, columns: int, depth: int) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.randint(0, 256, (columns, depth // 2)).to(torch.uint8))
        self.scale = nn.Buffer(torch.rand(columns, depth // 64) + 0.5)
        self.zero = nn.Buffer(torch.randint(0, 16, (columns, depth // 64)).to(torch.uint8))
        self.bias = nn.Buffer(torch.randn(columns))

    def forward(self, x: Tensor) -> Tensor:
        return LOW.packed_matmul(x, self.codes, self.scale, self.zero, self.bias, bits=4)


MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    "blocks": Blocks,
    "bias": lambda n, k: Blocks(n, k, bias=True),
    "rows": Whole,
    "one": lambda n, k: Whole(n, k, one=True),
    "packed": Packed,
    "plain": lambda n, k: nn.Linear(k, n, bias=False),
    "plain_bias": lambda n, k: nn.Linear(k, n),
}
"""What makes a layer of n columns and depth k, by its kind."""


class Layer(nn.Module):
    """Three layers that read one tensor, one of which is parted into heads; then a gate and what it gates."""

    def __init__(self, make: Callable[[int, int], nn.Module], depth: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(n, depth) for n in WIDTHS)
        self.up, self.gate = make(192, depth), make(192, depth)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads, *rest = (layer(x) for layer in self.layers)
        heads = heads.view(-1, 3, 64).transpose(0, 1) * 3
        up, gate = self.up(x), self.gate(x)
        q, scale = LOW.group_quant(functional.silu(gate) * up, 64)
        return heads.transpose(0, 1).flatten(1), *(each * 2 for each in rest), q, scale


class Model(nn.Module):
    """A layer of each kind."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Layer(MAKERS[kind]) for kind in kinds or MAKERS)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inputs = (x * (number + 1) for number in range(len(self.layers)))
        return tuple(
            result for layer, each in zip(self.layers, inputs, strict=True) for result in layer(each)
        )


def compiled(model: nn.Module, **options: Any) -> lowering.Compiled:
    return lowering.compile(model, (torch.randn(3, 128),), dynamic_shapes={"x": {0: TOKENS}}, **options)


@pytest.fixture(scope="module")
def joined() -> lowering.Compiled:
    return compiled(Model())


@pytest.fixture(scope="module")
def apart() -> lowering.Compiled:
    """The same without this step."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(join, "join_siblings", lambda *given: None)
        return compiled(Model())


def said(report: Report) -> list[str]:
    """What was joined, a line for each place in a model."""
    return [remark.text for remark in report.remarks if remark.op == "siblings"]


THREE = "3 products of one tensor are one, of 192 + 64 + 128 columns"
TWO = "2 products of one tensor are one, of 192 + 192 columns"
PLACES = 4  # of products in MAKERS


def test_every_kind_of_product_is_joined(joined: lowering.Compiled, apart: lowering.Compiled) -> None:
    assert said(joined.report) == [THREE, TWO] * PLACES and not said(apart.report)
    assert joined.report.dispatches == apart.report.dispatches - 3 * len(MAKERS)
    assert all(site.fused for site in joined.report.sites)
    # Each group has one weight, of as many bytes as its weights had.
    weights = [each for each in joined.report.folded if "cat" in each.operations and each.bytes.after > 8192]
    assert len(weights) == 2 * len(MAKERS)
    assert all(each.bytes.before == each.bytes.after for each in weights)
    assert len(joined.vmfb) < 1.01 * len(apart.vmfb)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_nothing_changes_but_the_number_of_products(
    joined: lowering.Compiled, apart: lowering.Compiled, rows: int
) -> None:
    """Bit for bit: the sum of a column does not know of the others."""
    x = torch.randn(rows, 128)
    for one, other in zip(lowering.load(joined.vmfb)(x), lowering.load(apart.vmfb)(x), strict=True):
        assert one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def explained(model: nn.Module, target: str = "cpu") -> Report:
    return lowering.explain(model, (torch.randn(3, 128),), dynamic_shapes={"x": {0: TOKENS}}, target=target)


@pytest.mark.parametrize("target", ["h200", "b200", "gfx950"])
def test_on_gpus_as_well(target: str) -> None:
    assert said(explained(Model("rows", "one"), target)) == [THREE, TWO]


def test_where_no_kernel_computes_them_nothing_is_joined() -> None:
    """This chip has another flavour of 8-bit floats."""
    assert not said(explained(Model("rows", "blocks", "plain"), "gfx942"))


# -- what stays apart ----------------------------------------------------------------------------------


class Tied(nn.Module):
    """Three layers of one tensor; the weight of the last is read by something else as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in WIDTHS)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = [2 * layer(x) for layer in self.layers]
        return *found, self.layers[-1](x * x) * 2


def test_a_weight_that_is_read_elsewhere_stays_what_it_is() -> None:
    """The others are joined, and nothing is stored twice."""
    model, x = Tied(), torch.randn(3, 128)
    program = compiled(model)
    assert said(program.report) == ["2 products of one tensor are one, of 128 + 128 columns"]
    assert [each.sources for each in program.report.folded] == [("layers.0.weight", "layers.1.weight")]
    for found, expected in zip(lowering.load(program.vmfb)(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """A layer that is used for two tensors, and one weight that two of its products have."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(128, 64, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def half(self, x: Tensor) -> Tensor:
        return self.one(x) * self.two(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x) + self.half(x + 1)


def test_layers_that_are_used_twice_share_the_joined_weight() -> None:
    program = compiled(Twice())
    assert said(program.report) == ["2 products of one tensor are one, of 64 + 64 columns"]
    assert [each.sources for each in program.report.folded] == [("one.weight", "two.weight")]


class Ragged(nn.Module):
    """Weights of which the first ends in the middle of a block of scales."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Blocks(96, 128), Blocks(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)[:, :64] * self.two(x)


def test_a_block_of_scales_is_not_cut() -> None:
    why = "a block of their scales would reach over the end of a weight"
    assert said(explained(Ragged())) == [f"2 products of one tensor stay apart: {why}"]


def test_what_is_returned_as_it_is_stays_apart() -> None:
    """A slice of a result would be copied for the caller."""

    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Blocks(64, 128), Blocks(64, 128)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(x)

    assert not said(explained(Returned()))


# -- several functions ---------------------------------------------------------------------------------


class Part(nn.Module):
    """One of two functions over the same weights: the first layer alone, or both."""

    def __init__(self, model: Twice, alone: bool) -> None:
        super().__init__()
        self.model, self.alone = model, alone

    def forward(self, x: Tensor) -> Tensor:
        return self.model.one(x) * 2 if self.alone else self.model(x)


@pytest.mark.parametrize("alone", [False, True])
def test_functions_share_one_joined_weight_or_none(alone: bool) -> None:
    """Where one of them needs a weight by itself, none is joined: it would be there twice."""
    model, x = Twice(), torch.randn(5, 128)
    functions = {
        "several": (Part(model, False), (x,), {"x": {0: TOKENS}}),
        "single": (Part(model, alone), (x[:1],)),
    }
    compiled = lowering.compile(functions)
    joined = [each.sources for each in compiled.report.folded]
    assert joined == ([] if alone else [("model.one.weight", "model.two.weight")])
    program = lowering.load(compiled.vmfb)
    torch.testing.assert_close(program.several(x), model(x), rtol=1e-5, atol=1e-5)
    expected = Part(model, alone)(x[:1])
    torch.testing.assert_close(program.single(x[:1]), expected, rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_no_number_is_named_as_before() -> None:
    model = Model("blocks")
    model.get_buffer("layers.0.layers.1.scale")[0, 1] = torch.nan
    with pytest.raises(
        lowering.CompileError, match=r"the scale 'layers.0.layers.1.scale' .* is nan at \[0, 1\]"
    ):
        compiled(model)
