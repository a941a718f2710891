"""Attention on the CPU is spelled out: what torch computes, for every form of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lowering

T, S = torch.export.Dim("T", max=64), torch.export.Dim("S", max=64)


class Attention(torch.nn.Module):
    """One call, with a mask or without."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return scaled_dot_product_attention(q, k, v, mask, **self.options)


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 4)):
    generator = torch.Generator().manual_seed(queries)
    sizes = [(2, heads[0], queries, 32), (2, heads[1], keys, 32), (2, heads[1], keys, 48)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def check(
    module: Attention, example: list, shapes: tuple, calls: list[list], tolerance: float = 1e-5
) -> None:
    program = lowering.load(lowering.compile(module, tuple(example), dynamic_shapes=shapes).vmfb)
    for arguments in calls:
        expected = module(*arguments)
        found = program(*arguments)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_any_lengths(dtype: torch.dtype, tolerance: float) -> None:
    """Queries and keys have lengths of their own."""
    calls = [tensors(queries, keys, dtype) for queries, keys in ((1, 1), (1, 17), (33, 64), (5, 3))]
    check(Attention(), tensors(6, 8, dtype), ({2: T}, {2: S}, {2: S}), calls, tolerance)


def test_causal_with_a_scale_and_fewer_heads_of_keys() -> None:
    module = Attention(is_causal=True, scale=0.3, enable_gqa=True)
    calls = [tensors(length, length, heads=(6, 2)) for length in (1, 2, 40)]
    check(module, tensors(7, 7, heads=(6, 2)), ({2: T}, {2: T}, {2: T}), calls)


class Repeated(Attention):
    """One call with keys and values whose heads the model repeats, in a row or one after another."""

    def __init__(self, in_a_row: bool) -> None:
        super().__init__()
        self.in_a_row = in_a_row

    def forward(self, q, k, v, mask=None):
        return super().forward(q, self._repeat(k), self._repeat(v), mask)

    def _repeat(self, x):
        batch, heads, length, size = x.shape
        if not self.in_a_row:
            return x.repeat(1, 3, 1, 1)
        return x[:, :, None].expand(batch, heads, 3, length, size).reshape(batch, 3 * heads, length, size)


@pytest.mark.parametrize("in_a_row", [True, False])
@pytest.mark.parametrize("queries", [1, 9])
def test_heads_that_share_keys_read_them_once(queries: int, in_a_row: bool, tmp_path: Path) -> None:
    """Where query head h reads key head h // 3; what is repeated otherwise stays so."""
    arguments = [*tensors(queries, 11, heads=(6, 2)), torch.randn(1, 1, queries, 11)]
    shapes = ({0: 2}, {2: S}, {2: S}, {3: S})
    module = Repeated(in_a_row)
    compiled = lowering.compile(module, tuple(arguments), dynamic_shapes=shapes, dump_phases_to=tmp_path)
    torch.testing.assert_close(
        lowering.load(compiled.vmfb)(*arguments), module(*arguments), rtol=1e-5, atol=1e-5
    )
    products = [
        line for line in next(tmp_path.glob("*-expand.mlir")).read_text().splitlines() if "bmm" in line
    ]
    rows = f"vtensor<[4,{3 * queries}," if in_a_row else f"vtensor<[12,{queries},"
    assert len(products) == 2 and all(f": !torch.{rows}" in line for line in products), products


def test_masks_of_either_kind() -> None:
    """Booleans that forbid a query everything; floats, and those the same for all heads."""
    shapes = ({2: T}, {2: S}, {2: S}, {2: T, 3: S})
    boolean = torch.rand(2, 1, 9, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    boolean[:, :, 4] = False
    check(Attention(), [*tensors(9, 11), boolean], shapes, [[*tensors(9, 11), boolean]])
    floats = torch.randn(2, 1, 9, 11)
    check(Attention(), [*tensors(9, 11), floats], shapes, [[*tensors(9, 11), floats]])
    check(
        Attention(),
        [*tensors(9, 11), floats[0, 0]],
        (*shapes[:3], {0: T, 1: S}),
        [[*tensors(9, 11), floats[0, 0]]],
    )


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (100 * tensor for tensor in tensors(8, 8))
    check(Attention(), [q, k, v], ({2: T}, {2: S}, {2: S}), [[q, k, v]], 1e-3)


def test_on_a_gpu_it_is_left_to_iree(tmp_path: Path) -> None:
    lowering.compile(
        Attention(), tuple(tensors(8, 8, torch.float16)), target="gfx950", dump_phases_to=tmp_path
    )
    assert "scaled_dot_product_attention" in next(tmp_path.glob("*-expand.mlir")).read_text()
    lowering.compile(Attention(), tuple(tensors(8, 8, torch.float16)), dump_phases_to=tmp_path)
    assert "scaled_dot_product_attention" not in next(tmp_path.glob("*-expand.mlir")).read_text()


@pytest.mark.parametrize("target", ["gfx950", "h200"])
def test_on_a_gpu_no_query_may_look_at_nothing(target: str, tmp_path: Path) -> None:
    """IREE's fused attention gives NaN for such a query: it gets another mask, and its result is chosen."""
    boolean = torch.rand(2, 1, 8, 8) < 0.6
    floats = torch.zeros(8, 8).masked_fill(torch.rand(8, 8) < 0.4, -torch.inf)
    for mask in (boolean, floats):
        arguments = (*tensors(8, 8), mask)
        lowering.compile(Attention(), arguments, target=target, dump_phases_to=tmp_path)
        spelled = next(tmp_path.glob("*-expand.mlir")).read_text().split("scaled_dot_product_attention")
        assert "torch.aten.any.dim" in spelled[0] and "torch.aten.where.self" in spelled[1]
