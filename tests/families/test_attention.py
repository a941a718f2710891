"""Attention of few queries: kernels of ``kernels/attention.c`` against float64, and programs with them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import lowering
from lowering.families.attention import instance, why_unsupported
from lowering.targets import resolve
from patterns.attention import AttentionSpec
from tests.families.host_kernels import launcher, run

CPU = resolve("cpu")

# Sequences, heads, heads of keys, queries, keys, sizes; what the mask has a row for each of.
CASES = {
    "decode": AttentionSpec(1, 9, 3, 1, 1024, 64, 64, "float32", 0.125, (1, 1, 1)),
    "sequences": AttentionSpec(3, 4, 2, 1, 130, 128, 128, "bfloat16", 0.09, (3, 1, 1)),
    "queries": AttentionSpec(2, 4, 1, 3, 77, 32, 48, "float32", 0.3, (2, 4, 3)),
    "queries alone": AttentionSpec(2, 2, 2, 5, 64, 16, 256, "float16", 0.2, (1, 1, 5)),
    "no mask": AttentionSpec(1, 6, 2, 2, 65, 48, 16, "float16", 0.5),
    "one key": AttentionSpec(1, 2, 2, 1, 1, 16, 16, "float32", 1.0),
}
STEP = {"float32": 2.0**-21, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""What a result may be off by, times its largest: the rounding to its dtype, or sums of float32."""


def operands(spec: AttentionSpec) -> list[Tensor]:
    """q, k, v [B, H, L, E], and a mask that leaves two thirds of the keys, among them not all."""
    generator, dtype = torch.Generator().manual_seed(spec.keys), getattr(torch, spec.dtype)
    shapes = [
        (spec.batch, spec.heads, spec.queries, spec.depth),
        (spec.batch, spec.shared, spec.keys, spec.depth),
        (spec.batch, spec.shared, spec.keys, spec.width),
    ]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if spec.mask:
        mask = torch.randn(*spec.mask, spec.keys, generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.1] = -torch.inf
        mask[..., 2 * spec.keys // 3 :] = -torch.inf
        tensors.append(mask)
    return tensors


def computed(spec: AttentionSpec, tensors: list[Tensor], directory: Path, shift: int = 0) -> Tensor:
    """What the two kernels make of them, [B, H, L, V]."""
    given = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    for each in (spec, dataclasses.replace(spec, joined=True)):
        place = directory / str(each.joined)
        place.mkdir(exist_ok=True)
        kernel = instance(each, CPU)
        given = run(kernel, launcher(kernel, place), given, spec.rows, shift)
    return given[0].view(spec.batch, spec.heads, spec.queries, spec.width)


def exact(spec: AttentionSpec, tensors: list[Tensor]) -> Tensor:
    q, k, v, *masks = (tensor.double() for tensor in tensors)
    k, v = (each.repeat_interleave(spec.heads // spec.shared, 1) for each in (k, v))
    return scaled_dot_product_attention(q, k, v, masks[0] if masks else None, scale=spec.scale)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_with_float64(name: str, tmp_path: Path) -> None:
    spec = CASES[name]
    tensors = operands(spec)
    expected = exact(spec, tensors)
    for shift in (0, 1):
        found = computed(spec, tensors, tmp_path, shift)
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= STEP[spec.dtype], float(error)


def test_keys_that_no_query_looks_at_are_not_read(tmp_path: Path) -> None:
    """What is behind the filled part of a cache may be anything; a query with no key at all gives zeros."""
    spec = CASES["queries"]
    q, k, v, mask = operands(spec)
    mask[1, 2, 1] = -torch.inf
    expected = exact(spec, [q, k, v, mask])
    assert not expected[1, 2, 1].any()
    k[:, :, 56:], v[:, :, 56:] = torch.nan, torch.nan  # from the first vector on that holds none
    found = computed(spec, [q, k, v, mask], tmp_path)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert not found[1, 2, 1].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_is_no_number_is_none_afterwards(value: float, tmp_path: Path) -> None:
    """One score that is NaN or infinite makes a row NaN, as in eager PyTorch; a large one is no overflow."""
    spec = dataclasses.replace(CASES["decode"], keys=100)
    q, k, v, mask = operands(spec)
    mask[..., 40] = value
    expected = exact(spec, [q, k, v, mask])
    found = computed(spec, [q, k, v, mask], tmp_path)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_no_kernel_computes_is_said() -> None:
    spec, h200 = CASES["decode"], resolve("h200")
    assert "written for the cpu" in (why_unsupported(spec, h200) or "")
    for change, part in (
        ({"dtype": "float64"}, "not float64"),
        ({"queries": 11}, "takes 32 queries of the same keys, not 33"),
        ({"depth": 72}, "whole 16 elements up to 256, not 72"),
        ({"width": 272}, "not 272"),
        ({"keys": 1 << 20}, "keys, not 1048576"),
    ):
        assert part in (why_unsupported(dataclasses.replace(spec, **change), CPU) or ""), change


# -- programs ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Keys and values of two heads, which the model repeats for six, and a mask of either kind."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return 2 * scaled_dot_product_attention(q, repeated(k), repeated(v), mask, **self.options)


def repeated(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, 3, length, size).reshape(batch, 3 * heads, length, size)


def arguments(queries: int, dtype: torch.dtype, boolean: bool) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(2, *shape).to(dtype) for shape in ((6, queries, 32), (2, 90, 32), (2, 90, 48)))
    allowed = torch.rand(2, 1, queries, 90) < 0.7
    mask = torch.randn(allowed.shape).masked_fill(~allowed, -torch.inf).to(dtype)
    return q, k, v, allowed if boolean else mask


@pytest.mark.parametrize(
    ("dtype", "boolean"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)]
)
def test_a_program_takes_the_kernels_where_sizes_are_known(dtype: torch.dtype, boolean: bool) -> None:
    module, given = Attention(), arguments(2, dtype, boolean)
    compiled = lowering.compile(module, given)
    assert [launch.kernel.source for launch in compiled.dispatched.launches] == ["attention.c"] * 2
    program = lowering.load(compiled.vmfb)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for call in (given, arguments(2, dtype, boolean)):
        torch.testing.assert_close(program(*call), module(*call), rtol=tolerance, atol=tolerance)


def test_otherwise_it_is_spelled_out() -> None:
    """Many queries, an open length, and a causal one."""
    open_length = {"q": None, "k": {2: torch.export.Dim("S")}, "v": {2: torch.export.Dim("S")}}
    open_length["mask"] = {3: torch.export.Dim("S")}
    for module, queries, shapes in (
        (Attention(), 40, None),
        (Attention(scale=math.pi), 2, open_length),
    ):
        report = lowering.explain(module, arguments(queries, torch.float32, False), dynamic_shapes=shapes)
        assert report.dispatches == 0

    class Causal(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    given = tuple(torch.randn(1, 2, 4, 32) for _ in range(3))
    assert lowering.explain(Causal(), given).dispatches == 0
