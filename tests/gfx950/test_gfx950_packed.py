"""The machine code of products with packed weights for gfx950 and gfx942, executed."""

from __future__ import annotations

import pytest

from lowering.backends import toolchain
from lowering.families.packed import PackedTile, instance
from lowering.targets import resolve
from patterns.packed_matmul import PackedSpec
from tests.families.packed_cases import check
from tests.gfx950 import gfx950_kernels
from tools import gfx950


def spec(columns: int, depth: int, group: int, bits: int, dtype: str, scale: str, **more) -> PackedSpec:
    return PackedSpec(columns, depth, group, bits, dtype, scale, b_layout="shuffled_16x16", **more)


# Waves beside and behind each other, ragged columns, every dtype of scales.
CASES = {
    "int4": ("gfx950", spec(200, 256, 128, 4, "bfloat16", "bfloat16"), PackedTile(2, 2, 2)),
    "int4_f16_zeros_bias": (
        "gfx950",
        spec(70, 512, 32, 4, "float16", "float16", zeros=True, bias=True),
        PackedTile(2, 1, 4),
    ),
    "int8_other_scales": (
        "gfx950",
        spec(33, 256, 64, 8, "bfloat16", "float16", zeros=True),
        PackedTile(1, 1, 1),
    ),
    "int4_f32_scales_gfx942": (
        "gfx942",
        spec(80, 256, 256, 4, "bfloat16", "float32", zeros=True, bias=True),
        PackedTile(2, 2, 1),
    ),
    "int8_f16_gfx942": ("gfx942", spec(40, 128, 128, 8, "float16", "bfloat16"), None),
}


@pytest.mark.parametrize("name", CASES)
def test_executed(name: str) -> None:
    """Units of 16, 32 and 64 rows, several of them; nothing is kept in scratch memory."""
    target, case, tile = CASES[name]
    kernel = instance(case, resolve(target), tile)
    resources = gfx950.CodeObject(toolchain.compile_kernel(kernel)).kernel(kernel.entry)
    assert resources.scratch_bytes == 0 and resources.lds_bytes <= 64 << 10
    check(kernel, gfx950_kernels.launcher(kernel), (0, 1, 17, 33, 70), lambda rows: rows % 4)
