"""The block-scaled product's machine code for gfx950 and gfx942, executed.

The executor's matrix instructions add exactly and round once, so results equal bit for bit a reference that
adds in the kernel's order; the bound of the other targets is kept too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch

from lowering.backends import toolchain
from lowering.families.instance import KernelInstance
from lowering.families.matmul.family import instance, why_unsupported
from lowering.families.matmul.hip import ProductTile, default_tile
from lowering.ops import block_scaled_matmul_reference
from lowering.targets import Target, resolve
from patterns.contracts import MatmulSpec, stored_rows
from tests.families.host_kernels import run
from tests.families.test_matmul import assert_product, in_memory, operands
from tests.gfx950 import gfx950_kernels
from tools import gfx950

GFX950, GFX942 = resolve("gfx950"), resolve("gfx942")
CODES = {"gfx950": "float8_e4m3fn", "gfx942": "float8_e4m3fnuz"}
BLOCK, WAVES = 128, 4
MANY = ProductTile(few_rows=0)

Multiply = Callable[..., torch.Tensor]


def spec(columns: int, depth: int, dtype: str = "bfloat16", target: Target = GFX950, **fields) -> MatmulSpec:
    codes = fields.pop("codes", CODES[target.name])
    fields = {"group": BLOCK, "b_layout": "shuffled_16x16", "a_scale_layout": "column", **fields}
    return MatmulSpec(columns, depth, a_dtype=codes, b_dtype=codes, dtype=dtype, **fields)


def shuffled(b: torch.Tensor) -> torch.Tensor:
    """The bytes of b in the layout ``shuffled_16x16``, byte by byte."""
    rows, depth = stored_rows(len(b), "shuffled_16x16"), b.shape[1]
    n, k = torch.meshgrid(torch.arange(len(b)), torch.arange(depth), indexing="ij")
    bytes_ = torch.zeros(rows * depth, dtype=torch.uint8)
    bytes_[n // 16 * 16 * depth + k // 16 * 256 + n % 16 * 16 + k % 16] = b.view(torch.uint8)
    return bytes_.view(b.dtype).reshape(rows, depth)


@pytest.fixture(scope="module")
def multiply() -> Multiply:
    """Runs a kernel, built once, on operands."""
    launcher = cache(gfx950_kernels.launcher)

    def call(kernel: KernelInstance, tensors: Sequence[torch.Tensor], shift: int = 0) -> torch.Tensor:
        assert isinstance(kernel.spec, MatmulSpec)
        given = in_memory(kernel.spec, tensors)
        given[1] = shuffled(given[1])
        return run(kernel, launcher(kernel), given, len(tensors[0]), shift)[0]

    return call


# -- the reference ----------------------------------------------------------------------------------------


def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of float32, rounded once: by way of a float64 whose last bit says whether it is exact."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - addend
    error = (product - back) + (addend - (total - back))
    even = total.view(torch.int64) % 2 == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).double()
    inexact = total.isfinite() & (error != 0)
    return torch.where(inexact & even, torch.nextafter(total, towards), total).float()


def block_products(a: torch.Tensor, b: torch.Tensor, target: Target) -> torch.Tensor:
    """[T, N] of a block: one instruction on gfx950; on gfx942 four, each with 8 bytes of every lane."""
    a, b = a.double(), b.double()
    if target == GFX950:
        return (a @ b.T).float()
    sums = torch.zeros(len(a), len(b))
    for half in (0, 64):
        for eight in (0, 8):
            k = [half + 16 * quarter + eight + i for quarter in range(4) for i in range(8)]
            sums = (a[:, k] @ b[:, k].T + sums.double()).float()
    return sums


def in_order(case: MatmulSpec, tensors: Sequence[torch.Tensor], target: Target, waves: int) -> torch.Tensor:
    """The product as the kernel adds it up: each wave every ``waves``-th block, then wave after wave.

    Scales of whole rows come last.
    """
    a, b, a_scale, b_scale, *bias = tensors
    sums = [torch.zeros(len(a), len(b)) for _ in range(waves)]
    for block in range(case.depth // BLOCK):
        k = slice(block * BLOCK, (block + 1) * BLOCK)
        scale = torch.ones(())
        if not case.whole:
            scale = a_scale[:, block, None] * b_scale[:, block].repeat_interleave(BLOCK)[: len(b)]
        sums[block % waves] = fused(block_products(a[:, k], b[:, k], target), scale, sums[block % waves])
    total = sums[0]
    for others in sums[1:]:
        total = total + others
    if case.whole:
        channels = b_scale[:, 0] if case.b_scales != "blocks" else b_scale[:, 0].repeat_interleave(BLOCK)
        total = total * a_scale * channels[: len(b)]
    return (total + bias[0].float() if bias else total).to(getattr(torch, case.dtype))


def check(case: MatmulSpec, target: Target, tile: ProductTile | None, rows: int, multiply: Multiply, shift=0):
    kernel = instance(case, target, tile)
    few = rows <= (tile or default_tile(case, target)).few_rows
    tensors = operands(case, rows, seed=rows)
    found = multiply(kernel, tensors, shift)
    expected = in_order(case, tensors, target, WAVES if few else 1)
    assert torch.equal(bits(found), bits(expected)), (case, target.name, rows)
    assert_product(case, found, tensors)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_the_reference_rounds_once() -> None:
    """A sum just above the middle of two float32 numbers, which float64 alone would call the middle."""
    a, b = torch.tensor([1 + 2.0**-12, 1.0]), torch.tensor([1 + 2.0**-12, 2.0**-54])
    c = torch.tensor([2.0**-60, 1 + 2.0**-23])
    assert fused(a, b, c).tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-23]
    assert (a * b + c)[0] == 1 + 2.0**-11


# -- the kernel -------------------------------------------------------------------------------------------

CASES = {
    "bf16": (spec(176, 384), GFX950),
    "f32_bias_rows_of_scales": (spec(150, 1152, "float32", bias=True, a_scale_layout="row"), GFX950),
    "f16_columns_of_fours": (spec(16, 128, "float16", a_scale_layout="column_tma"), GFX950),
    "bf16_bias_one_column": (spec(1, 2048, bias=True), GFX950),
    "per_token_and_channel": (
        spec(179, 384, bias=True, group=384, b_scales="rows", a_scale_layout="row"),
        GFX950,
    ),
    "per_tensor": (
        spec(21, 256, "float16", group=256, a_scales="one", b_scales="one", a_scale_layout="row"),
        GFX950,
    ),
    "gfx942": (spec(54, 640, "float16", GFX942, bias=True), GFX942),
}


@pytest.mark.parametrize("name", CASES)
def test_few_rows(name: str, multiply: Multiply) -> None:
    """One to four tiles of rows, the last of them ragged, and two units; pointers aligned to an element."""
    case, target = CASES[name]
    for shift, rows in enumerate((0, 1, 16, 21, 40, 67)):
        check(case, target, None, rows, multiply, shift % 3)


@pytest.mark.parametrize("name", CASES)
def test_many_rows(name: str, multiply: Multiply) -> None:
    case, target = CASES[name]
    for shift, rows in enumerate((3, 128, 131)):
        check(case, target, MANY, rows, multiply, shift)


@pytest.mark.parametrize("target", [GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("tile", [None, MANY], ids=["few", "many"])
def test_integers(target: Target, tile: ProductTile | None, multiply: Multiply) -> None:
    """Exact sums, as eager PyTorch has them, and one rounding of each scale and of the result."""
    whole = {"group": 640, "b_scales": "rows", "a_scale_layout": "row", "codes": "int8"}
    case = spec(150, 640, "bfloat16", target, bias=True, bias_rounding="twice", **whole)
    for shift, rows in enumerate((1, 21, 67)):
        tensors = operands(case, rows, seed=rows)
        assert_product(case, multiply(instance(case, target, tile), tensors, shift), tensors)


def test_other_tiles(multiply: Multiply) -> None:
    """Two blocks of columns, each with scales of its own, and fewer rows."""
    check(spec(400, 256), GFX950, ProductTile(0, rows=64, columns=256), 70, multiply)
    check(spec(400, 256), GFX950, ProductTile(0, rows=256, columns=64), 70, multiply)


@pytest.mark.parametrize("rows", [2, 18, 50])
def test_two_tiles_of_columns(rows: int, multiply: Multiply) -> None:
    """Of which the last unit has one."""
    check(spec(165, 640), GFX950, ProductTile(few_rows=64, few_columns=32), rows, multiply)


def test_more_units_than_workgroups(multiply: Multiply) -> None:
    """A workgroup takes one after the other."""
    case = spec(2048, 128)
    units = 128 * 5
    assert units > instance(case, GFX950).grid(1)[0]
    check(case, GFX950, ProductTile(few_rows=400), 300, multiply)


@pytest.mark.parametrize("target", [GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("tile", [None, MANY], ids=["few", "many"])
def test_every_code_of_either_operand(target: Target, tile: ProductTile | None, multiply: Multiply) -> None:
    """Against a single 1: the value of each code, exactly, and NaN for those that are no number."""
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, CODES[target.name]))
    one = torch.ones(1).to(every.dtype).view(torch.uint8)
    codes = torch.zeros(256, BLOCK, dtype=torch.uint8)
    single = torch.zeros(2, BLOCK, dtype=torch.uint8)
    for row, place in enumerate((31, 77)):
        codes[:, place] = every.view(torch.uint8)
        single[row, place] = one
    a, b = single.view(every.dtype), codes.view(every.dtype)
    kernel = instance(spec(256, BLOCK, "float32", target), target, tile)
    found = multiply(kernel, [a, b, ones(2, 1), ones(2, 1)])
    assert_same_numbers(found, every.float().expand(2, -1))
    kernel = instance(spec(2, BLOCK, "float32", target), target, tile)
    found = multiply(kernel, [b[:200], a, ones(200, 1), ones(1, 1)])
    assert_same_numbers(found, every.float()[:200, None].expand(-1, 2))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def assert_same_numbers(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tile", [None, MANY], ids=["few", "many"])
def test_special_scales(tile: ProductTile | None, multiply: Multiply) -> None:
    """Zero, infinite, NaN and subnormal scales of either operand, in the block that few rows load twice."""
    case = spec(40, 5 * BLOCK, "float32")
    kernel = instance(case, GFX950, tile)
    a, b, a_scale, b_scale = operands(case, 6)
    a, b = (torch.where(t.view(torch.uint8) % 128 == 0, 1, t.view(torch.uint8)).view(t.dtype) for t in (a, b))
    for value in (0.0, torch.inf, torch.nan, 2.0**-149):
        for scale in (a_scale, b_scale):
            tensors = [a, b, a_scale.clone(), b_scale.clone()]
            tensors[2 if scale is a_scale else 3][0, -1] = value
            found = multiply(kernel, tensors)
            assert_same_numbers(found, in_order(case, tensors, GFX950, 1 if tile else WAVES))
            finite = block_scaled_matmul_reference(*tensors, torch.float32).isfinite()
            assert torch.equal(found.isfinite(), finite)
            assert finite.all() == torch.tensor(value).isfinite()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_too_large_become_infinite(dtype: str, multiply: Multiply) -> None:
    case = spec(17, BLOCK, dtype)
    tensors = [torch.full((2, BLOCK), 448.0).to(torch.float8_e4m3fn)]
    tensors.append(torch.full((17, BLOCK), -448.0).to(torch.float8_e4m3fn))
    tensors += [torch.tensor([[1.0], [1e32]]), ones(1, 1)]
    found = multiply(instance(case, GFX950), tensors)
    assert torch.equal(found, block_scaled_matmul_reference(*tensors, getattr(torch, dtype)))
    assert found[1].isinf().all()


# -- what it is made of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("columns", [2048, 7168])
@pytest.mark.parametrize("depth", [128, 1536, 2304, 7168, 18432])
def test_resources(depth: int, columns: int, target: Target) -> None:
    """Nothing is spilled, and as many workgroups as the grid counts on find room on a compute unit."""
    kernel = instance(spec(columns, depth, target=target), target)
    found = gfx950.CodeObject(toolchain.compile_kernel(kernel)).kernel(kernel.entry)
    resident = kernel.grid(1)[0] // {"gfx950": 256, "gfx942": 304}[target.name]
    assert found.scratch_bytes == 0
    assert found.vgprs + found.agprs <= 512 // resident
    assert found.lds_bytes * resident <= {"gfx950": 160 << 10, "gfx942": 64 << 10}[target.name]


@pytest.mark.parametrize(("rows", "tile"), [(64, None), (128, MANY)], ids=["few", "many"])
def test_what_is_executed(rows: int, tile: ProductTile | None) -> None:
    """Weights come once, 16 bytes a lane; no product is made twice; no two lanes meet at an LDS bank."""
    case = spec(128, 1024)
    kernel = instance(case, GFX950, tile)
    entry = gfx950.CodeObject(toolchain.compile_kernel(kernel)).kernel(kernel.entry)
    memory = gfx950.Memory()
    tensors = [t.contiguous() for t in operands(case, rows)]
    given = in_memory(case, [tensors[0], shuffled(tensors[1]), *tensors[2:]])
    out = torch.zeros(rows, case.columns, dtype=torch.bfloat16)
    pointers = [memory.add_array(t.reshape(-1).view(torch.uint8).numpy(), writable=False) for t in given]
    pointers.append(memory.add_array(out.reshape(-1).view(torch.uint8).numpy()))
    found = gfx950.execute(entry, kernel.grid(rows), kernel.block, [*pointers, rows], memory)
    executed = found.instructions
    assert found.bank_conflicts == {}
    assert executed["V_MFMA_F32_16X16X128_F8F6F4"] == rows * case.columns * case.depth // (16 * 16 * 128)
    # A unit reads its rows of a once: with few rows it has 16 columns, with many all of them.
    a, b = (t.numel() for t in given[:2])
    codes = a * (case.columns // 16) + b if tile is None else a + b
    assert executed["BUFFER_LOAD_DWORDX4"] == codes // (64 * 16)
    assert {name for name in executed if "LOAD_" in name} == {
        *("BUFFER_LOAD_DWORDX4", "BUFFER_LOAD_DWORD", "S_LOAD_DWORD", "S_LOAD_DWORDX2", "S_LOAD_DWORDX8"),
    }


@pytest.mark.parametrize(
    ("case", "target", "reason"),
    [
        (
            dataclasses.replace(spec(64, 128), group=64),
            GFX950,
            "knows groups of 128 and rows of whole ones, not 64",
        ),
        (spec(64, 128, target=GFX942), GFX950, "multiplies float8_e4m3fn or int8, not float8_e4m3fnuz and"),
        (spec(64, 128), GFX942, "multiplies float8_e4m3fnuz or int8, not float8_e4m3fn and"),
        (spec(64, 128, b_layout="row"), GFX950, "of gfx950 reads b in shuffled_16x16, not row"),
    ],
)
def test_what_it_does_not_do_has_a_reason(case: MatmulSpec, target: Target, reason: str) -> None:
    assert reason in (why_unsupported(case, target) or "")


def test_the_tile_follows_the_shape() -> None:
    """Larger units once they would keep half of the machine at work."""
    assert default_tile(spec(7168, 2048), GFX950) == ProductTile(256, 32)
    assert default_tile(spec(36864, 2048), GFX950) == ProductTile(64, 32)
    assert default_tile(spec(2048, 2048), GFX950) == ProductTile(896, 16)
