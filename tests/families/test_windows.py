"""Rows of a wider tensor, as after a split: recognised, read in place by every kind of kernel, never copied.

What surrounds a window is NaN wherever bits are compared, so that a column too many shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import lowering
from lowering.backends import toolchain
from lowering.families import registry
from lowering.families.instance import KernelInstance
from lowering.families.row import instance
from lowering.families.row_mapping import Mapping, Tile
from lowering.families.row_support import why_unsupported
from lowering.targets import Target
from patterns import torch_ir
from patterns.contracts import GatedActivation, RowSpec, Window
from tests.families import host_kernels
from tests.families.host_kernels import Launch, assert_same, run
from tests.families.row_cases import CPU, GFX950, PRODUCERS, Q128, SCHEMES, SM90, SM100, integer_inputs, spec
from tests.families.row_reference import reference
from tests.gfx950 import gfx950_kernels
from tests.gfx950.test_hip_programs import assert_same_bits, integers, on_cpu
from tests.gfx950.test_hip_programs import run as run_on_hip
from tests.raised import Function
from tests.test_compile import assert_runs_like_eager, custom, dispatches, quarters

rms_norm = torch.ops.lowering.rms_norm
group_quant = torch.ops.lowering.group_quant

# -- kernels ----------------------------------------------------------------------------------------------


def inputs_and_wider(case: RowSpec, rows: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Dense inputs, and the same as the windows of ``case`` in tensors that are NaN elsewhere."""
    dense = integer_inputs(case, rows, seed)
    names = ["x", "other"] if len(dense) > 1 and dense[1].dim() > 1 else ["x"]
    wider = list(dense)
    for index, name in enumerate(names):
        wide = torch.full((rows, case.pitch(name)), torch.nan, dtype=dense[index].dtype)
        wide[:, case.columns(name)] = dense[index]
        wider[index] = wide
    return dense, wider


def launcher(kernel: KernelInstance, directory: Path, executed: bool = True) -> Launch:
    """The kernel on the machine that stands for its target here."""
    if kernel.target.backend == "hip" and executed:
        return gfx950_kernels.launcher(kernel)
    return host_kernels.launcher(kernel, directory)


# Offsets and pitches of every alignment from 32 bytes down to one element.
WINDOWS = {
    "wide": spec(512, quants=[Q128], x_window=Window(2112, 1536)),
    "16 bytes": spec(512, quants=[Q128], x_window=Window(520, 8)),
    "8 bytes": spec(384, writes_y=True, quants=[Q128], x_window=Window(1028, 640)),
    "4 bytes": spec(1536, quants=[Q128], x_window=Window(4000, 2)),
    "odd offset": spec(384, quants=[Q128], x_window=Window(1024, 33)),
    "odd pitch": spec(384, quants=[Q128], x_window=Window(1001, 128)),
    "odd length": spec(131, writes_y=True, x_window=Window(200, 7)),
    "float32": spec(384, "float32", quants=[Q128], x_window=Window(513, 1)),
    "add": spec(
        1536,
        writes_sum=True,
        residual="rounded",
        quants=[Q128],
        x_window=Window(4608, 1536),
        other_window=Window(1540, 2),
    ),
    "residual alone": spec(640, quants=SCHEMES["layouts"], **PRODUCERS["add"], other_window=Window(700, 12)),
    "packed": spec(384, quants=[Q128], gate=GatedActivation("silu"), x_window=Window(1000, 96)),
    "gate and up": spec(
        640,
        quants=[Q128],
        gate=GatedActivation("silu", packed=False),
        x_window=Window(2000, 648),
        other_window=Window(2000, 1290),
    ),
    "plain": spec(3200, rounding=None, quants=SCHEMES["rows"], x_window=Window(6404, 3204)),
    "batches": spec(18432, rounding=None, quants=[Q128], x_window=Window(18448, 8)),
}


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda target: target.name)
@pytest.mark.parametrize("name", WINDOWS)
def test_the_same_bits_as_of_dense_rows(name: str, target: Target, tmp_path: Path) -> None:
    case = WINDOWS[name]
    kernel = instance(case, target)
    launch = launcher(kernel, tmp_path)
    for rows, shift in [(1, 0), (5, 0), (3, 3), (0, 0)]:
        dense, wider = inputs_and_wider(case, rows, seed=rows)
        assert_same(run(kernel, launch, wider, rows, shift), reference(case, dense), (name, rows, shift))


