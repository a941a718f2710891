"""Products that add a residual: their kernels on every target, and which adds of a program they take."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering.backends import toolchain
from lowering.families.packed import PackedTile
from lowering.families.registry import instance
from lowering.targets import resolve
from patterns.contracts import LinearSpec, MatmulSpec, RowSpec, Spec
from patterns.packed_matmul import PackedSpec
from tests.families import packed_cases, test_linear, test_matmul
from tests.families.residual_cases import assert_adds
from tests.gfx950 import gfx950_kernels
from tests.gfx950.test_gfx950_matmul import shuffled
from tools import gfx950

LOW = torch.ops.lowering
E4M3 = "float8_e4m3fn"
SHUFFLED = {"b_layout": "shuffled_16x16"}


Case = TypeVar("Case", MatmulSpec, LinearSpec, PackedSpec)


def adding(spec: Case) -> Case:
    return dataclasses.replace(spec, residual=True)


def operands(case: Spec, rows: int) -> list[Tensor]:
    """What the plain product reads, as it lies in memory."""
    if isinstance(case, PackedSpec):
        return packed_cases.in_memory(case, packed_cases.operands(case, rows))
    if isinstance(case, LinearSpec):
        return test_linear.operands(case, rows)
    assert isinstance(case, MatmulSpec)
    tensors = test_matmul.in_memory(case, test_matmul.operands(case, rows, seed=rows))
    return [tensors[0], shuffled(tensors[1]), *tensors[2:]] if case.b_layout == "shuffled_16x16" else tensors


# Each way in which a source finishes a result, ragged columns among them.
CPU = {
    "blocks_bf16": MatmulSpec(131, 256, 128, E4M3, E4M3, "bfloat16"),
    "channels_f16_bias": MatmulSpec(97, 320, 320, E4M3, E4M3, "float16", bias=True, b_scales="rows"),
    "integers_f32": MatmulSpec(33, 64, 64, "int8", "int8", "float32", bias=True, b_scales="rows"),
    "integers_bias_rounded": MatmulSpec(
        33, 64, 64, "int8", "int8", "bfloat16", bias=True, b_scales="rows", bias_rounding="twice"
    ),
    "linear_bf16_bias": LinearSpec(33, 64, "bfloat16", bias=True),
    "int4": PackedSpec(97, 320, 32, 4, "float16", "float16", zeros=True, bias=True),
}


@pytest.mark.parametrize("name", CPU)
def test_on_a_cpu(name: str, launcher) -> None:
    case, cpu = CPU[name], resolve("cpu")
    for shift, rows in enumerate((0, 1, 2, 130)):
        assert_adds(
            instance(case, cpu), instance(adding(case), cpu), launcher, operands(case, rows), rows, shift
        )


AMD = {
    "blocks_bf16": MatmulSpec(150, 256, 128, E4M3, E4M3, "bfloat16", a_scale_layout="column", **SHUFFLED),
    "channels_f16_bias": MatmulSpec(
        19, 128, 128, E4M3, E4M3, "float16", bias=True, b_scales="rows", **SHUFFLED
    ),
    "integers_f32": MatmulSpec(33, 128, 128, "int8", "int8", "float32", b_scales="rows", **SHUFFLED),
    "int4": PackedSpec(70, 256, 128, 4, "bfloat16", "float16", bias=True, **SHUFFLED),
    "int8_f16": PackedSpec(40, 256, 128, 8, "float16", "float16", **SHUFFLED),
}


@pytest.mark.parametrize("name", AMD)
def test_executed_for_amd(name: str) -> None:
    """Without scratch memory, as without a residual; few rows, and many of a product of codes."""
    case, target = AMD[name], resolve("gfx950")
    plain, kernel = instance(case, target), instance(adding(case), target)
    resources = gfx950.CodeObject(toolchain.compile_kernel(kernel)).kernel(kernel.entry)
    assert resources.scratch_bytes == 0
    launcher = cache(gfx950_kernels.launcher)
    for shift, rows in enumerate((1, 17, 70)):
        assert_adds(plain, kernel, launcher, operands(case, rows), rows, shift)


def test_emulated_packed_weights_for_nvidia(launcher) -> None:
    """A cluster's sums and those of one workgroup; two columns at once and one."""
    from lowering.families.packed import instance as packed

    case, target = (
        PackedSpec(17, 512, 512, 4, "bfloat16", "bfloat16", bias=True, **SHUFFLED),
        resolve("sm_90"),
    )
    for tile in (PackedTile(2, 2, 1, 3), PackedTile(1, 1, 1, 1)):
        plain, kernel = packed(case, target, tile), packed(adding(case), target, tile)
        for rows in (1, 13):
            assert_adds(plain, kernel, launcher, operands(case, rows), rows)


