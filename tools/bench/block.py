"""The dense MLP of DeepSeek-V3 as one program: norm + quant, gate and up, silu*up + quant, down.

    python -m tools.bench.block pack DIR --target h200       # where the compilers are; no GPU needed
    python -m tools.bench.block run DIR --json FILE          # where the GPU is, with IREE's runtime
    python -m tools.bench.block pack DIR --target cpu --hidden 1024 --intermediate 2048
    python -m tools.bench.block run DIR

x [T, 7168] bfloat16 -> RMSNorm, fp8 in groups of 128 -> [2 x 18432, 7168] -> silu(gate) * up, fp8 in groups
of 128 -> [7168, 18432] -> bfloat16.  ``run`` first compares the program with the model in eager PyTorch, then
times the program as a call, each of its kernels alone and, on a GPU, torch.compile of the same block with
torch._scaled_mm.  On a GPU, kernels and peer run in CUDA graphs over tensors that the L2 does not hold.

The weights repeat one random tile, so that the archive travels as a few megabytes; their scales are all
different.

Exit codes: 0 all is well, 1 the program is wrong or a site did not fuse, 2 usage.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowering
from tools.command_line import PackAndRun, machine_name, write_json
from tools.gpu.launch import CpuKernel, CudaKernel, Launch, inputs_for, outputs_for, read_launches
from tools.gpu.timing import call_seconds, tensor_sets, time_calls, time_launch

GROUP, EPS = 128, 1e-6
TILE = 128  # rows and columns of the tile that the weights repeat
ROWS = (1, 16, 128, 1024, 4096)
# Root mean square of the error over that of the result.  Each product is rounded to bfloat16 (2^-9), and the
# second reads codes of 3 bits, of which a few in a thousand are a step off where the first rounded otherwise.
LARGEST_ERROR = 5e-3


class Block(nn.Module):
    """x [T, hidden] bfloat16 -> [T, hidden] bfloat16."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.Buffer((1 + 0.25 * torch.randn(hidden, generator=generator)).bfloat16())
        self.gate_up, self.gate_up_scale = _weight(2 * intermediate, hidden, generator)
        self.down, self.down_scale = _weight(hidden, intermediate, generator)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.lowering
        q, scale = ops.group_quant(ops.rms_norm(x, self.norm, EPS), GROUP)
        gate_up = ops.block_scaled_matmul(q, self.gate_up, scale, self.gate_up_scale, torch.bfloat16)
        q, scale = ops.group_quant(ops.silu_mul(gate_up), GROUP)
        return ops.block_scaled_matmul(q, self.down, scale, self.down_scale, torch.bfloat16)


