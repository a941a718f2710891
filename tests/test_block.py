"""The dense MLP as one program: norm + quant, gate and up, silu*up + quant, down: four kernels alone.

Asserted on the IR of every target: what one kernel writes is what the next one reads, and weights are
parameters in the layout that their product's kernel reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering.compiler import Compiled
from patterns.contracts import MatmulSpec, Quantization
from tests.gfx950.test_hip_programs import run as run_emulated

LOW = torch.ops.lowering
LAYOUTS = {  # target: of weights, of scales
    "cpu": ("row", "row"),
    "h200": ("swizzled_128", "column_tma"),
    "b200": ("swizzled_128", "column_tma"),
    "gfx950": ("shuffled_16x16", "column"),
}


class Mlp(nn.Module):
    """x [.., hidden] bfloat16 -> [.., hidden]; with ``bias`` the products have one each."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(hidden)

        def weight(rows: int, depth: int) -> tuple[nn.Buffer, nn.Buffer]:
            w = torch.randn(rows, depth, generator=generator) / depth**0.5
            q, scale = lowering.nn.quantize_weight(w, 128)
            return nn.Buffer(q), nn.Buffer(scale)

        self.norm = nn.Buffer((1 + 0.25 * torch.randn(hidden, generator=generator)).bfloat16())
        self.gate, self.gate_scale = weight(intermediate, hidden)
        self.up, self.up_scale = weight(intermediate, hidden)
        self.down, self.down_scale = weight(hidden, intermediate)
        self.bias = nn.Buffer(torch.randn(hidden, generator=generator).bfloat16()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        gate_up = torch.cat([self.gate, self.up]), torch.cat([self.gate_scale, self.up_scale])
        q, scale = LOW.group_quant(LOW.rms_norm(x, self.norm, 1e-6), 128)
        y = LOW.block_scaled_matmul(q, gate_up[0], scale, gate_up[1], torch.bfloat16)
        q, scale = LOW.group_quant(LOW.silu_mul(y), 128)
        return LOW.block_scaled_matmul(q, self.down, scale, self.down_scale, torch.bfloat16, self.bias)


def compiled_block(target: str, model: nn.Module, hidden: int, **options: Any) -> Compiled:
    rows = ({0: torch.export.Dim("rows")},)
    example = torch.zeros(4, 2, hidden, dtype=torch.bfloat16)
    return lowering.compile(model, (example,), dynamic_shapes=rows, target=target, **options)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Two roundings to bfloat16, and codes of 3 bits, a few of them a step off where the first differed."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error, size = (found.float() - expected.float()).square().sum(), expected.float().square().sum()
    assert error <= 5e-3**2 * size


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_the_block_on_the_cpu(bias: bool) -> None:
    model = Mlp(384, 256, bias=bias)
    compiled = compiled_block("cpu", model, 384)
    assert compiled.report.summary() == {"fused": 4, "unfused": 0, "dispatches": 4}
    assert not compiled.report.remarks
    program = lowering.load(compiled.vmfb)
    for rows in (0, 1, 3, 70):
        x = torch.randn(rows, 2, 384).bfloat16()
        assert_near(program(x), model(x))


@dataclass(frozen=True)
class Phases:
    """A compiled block and what the IR was after each step."""

    target: str
    compiled: Compiled
    directory: Path

    def text(self, phase: str) -> str:
        return (self.directory / f"{phase}.mlir").read_text()


@pytest.fixture(scope="module", params=LAYOUTS)
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Phases:
    directory = tmp_path_factory.mktemp(request.param)
    return Phases(
        request.param, compiled_block(request.param, Mlp(256, 128), 256, dump_phases_to=directory), directory
    )


@pytest.mark.parametrize("phase", ["8-expand", "9-linalg"])
def test_nothing_is_computed_between_the_kernels(block: Phases, phase: str) -> None:
    """There are calls, sizes and views of leading axes; after dispatch, and in what IREE is given."""
    assert block.compiled.report.summary() == {"fused": 4, "unfused": 0, "dispatches": 4}
    dialects = "linalg|tensor|torch|flow|math|scf|iree_linalg_ext"
    found = set(re.findall(rf"(?<![.\w#])((?:{dialects})\.[\w.]+)", block.text(phase)))
    views = {"tensor.dim", "tensor.cast", "tensor.collapse_shape", "tensor.expand_shape"}
    other = {"torch.vtensor", "torch.assume_strict_symbolic_shapes", "flow.dispatch"}
    assert found <= views | other


def test_weights_and_scales_are_in_the_layouts_of_the_kernels(block: Phases) -> None:
    """One scale in a row, where K is one group, lies in rows whatever the kernel reads best."""
    weights, best = LAYOUTS[block.target]
    scales = []
    for launch in block.compiled.dispatched.launches[1::2]:
        spec = launch.kernel.spec
        assert isinstance(spec, MatmulSpec)
        scales.append("row" if spec.whole else best)
        assert (spec.b_layout, spec.a_scale_layout) == (weights, scales[-1])
    found = re.findall(
        r"util\.global private @([\w.]+)(?: {weight_layout = \"(\w+)\"})?", block.text("9-linalg")
    )
    layouts = {name: layout or "row" for name, layout in found}
    gate_up, down = "gate.folded", "down" if weights == "row" else "down.folded"
    assert layouts[gate_up] == layouts[down] == weights
    assert set(layouts) == {gate_up, down, "gate_scale.folded", "down_scale", "norm"}
    quantized = [
        s.contract.layout for s in block.compiled.report.sites if isinstance(s.contract, Quantization)
    ]
    assert quantized == scales and best in scales


def test_the_block_in_the_executor(tmp_path: Path) -> None:
    """Through IREE's HIP driver and instruction by instruction, with ragged rows and none."""
    model = Mlp(128, 128, bias=True)
    program = tmp_path / "block.vmfb"
    compiled_block("gfx950", model, 128).save(program)
    calls = [(torch.randn(rows, 2, 128).bfloat16(),) for rows in (1, 5, 0)]
    for call, (found,) in zip(calls, run_emulated(program, calls), strict=True):
        assert_near(found, model(*call))
