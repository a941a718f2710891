"""The installed package, found by vmfuse itself: recognised, reported, compiled for every target, run.

What kernels write is compared bit for bit with ``eager.layer_norm_reference`` and vmfuse's own quantization
of it.  How far those are from exact arithmetic is tested once, in float64.

    python -m pytest docs/extending/vmfuse_layer_norm/tests     # in a checkout of vmfuse, with this installed
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vmfuse_layer_norm import contract, eager, family

import lowering
from lowering.backends import abi, toolchain
from lowering.errors import CompileError, ToolchainError, UsageError
from lowering.families import registry
from lowering.targets import Target, resolve
from patterns.contracts import Quantization, in_words
from tests.families import host_kernels
from tests.gfx950 import gfx950_kernels

FP8 = torch.float8_e4m3fn


def quantized(y: Tensor, floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """The quantization of rows, written out."""
    scale = y.float().abs().amax(-1, keepdim=True).clamp(min=floor) / 448.0
    return (y.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


class Model(nn.Module):
    """LayerNorms that get the kernel, and then some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.LayerNorm(512, dtype=torch.bfloat16)
        self.no_bias = nn.LayerNorm(100, eps=1e-3, bias=False)
        self.plain = nn.LayerNorm(64, elementwise_affine=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        affine = quantized(self.affine(x))
        y = self.no_bias(z)
        no_bias = quantized(y, 0.5)
        viewed = quantized(self.plain(h).reshape(-1, 64))
        named = torch.ops.vmfuse_layer_norm.layer_norm_fp8(x, self.affine.weight, None, 1e-6)
        # A quantization that the kernel does not do, and none at all.
        whole = self.plain(h + 1)
        scale = whole.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127.0
        int8 = (whole.float() / scale).round().clamp(-127.0, 127.0).to(torch.int8)
        return (*affine, y, *no_bias, *viewed, *named, int8, scale, self.plain(h - 1))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(3, 5, 512).bfloat16(), torch.randn(9, 100) * 3 + 1, torch.randn(2, 3, 64).half()


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(6)
    return Model().eval()


@pytest.fixture(scope="module")
def exported(model: Model) -> torch.export.ExportedProgram:
    """The model for any number of rows of x."""
    shapes = ({0: torch.export.Dim("rows", min=1)}, {}, {})
    return torch.export.export(model, inputs(), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def compiled(exported: torch.export.ExportedProgram) -> Callable[[str], lowering.Compiled]:
    """The program for a target, compiled once."""
    return cache(lambda target: lowering.compile(exported, target=target))


# --- the report ------------------------------------------------------------------------------------


def line_of(text: str) -> str:
    """``file:line`` of the line of this file that starts with ``text``."""
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(n for n, line in enumerate(lines, 1) if line.strip().startswith(text))}"


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
def test_every_layer_norm_is_one_site(compiled, target: str) -> None:
    report = compiled(target).report
    norms = [site for site in report.sites if site.op == "layer_norm"]
    assert [site.location for site in norms] == [
        line_of("affine = quantized"),
        line_of("y = self.no_bias"),
        line_of("viewed = quantized"),
        line_of("named = torch.ops"),
        line_of("whole = self.plain"),
        line_of("return (*affine"),
    ]
    *fused, int8, alone = norms  # the last is left to vmfuse's own family
    assert all(site.fused and site.pattern == "layer_norm_fp8" for site in fused)
    assert [in_words(site.contract) for site in fused] == ["eps=1e-05", "eps=0.001", "eps=1e-05", "eps=1e-06"]
    assert not int8.fused and "this quantization is group=row dtype=int8" in int8.reason
    assert alone.fused and alone.pattern == "norm"
    # The int8 quantization has the kernel it always had; no LayerNorm is suspected a second time.
    quants = [site for site in report.sites if site.op == "group_quant"]
    assert [site.pattern for site in quants] == ["layer_norm_fp8"] * 4 + ["quant"]
    assert len(report.sites) == len(norms) + len(quants)
    assert report.dispatches == 6


def test_what_a_site_costs(compiled) -> None:
    """The LayerNorm reads, and has the launch; the quantization no longer reads y, and writes q and scale."""
    norm, quant = compiled("cpu").report.sites[:2]
    rows = 3 * 5 * 512
    assert (norm.bytes.before, norm.bytes.after) == (2 * 2 * rows + 2 * 2 * 512, 2 * rows + 2 * 2 * 512)
    assert (quant.bytes.before, quant.bytes.after) == (2 * rows + rows + 4 * 15, rows + 4 * 15)
    assert (norm.dispatches.after, quant.dispatches.after) == (1, 0)


def test_the_report_is_written_and_read_back(compiled) -> None:
    report = compiled("cpu").report
    assert lowering.Report.from_json(report.to_json()) == report
    assert "eps=0.001" in report.to_html()
    with pytest.raises(UsageError, match="a contract Other, of a package that is not installed here"):
        lowering.Report.from_json(report.to_json().replace('"LayerNorm"', '"Other"'))


def test_a_target_without_the_instruction(exported: torch.export.ExportedProgram) -> None:
    report = lowering.explain(exported, target="gfx942")
    norms = [site for site in report.sites if site.op == "layer_norm"]
    assert [site.fused for site in norms] == [False] * 5 + [True]
    assert (norms[0].reason or "").startswith("gfx942 has no instruction that converts to float8_e4m3fn")


# --- the program -----------------------------------------------------------------------------------


def test_the_program_computes_the_contract(compiled, model: Model, tmp_path: Path) -> None:
    compiled("cpu").save(tmp_path / "model.vmfb")
    program = lowering.load(tmp_path / "model.vmfb")
    example, z, h = inputs()
    for x in (example, example[:1] * 100, torch.randn(7, 5, 512).bfloat16()):
        with torch.no_grad():
            *outputs, int8, scale, alone = program(x, z, h)
            y = eager.layer_norm_reference(z, model.no_bias.weight, None, contract.LayerNorm(1e-3))
            expected = (
                *eager.layer_norm_fp8(x, model.affine.weight, model.affine.bias),
                *(y, *quantized(y, 0.5)),
                *(part.reshape(-1, part.shape[-1]) for part in eager.layer_norm_fp8(h, None, None)),
                *eager.layer_norm_fp8(x, model.affine.weight, None, 1e-6),
            )
            *_, eager_int8, eager_scale, eager_alone = model(x, z, h)
        host_kernels.assert_same(outputs, expected)
        # vmfuse's LayerNorm, and one without a kernel, find their statistics in another order than eager's:
        # float16 shows it in the last place, and a value then quantizes to one of two neighbours.
        torch.testing.assert_close(alone, eager_alone, rtol=2**-10, atol=2**-14)
        torch.testing.assert_close(scale, eager_scale, rtol=2**-10, atol=0.0)
        assert (int8.int() - eager_int8.int()).abs().max() <= 1


def test_pytorch_rounds_otherwise_by_little(model: Model) -> None:
    """Eager LayerNorm and the contract agree in all but few codes, and those are neighbours."""
    x = torch.randn(200, 512).bfloat16()
    with torch.no_grad():
        theirs, _ = quantized(model.affine(x))
        ours, _ = eager.layer_norm_fp8(x, model.affine.weight, model.affine.bias)
    apart = (theirs.view(torch.int8).int() - ours.view(torch.int8).int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


# --- the kernels -----------------------------------------------------------------------------------

ROWS = Quantization(None)
EPS = contract.LayerNorm(1e-5)
SPECS = {
    "bfloat16": contract.LayerNormSpec(512, "bfloat16", EPS, ROWS, "bfloat16", "bfloat16"),
    "float16": contract.LayerNormSpec(96, "float16", EPS, ROWS, "float16", "float32", writes_y=True),
    "float32": contract.LayerNormSpec(
        1000, "float32", contract.LayerNorm(0.0), replace(ROWS, amax_floor=0.25, scale_floor=1e-3), "bfloat16"
    ),
    "bare": contract.LayerNormSpec(7, "bfloat16", EPS, replace(ROWS, amax_floor=0.0), writes_y=True),
    "longest": contract.LayerNormSpec(16384, "bfloat16", EPS, ROWS, "float32", "float32"),
}


def operands(spec: contract.LayerNormSpec, rows: int) -> list[Tensor]:
    """Rows of all kinds: far off zero, tiny, constant, of one NaN, of one infinity."""
    x = torch.randn(rows, spec.hidden) * torch.logspace(-3, 3, rows)[:, None] + torch.arange(rows)[:, None]
    x[1:2] = 3.0
    x[2:3, 0], x[3:4, 0] = float("nan"), float("inf")
    given = [x.to(getattr(torch, spec.dtype))]
    vectors = [getattr(torch, dtype) for dtype in (spec.weight_dtype, spec.bias_dtype) if dtype is not None]
    return given + [torch.randn(spec.hidden).to(dtype) for dtype in vectors]


def reference(spec: contract.LayerNormSpec, x: Tensor, *vectors: Tensor) -> list[Tensor]:
    weight, bias = (*vectors, None, None)[:2]
    y = eager.layer_norm_reference(x, weight, bias, spec.norm)
    written = eager.group_quant_reference(y, spec.quantization)
    return [y, *written] if spec.writes_y else list(written)


def launcher(spec: contract.LayerNormSpec, target: Target, directory: Path) -> host_kernels.Launch:
    """What runs the kernel: its machine code; for NVIDIA layer_norm.h on the host, in waves of 32."""
    kernel = family.instance(spec, target)
    if target.backend == "hip":
        return gfx950_kernels.launcher(kernel)
    if target.backend == "cpu":
        return host_kernels.launcher(kernel, directory)
    return host_kernels.emulated(kernel, directory, Path(__file__))


# Of NVIDIA's, which are compiled for the host each time, one of two waves and one of one.
RUN = [*itertools.product(("cpu", "gfx950"), SPECS), ("h200", "bfloat16"), ("h200", "float16")]


@pytest.mark.parametrize(("target", "name"), RUN)
def test_a_kernel_computes_the_contract(target: str, name: str, tmp_path: Path) -> None:
    """The object for the CPU, run; that for gfx950, executed; source for NVIDIA: nothing else is touched."""
    spec, machine = SPECS[name], resolve(target)
    torch.manual_seed(len(name))
    launch = launcher(spec, machine, tmp_path)
    for rows, shift in ((0, 0), (1, 1), (50, 3)) if name != "longest" else ((2, 0),):
        given = operands(spec, rows)
        made = host_kernels.run(family.instance(spec, machine), launch, given, rows, shift)
        host_kernels.assert_same(made, reference(spec, *given), f"{rows} rows")


@pytest.mark.parametrize("ulp", [1, -1])
def test_no_result_hangs_on_an_approximation(ulp: int) -> None:
    """Nor when the reciprocals and roots that gfx950 starts from are off by one in the last place."""
    spec = SPECS["float32"]
    kernel, given = family.instance(spec, resolve("gfx950")), operands(spec, 40)
    made = host_kernels.run(kernel, gfx950_kernels.launcher(kernel, ulp=ulp), given, 40)
    host_kernels.assert_same(made, reference(spec, *given))


@pytest.mark.parametrize("target", ["h200", "b200", "gfx950", "cpu"])
@pytest.mark.parametrize("name", SPECS)
def test_every_target_compiles_it(name: str, target: str) -> None:
    """With the parameters that the dispatch passes, as the object itself says."""
    kernel = family.instance(SPECS[name], resolve(target))
    abi.check(kernel, toolchain.compile_kernel(kernel))


def test_against_exact_arithmetic() -> None:
    """In float32 y is off by its roundings and that of the mean, each by at most 2^-24 of its own size."""
    x, weight, bias = torch.randn(50, 300) * 5 + 2, torch.randn(300), torch.randn(300)
    y = eager.layer_norm_reference(x, weight, bias, EPS).double()
    wide = x.double()
    off = wide - wide.mean(-1, keepdim=True)
    rstd = (off.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact = off * rstd * weight + bias
    scale = (wide.abs() * rstd * weight.abs()) + exact.abs()
    assert ((y - exact).abs() <= 4 * 2**-24 * (scale + bias.abs())).all()
    q, scales = eager.group_quant_reference(y.float(), ROWS)
    # A code has four significant bits, or is a multiple of 2^-9.
    within = torch.maximum(y.abs() * 2**-4, scales.double() * 2**-10) * (1 + 2**-20)
    assert ((q.double() * scales - y).abs() <= within).all()


# --- refusals --------------------------------------------------------------------------------------


def test_what_the_kernel_does_not_do() -> None:
    spec, cpu = SPECS["bfloat16"], resolve("cpu")
    for other, why in (
        (replace(spec, dtype="float64"), "takes x of bfloat16, float16 or float32, not float64"),
        (replace(spec, hidden=20000), "at most 16384 elements, not 20000"),
        (replace(spec, quantization=Quantization(128)), "this quantization is group=128"),
    ):
        with pytest.raises(CompileError, match=why):
            family.instance(other, cpu)


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution with an entry point of that value."""

    def install(value: str) -> None:
        information = tmp_path / "other-1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
        (information / "entry_points.txt").write_text(f"[{registry.GROUP}]\nother = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)
        registry.families.cache_clear()

    yield install
    registry.families.cache_clear()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("vmfuse_layer_norm.family:MAX_HIDDEN", "is no lowering.families.base.Family"),
        ("vmfuse_layer_norm.family:NOTHING", "cannot be loaded: .*NOTHING"),
        (
            "vmfuse_layer_norm.family:FAMILY",
            "the families layer_norm_fp8 and layer_norm_fp8 both have a vmfuse_layer_norm.layer_norm",
        ),
    ],
)
def test_what_is_no_family_of_its_own(entry_point, exported, value: str, why: str) -> None:
    entry_point(value)
    with pytest.raises(UsageError, match=why):
        lowering.explain(exported)


def test_sources_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"family layer_norm_fp8: .* has no layer_norm.c"):
        replace(family.FAMILY, directory=tmp_path)


def test_headers_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(family.FAMILY, sources={**family.FAMILY.sources, "layer_norm.c": ("nowhere.h",)})
    monkeypatch.setattr(toolchain, "family_of", lambda spec: elsewhere)
    with pytest.raises(ToolchainError, match=r"names nowhere.h, which is neither in"):
        toolchain.compile_kernel(family.instance(SPECS["bare"], resolve("cpu")))