def test_every_mapping_reads_windows(tmp_path: Path) -> None:
    """Slices of few rows, loops over many and their reading ahead."""
    case = replace(WINDOWS["add"], quantizations=(Q128,))
    mapping = Mapping(Tile(96, 1, 16, blocks=2), Tile(96, 2, 8, slices=2), 3, 4)
    kernel = instance(case, SM90, mapping)
    launch = launcher(kernel, tmp_path)
    for rows in (1, 3, 9):
        dense, wider = inputs_and_wider(case, rows, seed=rows)
        assert_same(run(kernel, launch, wider, rows), reference(case, dense), rows)


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda target: target.name)
def test_reads_are_as_wide_as_rows_are_aligned(target: Target) -> None:
    """The weight is read in the widest accesses whatever x is in."""
    widest = ".v8.b32" if target is SM100 else ".v4.b32"
    for name, expected in [
        ("wide", widest),
        ("16 bytes", ".v4.b32"),
        ("8 bytes", ".v2.b32"),
        ("4 bytes", ".b32"),
    ]:
        loads = [
            line
            for line in toolchain.ptx(instance(WINDOWS[name], target)).splitlines()
            if "ld.global" in line
        ]
        kinds = {line.split()[0].rstrip(";").removeprefix("ld.global") for line in loads}
        assert {expected, widest} <= kinds, (name, kinds)


def test_windows_that_do_not_fit_are_refused() -> None:
    beyond = why_unsupported(spec(512, quants=[Q128], x_window=Window(2048, 1537)), CPU)
    assert beyond == "Columns 1537 to 2049 do not lie in rows of 2048 elements."
    needless = why_unsupported(spec(512, quants=[Q128], other_window=Window(2048, 0)), CPU)
    assert needless == "The row kernel has a second window only where it has a second input."


# -- recognition ------------------------------------------------------------------------------------------


def windows_of(
    function: Callable[..., object], *args: torch.Tensor, **options
) -> list[tuple[Window | None, ...]]:
    """(window of x, window of the other) of each row kernel of ``function``, which is given a weight too."""
    from iree.compiler import ir

    from lowering.importing.importer import import_module
    from lowering.passes.fuse import fuse
    from lowering.passes.normalize import normalize
    from lowering.passes.raise_ops import raise_function
    from lowering.passes.sink_views import sink_views
    from patterns.sites import Ledger

    context, ledger = ir.Context(), Ledger()
    program = import_module(Function(function), args, context, **options)
    with context, ir.Location.unknown():
        main = program.main()
        normalize(main)
        raise_function(main, ledger)
        sink_views(main)
        fuse(main, ledger, lambda spec: None)
        program.module.operation.verify()
        specs = [registry.spec_of(op.operation) for op in torch_ir.block_of(main).operations]
        return [(found.x_window, found.other_window) for found in specs if isinstance(found, RowSpec)]


def quantized_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return group_quant(rms_norm(x, weight, 1e-6), 128)