def _weight(rows: int, depth: int, generator: torch.Generator) -> tuple[nn.Buffer, nn.Buffer]:
    """fp8 [rows, depth] of one tile repeated, and scales that make the products' results of order 1."""
    tile = (100.0 * torch.randn(TILE, TILE, generator=generator)).to(torch.float8_e4m3fn)
    weight = tile.view(torch.uint8).repeat(rows // TILE, depth // TILE).view(torch.float8_e4m3fn)
    scale = torch.rand(rows // GROUP, depth // GROUP, generator=generator) + 0.5
    return nn.Buffer(weight), nn.Buffer(scale / (100.0 * depth**0.5))


@dataclass(frozen=True)
class Measured:
    """One number of rows; times in microseconds.  error: see LARGEST_ERROR."""

    rows: int
    error: float
    program: float
    kernels: dict[str, float]
    inductor: float | None

    def __str__(self) -> str:
        parts = " ".join(f"{time:9.1f}" for time in self.kernels.values())
        total = sum(self.kernels.values())
        peer = f"{self.inductor:9.1f} {self.inductor / total:6.2f}x" if self.inductor else "        -"
        wrong = "" if self.error <= LARGEST_ERROR else "  WRONG"
        return f"{self.rows:5d} {parts} {total:9.1f} {self.program:9.1f} {peer}  {self.error:.1e}{wrong}"


def pack(directory: Path, target: str, hidden: int, intermediate: int) -> int:
    """Compile the block and write what ``run`` needs to ``directory``."""
    shapes = ({0: torch.export.Dim("T")},)
    x = torch.randn(128, hidden).bfloat16()
    block = Block(hidden, intermediate).eval()
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "block.irpa"
        compiled = lowering.compile(block, (x,), dynamic_shapes=shapes, target=target, parameters=archive)
        directory.mkdir(parents=True, exist_ok=True)
        with archive.open("rb") as source, gzip.open(directory / "block.irpa.gz", "wb", 1) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
    compiled.save(directory / "block.vmfb")
    compiled.dump_kernels(directory / "kernels")
    (directory / "block.json").write_text(json.dumps({"hidden": hidden, "intermediate": intermediate}))
    launches = [launch.kernel.entry for launch in compiled.dispatched.launches]
    print(compiled.report.summary(), *launches, sep="\n")
    return 0 if compiled.report.summary()["unfused"] == 0 and len(launches) == 4 else 1


def run(options: argparse.Namespace) -> int:
    """Check and time what ``pack`` wrote; print the table and write it."""
    sizes = json.loads((options.directory / "block.json").read_text(encoding="utf-8"))
    launches = read_launches(options.directory / "kernels")
    device = torch.device("cpu" if launches[0].object.suffix == ".o" else "cuda")
    machine = machine_name(device)
    print(f"{machine}, torch {torch.__version__}; microseconds")
    block = Block(**sizes).to(device)
    print(" rows norm+quant  gate_up silu+quant    down       sum   program  inductor   ratio  error")
    table = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        archive = Path(scratch) / "block.irpa"
        with gzip.open(options.directory / "block.irpa.gz") as packed, archive.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        program = lowering.load(options.directory / "block.vmfb", device=device.type, parameters=archive)
        for rows in options.rows:
            table.append(measure(block, program, launches, rows, device))
            print(table[-1], flush=True)
    record = {"machine": machine, "torch": torch.__version__, **sizes, "table": list(map(asdict, table))}
    write_json(options.json, record)
    return 0 if all(item.error <= LARGEST_ERROR for item in table) else 1


def measure(
    block: Block,
    program: Callable[[Tensor], Any],
    launches: Sequence[Launch],
    rows: int,
    device: torch.device,
) -> Measured:
    """Compare the program with eager, then time it, its kernels and the peer."""
    x = torch.randn(rows, block.norm.shape[0], device=device).bfloat16()
    expected = block(x).double()
    error = ((program(x).double() - expected).square().mean() / expected.square().mean()).sqrt()
    time = _cuda_launch if device.type == "cuda" else _cpu_launch
    return Measured(
        rows,
        float(error),
        1e6 * call_seconds(lambda: program(x), 20),
        {launch.entry: 1e6 * time(launch.resized(rows)) for launch in launches},
        1e6 * inductor_seconds(block, x) if device.type == "cuda" else None,
    )


def _cuda_launch(launch: Launch) -> float:
    return time_launch(CudaKernel(launch), launch, tensor_sets(launch))


def _cpu_launch(launch: Launch) -> float:
    """In one thread."""
    kernel, device = CpuKernel(launch), torch.device("cpu")
    tensors = {**inputs_for(launch, device), **outputs_for(launch, device)}
    return call_seconds(lambda: kernel(launch, tensors), 5)


# -- the peer -----------------------------------------------------------------------------------------


def inductor_seconds(block: Block, x: Tensor) -> float:
    """torch.compile of the block with block-scaled products of cuBLASLt, which take a multiple of 4 rows."""
    torch._dynamo.reset()
    x = nn.functional.pad(x, (0, 0, 0, -len(x) % 4))
    compiled = torch.compile(_with_scaled_mm, dynamic=False, fullgraph=True)
    for _ in range(3):
        compiled(block, x)
    return time_calls([lambda: compiled(block, x)], block.gate_up.nbytes + block.down.nbytes)


def _with_scaled_mm(block: Block, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    gate, up = _product(wide.bfloat16() * block.norm, block.gate_up, block.gate_up_scale).chunk(2, -1)
    return _product(nn.functional.silu(gate) * up, block.down, block.down_scale)


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Quantize x and multiply; scales as cuBLASLt wants them: of x along its rows, of 128 x 128 along K."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    q = (groups / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(-2)
    along_rows = scale.t().contiguous().t()
    return torch._scaled_mm(q, weight.t(), along_rows, weight_scale.t(), out_dtype=torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    line = PackAndRun(__doc__, ROWS)
    line.pack.add_argument("--hidden", type=int, default=7168)
    line.pack.add_argument("--intermediate", type=int, default=18432)
    options = line.parser.parse_args(arguments)
    if options.command == "pack":
        return pack(options.directory, options.target, options.hidden, options.intermediate)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
