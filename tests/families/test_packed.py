"""Floats times packed integers: the kernels of the CPU and of NVIDIA GPUs, and programs.

``packed_emulation.cpp`` runs the workgroups of a cluster as fibers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

import lowering
from lowering.backends import abi, toolchain
from lowering.errors import CompileError
from lowering.families.packed import PackedTile, default_tile, instance, ranked_tiles, why_unsupported
from lowering.targets import resolve
from patterns.packed_matmul import PackedSpec
from tests.families.host_kernels import run
from tests.families.packed_cases import check, in_memory, operands
from tests.families.test_matmul import VARIANTS, variant

sass = pytest.importorskip("tools.gpu.sass")

SM90, SM100 = resolve("sm_90"), resolve("sm_100")
CPU_CASES = {
    "int4": PackedSpec(200, 256, 128, 4, "bfloat16", "bfloat16"),
    "int4_f16_zeros_bias": PackedSpec(97, 320, 32, 4, "float16", "float16", zeros=True, bias=True),
    "int8_other_scales": PackedSpec(33, 128, 64, 8, "bfloat16", "float16", zeros=True),
    "int8_f32_whole_rows": PackedSpec(130, 192, 192, 8, "float32", "float16", bias=True),
    "int4_f32_one_column": PackedSpec(1, 64, 32, 4, "float32", "float32", zeros=True),
    "int4_f32_scales": PackedSpec(50, 640, 128, 4, "bfloat16", "float32", zeros=True, bias=True),
}
# Each width of vectors; the rest with the one of this host.
CPU_KERNELS = [
    *(("native", name) for name in CPU_CASES),
    *((arch, "int4_f16_zeros_bias") for arch in VARIANTS[1:]),
]


@pytest.mark.parametrize(("arch", "name"), CPU_KERNELS)
def test_kernel_of_the_cpu(arch: str, name: str, launcher) -> None:
    """Any number of rows, and pointers aligned to nothing but their element."""
    kernel = instance(CPU_CASES[name], variant(arch))
    check(kernel, launcher(kernel), (0, 1, 2, 5, 130), lambda rows: rows % 4)


# -- NVIDIA GPUs: the source in emulation, and the machine code -----------------------------------------


def spec(columns: int, depth: int, group: int, bits: int, dtype: str, scale: str, **more) -> PackedSpec:
    return PackedSpec(columns, depth, group, bits, dtype, scale, b_layout="shuffled_16x16", **more)


# What is unpacked in pairs and what in float32; teams, waves beside and behind each other, ragged columns.
CUDA_CASES = {
    "int4": (spec(72, 512, 128, 4, "bfloat16", "bfloat16"), PackedTile(2, 1, 2, 2)),
    "int4_zeros_bias": (
        spec(17, 512, 512, 4, "bfloat16", "bfloat16", zeros=True, bias=True),
        PackedTile(2, 2, 1, 3),
    ),
    "int4_f16": (spec(80, 256, 32, 4, "float16", "float16", zeros=True), PackedTile(2, 2, 2, 1)),
    "int4_other_scales": (spec(16, 128, 64, 4, "float16", "bfloat16", bias=True), PackedTile(1, 1, 1, 1)),
    "int8": (spec(33, 256, 64, 8, "bfloat16", "float32", zeros=True), PackedTile(1, 1, 1, 2)),
    "int8_f16": (spec(40, 128, 32, 8, "float16", "float16"), PackedTile(2, 1, 1, 2)),
}


@pytest.mark.parametrize("name", CUDA_CASES)
def test_emulated_kernel_of_nvidia_gpus(name: str, launcher) -> None:
    """Units of 8, 16 and 32 rows, several of them, activations at any place."""
    kernel = instance(*(CUDA_CASES[name][0], SM90, CUDA_CASES[name][1]))
    check(kernel, launcher(kernel), (0, 1, 8, 13, 17, 45), lambda rows: rows % 3 if rows > 40 else 0)
    check(kernel, launcher(kernel), (5,), lambda rows: 1)


def test_a_team_gives_the_same_for_any_number_of_rows(launcher) -> None:
    """Up to 32 rows, which a cluster computes together, each row is what it is alone."""
    case, tile = CUDA_CASES["int4"]
    kernel = instance(case, SM90, tile)
    tensors = operands(case, 20)
    given = in_memory(case, tensors)
    (together,) = run(kernel, launcher(kernel), given, 20, aligned=["b"])
    for rows in (1, 9):
        (alone,) = run(kernel, launcher(kernel), [given[0][:rows], *given[1:]], rows, aligned=["b"])
        assert torch.equal(alone, together[:rows])


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda target: target.name)
def test_machine_code(target) -> None:
    """Codes come 16 bytes at a time and are unpacked in pairs; what few rows need does not spill."""
    kernel = instance(spec(4096, 4096, 128, 4, "bfloat16", "bfloat16", zeros=True), target)
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    try:
        code = sass.read(data)
    except sass.ToolchainError as error:
        pytest.skip(str(error))
    names = Counter(instruction.name.split(".")[0] for instruction in code.instructions)
    wide = [i for i in code.instructions if i.name.startswith("LDG.E.128")]
    assert len(wide) >= 8 and names["HMMA"] and names["HMUL2"]
    assert names["I2F"] + names["I2FP"] < names["HMMA"] / 4, "zero points alone are converted, not codes"
    assert code.registers * kernel.block[0] <= 65536
    assert names["LDL"] + names["STL"] <= 80, "a few registers of units of 32 rows, on a B200"


@pytest.mark.parametrize("target", [SM90, SM100, resolve("gfx950")], ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("columns", "depth"), [(1, 128), (48, 256), (2048, 7168), (4096, 4096), (36864, 7168)]
)
def test_tiles_are_possible(columns: int, depth: int, target) -> None:
    case = spec(columns, depth, 128, 4, "bfloat16", "bfloat16")
    for tile in ranked_tiles(case, target):
        assert tile.tiles <= -(-columns // 16) and tile.along * tile.split <= depth // 128
        assert tile.across * tile.along * target.wave <= 512
    kernel = instance(case, target)
    # All that are at work at once, with the KiB that CUDA takes of each, find room in a multiprocessor.
    assert (kernel.dynamic_shared + 1024) * (512 // kernel.block[0]) <= 227 << 10
    tile, most = default_tile(case, target), kernel.grid_rule.rows
    units = -(-columns // tile.columns) * tile.split
    assert kernel.grid(most)[0] == units and kernel.grid(3 * most + 1)[0] == 4 * units


def test_few_columns_split_k() -> None:
    assert default_tile(spec(2048, 7168, 128, 4, "bfloat16", "bfloat16"), SM90).split > 1


# -- what has no kernel, and why ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({"dtype": "float32"}, "h200", "of sm_90 multiplies bfloat16 or float16, not float32"),
        ({"depth": 192}, "h200", "rows of whole 128 codes, not of 192"),
        ({"depth": 160}, "cpu", "rows of whole 64 codes, not of 160"),
        ({"group": 16}, "gfx950", "groups of multiples of 32, not of 16"),
        ({"bits": 2}, "cpu", "codes of 4 or 8 bits, not 2"),
        ({"scale_dtype": "float64"}, "cpu", "scales of bfloat16, float16 or float32, not float64"),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(change: dict, target: str, reason: str) -> None:
    layout = "row" if target == "cpu" else "shuffled_16x16"
    case = dataclasses.replace(CPU_CASES["int4"], **{"b_layout": layout, **change})
    assert reason in (why_unsupported(case, resolve(target)) or "")
    with pytest.raises(CompileError, match=reason):
        instance(case, resolve(target))


# -- programs -------------------------------------------------------------------------------------------

GROUPS = (128, 32, 16)


class Products(torch.nn.Module):
    """One product for each size of groups; the last has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        for group in GROUPS:
            case = PackedSpec(48, 256, group, 4, "bfloat16", "float16", zeros=group == 32, bias=group == 32)
            for name, tensor in zip(
                ("codes", "scale", "zero", "bias"), operands(case, group)[1:], strict=True
            ):
                setattr(self, f"{name}{group}", None if tensor is None else torch.nn.Buffer(tensor.abs()))

    def forward(self, x):
        return tuple(
            torch.ops.lowering.packed_matmul(
                x, *(getattr(self, f"{name}{group}") for name in ("codes", "scale", "zero", "bias"))
            )
            for group in GROUPS
        )


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_a_program_and_its_report(target: str) -> None:
    model = Products()
    rows = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("more")},)
    x = torch.randn(3, 2, 256).bfloat16()
    compiled = lowering.compile(model, (x,), dynamic_shapes=rows, target=target)
    *fused, left = compiled.report.sites
    assert [site.op for site in compiled.report.sites] == ["packed_matmul"] * 3
    assert all(site.kernel.startswith(("packed4_128", "packed4_32")) for site in fused)
    assert "groups of multiples of 32, not of 16. It is unpacked at every call" in left.reason
    assert compiled.report.dispatches == 2
    folded = {item.name: item.operations for item in compiled.report.folded}
    assert folded["scale128.folded"] == ("transpose",)
    if target != "cpu":
        assert folded["codes128.folded"] == ("shuffle_weight",)
        return
    program = lowering.load(compiled.vmfb)
    for count in (0, 1, 7):
        x = torch.randn(count, 2, 256).bfloat16()
        for found, expected in zip(program(x), model(x), strict=True):
            # Equal but for the order of a float32 sum, which may change the rounding.
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_a_weight_that_is_no_parameter() -> None:
    """A CPU reads it as it is; for a GPU it would be laid out at every call."""

    class Given(torch.nn.Module):
        def forward(self, x, codes, scale):
            return torch.ops.lowering.packed_matmul(x, codes, scale)

    x, codes, scale, *_ = operands(PackedSpec(16, 128, 128, 4, "bfloat16", "bfloat16"), 3)
    report = lowering.explain(Given(), (x, codes, scale), target="h200")
    assert "Its weight is no parameter" in report.sites[0].reason
    compiled = lowering.compile(Given(), (x, codes, scale))
    assert compiled.report.sites[0].fused
    found = lowering.load(compiled.vmfb)(x, codes, scale)
    torch.testing.assert_close(found, Given()(x, codes, scale), rtol=2**-7, atol=1e-3)


def test_a_scale_that_is_no_number_is_refused() -> None:
    model = Products()
    model.scale32[5, 3] = torch.nan
    with pytest.raises(CompileError, match=r"the scale 'scale32.*' of a product's weight is nan at \[3, 5\]"):
        lowering.compile(model, (torch.randn(2, 256).bfloat16(),))