DYNAMIC = {"dynamic_shapes": {"args": ({0: Dim("T")},)}}


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, 384:640],
        lambda x: x.narrow(1, 384, 256),
        lambda x: x.narrow(-1, 384, 256),
        lambda x: x.split([384, 256, 128], -1)[1],
        lambda x: torch.split(x, 128, -1) and x[..., 256:][..., 128:384],
        lambda x: x.unsqueeze(0)[..., 384:640],
        lambda x: x[:, 384:640].unsqueeze(1),
        lambda x: x[:, 128:].unsqueeze(0)[..., 256:512].flatten(0, 1),
    ],
)
def test_every_spelling_of_a_part_of_rows(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.zeros(4, 768, dtype=torch.bfloat16)
    for options in ({}, DYNAMIC):
        found = windows_of(lambda w, x: quantized_norm(part(x), w), x, **options)
        assert found == [(Window(768, 384), None)]


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x.view(-1, 3, 256)[:, 1],
        lambda x: x.view(-1, 3, 256).unbind(1)[1],
        lambda x: x.view(-1, 3, 256).select(-2, -2),
        lambda x: x.view(-1, 3, 256)[:, 1:2],
        lambda x: x.view(2, -1, 3, 256)[:, :, 1].flatten(0, 1),
        lambda x: x[:, 256:].view(-1, 2, 256)[:, 0],
    ],
)
def test_one_of_several_rows_behind_each_other(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.zeros(4, 768, dtype=torch.bfloat16)
    rows = {"dynamic_shapes": {"args": ({0: 2 * Dim("T")},)}}
    for options in ({}, rows):
        found = windows_of(lambda w, x: quantized_norm(part(x), w), x, **options)
        assert found == [(Window(768, 256), None)]


def test_chunks_are_windows() -> None:
    x = torch.zeros(4, 768, dtype=torch.bfloat16)
    found = windows_of(lambda w, x: tuple(quantized_norm(part, w) for part in x.chunk(3, -1)), x)
    assert [window for window, _ in found] == [Window(768, 0), Window(768, 256), Window(768, 512)]


def test_both_inputs_may_be_windows() -> None:
    """The residual of an add and the halves of a gate that are not all of their tensor."""

    def add(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x[:, 256:512] + x[:, 512:]
        return *quantized_norm(total, w), total

    def gate(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return group_quant(nn.functional.silu(x[:, :256]) * x[:, 512:], 128)

    def packed(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return group_quant(torch.ops.lowering.silu_mul(x[:, 128:640]), 128)

    x = torch.zeros(4, 768, dtype=torch.bfloat16)
    assert windows_of(add, x) == [(Window(768, 256), Window(768, 512))]
    assert windows_of(gate, x) == [(Window(768, 0), Window(768, 512))]
    assert windows_of(packed, x) == [(Window(768, 128), None)]


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, :512:2],  # not next to each other
        lambda x: x[1:],  # whole rows
        lambda x: x.T[:256].T[:, :],  # rows are columns
        lambda x: x.view(1, 12, 256)[:, 5],  # dense
        lambda x: x.view(4, 3, 256)[:, :2],  # two of three
        lambda x: x[:, :512].reshape(-1, 256),  # two of a row
        lambda x: x.float()[:, :256].relu().bfloat16(),  # computed
    ],
)
def test_other_parts_are_none(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.zeros(4, 768, dtype=torch.bfloat16)
    found = windows_of(lambda w, x: group_quant(part(x), 128), x)
    assert found == [(None, None)]


# -- programs ---------------------------------------------------------------------------------------------


class Latents(nn.Module):
    """What a latent attention does with its fused projection: two norms and a rest, each quantized."""

    def __init__(self, sizes: Sequence[int] = (1536, 512, 64)):
        super().__init__()
        self.sizes = list(sizes)
        self.weights = nn.ParameterList(nn.Parameter(quarters(size, seed=size)) for size in sizes[:2])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, kv, rest = x.split(self.sizes, -1)
        first = group_quant(rms_norm(q, self.weights[0], 1e-6), 128)
        second = group_quant(rms_norm(kv.reshape(-1, self.sizes[1]), self.weights[1], 1e-6), 128)
        return *first, *second, *group_quant(rest, 64)


@pytest.mark.parametrize("target", ["cpu", "h200", "b200", "gfx950"])
def test_a_split_projection_is_read_in_place(target: str, tmp_path: Path) -> None:
    """Three kernels read one tensor; nothing is sliced or copied for them, and nothing else is dispatched."""
    model, x = Latents(), quarters(2, 8, 2112)
    compiled = lowering.compile(
        model, (x,), dynamic_shapes=({1: Dim("T")},), target=target, dump_phases_to=tmp_path
    )
    assert compiled.report.summary() == {"fused": 5, "unfused": 0, "dispatches": 3}
    [dispatched] = [path.read_text() for path in tmp_path.glob("*-expand.mlir")]
    assert "slice" not in dispatched and "linalg." not in dispatched
    names = dispatches(compiled, tmp_path)
    assert custom(names, compiled) == names and len(names) == 3
    moved = dict.fromkeys((name.removesuffix("_workgroup") for name in names), 0)
    for site in compiled.report.sites:
        assert site.kernel and site.bytes
        moved[site.kernel] += site.bytes.after
    rows = 16
    assert list(moved.values()) == [
        rows * (2 * 1536 + 1536 + 4 * 12) + 2 * 1536,
        rows * (2 * 512 + 512 + 4 * 4) + 2 * 512,
        rows * (2 * 64 + 64 + 4),
    ]
    if target == "cpu":
        calls = [(quarters(2, tokens, 2112, seed=tokens),) for tokens in (5, 1, 0, 37)]
        assert_runs_like_eager(model, compiled, *calls)


def test_programs_read_parts_however_they_are_spelled() -> None:
    """Below views of the other axes, and of several rows behind each other: on the cpu, as eager PyTorch."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(quarters(256))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            several = x.unflatten(-1, (3, 256))
            first = group_quant(rms_norm(several[:, :, 0], self.weight, 1e-6), 128)
            second = group_quant(rms_norm(several[:, :, 1:2], self.weight, 1e-6), 128)
            y, total = torch.ops.lowering.add_rms_norm(
                several.unbind(2)[2].flatten(0, 1), x[..., 256:512].flatten(0, 1), self.weight, 1e-6
            )
            return *first, *second, *group_quant(y, 64), y, total

    model = Parts()
    compiled = lowering.compile(model, (quarters(2, 8, 768),), dynamic_shapes=({1: Dim("T")},))
    specs = [kernel.spec for kernel in compiled.dispatched.kernels.values()]
    windows = {(found.x_window, found.other_window) for found in specs if isinstance(found, RowSpec)}
    assert windows == {
        (Window(768, 0), None),
        (Window(768, 256), None),
        (Window(768, 512), Window(768, 256)),
    }
    calls = [(quarters(2, tokens, 768, seed=tokens),) for tokens in (5, 1, 0, 37)]
    assert_runs_like_eager(model, compiled, *calls)


def test_a_split_projection_on_gfx950(build: Callable[..., Path]) -> None:
    model, shapes = Latents((512, 256, 64)), ({1: Dim("T")},)
    programs = [build(target, model, (integers(2, 8, 832),), shapes) for target in ("gfx950", "cpu")]
    calls = [(integers(2, tokens, 832, seed=tokens),) for tokens in (1, 5)]
    for call, results in zip(calls, run_on_hip(programs[0], calls), strict=True):
        assert_same_bits(results, on_cpu(programs[1], call))