# -- programs -------------------------------------------------------------------------------------------


class Sums(nn.Module):
    """A product beside another one, one whose sum a norm reads, and one that is read besides its sum."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second", "third", "fourth"):
            codes, scale = LOW.group_quant(torch.randn(64, 64), 0, dtype=torch.int8)
            setattr(self, name, nn.Buffer(codes))
            setattr(self, f"{name}_scale", nn.Buffer(scale))
        self.norm = nn.RMSNorm(64, dtype=torch.bfloat16)

    def product(self, x: Tensor, name: str) -> Tensor:
        codes, scale = LOW.group_quant(x, 0, dtype=torch.int8)
        return LOW.block_scaled_matmul(
            codes, getattr(self, name), scale, getattr(self, f"{name}_scale"), torch.bfloat16
        )

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        both = self.product(x, "first") + self.product(y, "second")
        stream = y + self.product(y, "third")
        kept = self.product(y, "fourth")
        return (
            both,
            self.norm(stream),
            stream,
            kept + y,
            kept,
            2 * torch.add(self.product(x, "first"), y, alpha=2),
        )


def test_a_product_takes_the_sum_that_no_norm_takes() -> None:
    model, rows = Sums(), torch.export.Dim("rows")
    x, y = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    compiled = lowering.compile(model, (x, y), dynamic_shapes={"x": {1: rows}, "y": {1: rows}})
    specs = [launch.kernel.spec for launch in compiled.dispatched.launches]
    products = [spec.residual for spec in specs if isinstance(spec, MatmulSpec)]
    assert sorted(products) == [False, False, False, False, True]
    (norm,) = (spec.norm for spec in specs if isinstance(spec, RowSpec) and spec.norm)
    assert norm.residual == "rounded"
    program = lowering.load(compiled.vmfb)
    for count in (1, 5):
        given = torch.randn(2, count, 64).bfloat16(), torch.randn(2, count, 64).bfloat16()
        for found, expected in zip(program(*given), model(*given), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("target", ["h200", "b200", "gfx950"])
def test_gpus_have_kernels_for_it(target: str) -> None:
    """Of products of codes and of packed weights; what follows is fused as before."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, codes, scale, *_ = packed_cases.operands(
                PackedSpec(128, 128, 128, 4, "bfloat16", "bfloat16"), 1
            )
            self.codes, self.scale = nn.Buffer(codes), nn.Buffer(scale)
            self.weight = nn.Buffer(torch.randn(128, 128).to(torch.float8_e4m3fn))
            self.block = nn.Buffer(torch.ones(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            q, scale = LOW.group_quant(x, 128)
            h = x + LOW.block_scaled_matmul(q, self.weight, scale, self.block, torch.bfloat16)
            return torch.relu(h + LOW.packed_matmul(h, self.codes, self.scale))

    compiled = lowering.compile(Layer(), (torch.randn(7, 128).bfloat16(),), target=target)
    specs = [launch.kernel.spec for launch in compiled.dispatched.launches]
    assert [spec.residual for spec in specs if isinstance(spec, (MatmulSpec, PackedSpec))] == [True, True]
