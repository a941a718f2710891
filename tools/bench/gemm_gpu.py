"""The scaled product on a GPU, beside cuBLASLt's through torch._scaled_mm.

    python -m tools.bench.gemm_gpu pack DIR --target h200   # where the compiler is; no GPU needed
    python -m tools.bench.gemm_gpu run DIR --json FILE      # where the GPU is: PyTorch and cuda-bindings
    python -m tools.bench.gemm_gpu run DIR --scales rows    # packed so too: a scale of each token and channel
    python -m tools.bench.gemm_gpu run DIR --weights int4   # packed so too: see tools/bench/packed_gpu.py
    compute-sanitizer --tool memcheck python -m tools.bench.gemm_gpu check DIR   # there

``check`` compares what kernels of every dtype, layout and plan write over poisoned memory, with operands at
odd places, with float64.  ``run`` does so too, then checks and times the products of DeepSeek-V3 and the
peer, which gets the fewest rows from those given on that it takes.  A time is the median over replays of a
CUDA graph of many calls, which walk through so many sets of operands that the L2 holds none of them, as
weights are met in a model.  The floor is the larger of the bytes at the copy bandwidth and the operations at
the datasheet's rate.  Errors are the largest, as parts of the sum of the magnitudes of a result's terms.

Exit codes: 0 all is well, 1 a result is wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowering.backends.toolchain import compile_kernel
from lowering.errors import LoweringError
from lowering.families.instance import KernelInstance
from lowering.families.matmul.cuda import ANY_ROWS, TOKENS, Plan
from lowering.families.matmul.family import instance
from lowering.ops import to_physical
from lowering.targets import resolve
from patterns.contracts import MatmulSpec, ScaleLayout, ScaleRows, stored_rows
from tools.bench import packed_gpu
from tools.command_line import PackAndRun, add_target, write_json
from tools.gpu.launch import CudaKernel, Launch, launch_of
from tools.gpu.timing import copy_bandwidth, time_calls

# N x K of DeepSeek-V3's layers, and M.
SHAPES = ((2048, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168))
ROWS = (1, 16, 64, 128, 1024, 4096)
GROUP = 128
PEAK = {"sm_90a": 1979e12, "sm_100a": 4500e12}  # dense fp8, operations a second (datasheet)
# Hopper adds the products of a step in fixed point, with 13 bits below the largest.
LARGEST_ERROR = 2.0**-12
_ROTATED = 400 << 20  # bytes of all sets together


@dataclass(frozen=True)
class Measured:
    """One product; times in microseconds."""

    columns: int
    depth: int
    rows: int
    kernel: float
    peer: float | None
    floor: float
    bytes: int
    error: float
    peer_error: float | None

    @property
    def right(self) -> bool:
        return self.error <= LARGEST_ERROR

    @property
    def teraflops(self) -> float:
        return 2e-6 * self.rows * self.columns * self.depth / self.kernel

    @property
    def ratio(self) -> float | None:
        """The peer's time over the kernel's."""
        return self.peer / self.kernel if self.peer else None

    def __str__(self) -> str:
        peer, ratio = (f"{self.peer:9.2f}", f"{self.ratio:6.2f}") if self.peer else ("        -", "     -")
        return (
            f"{self.columns:6d} x {self.depth:5d} {self.rows:5d} {self.kernel:9.2f} {peer} {ratio} "
            f"{self.teraflops:7.1f} {self.bytes / self.kernel / 1e3:7.0f} {self.floor / self.kernel:6.2f} "
            f"{self.error:8.1e} {self.peer_error or 0:8.1e}{'' if self.right else '  WRONG'}"
        )


@dataclass(frozen=True)
class Operands:
    """Hold what one call reads and writes; ``b`` as in a checkpoint, ``tensors`` as the kernel takes them."""

    b: Tensor
    tensors: dict[str, Tensor]
    a_scale: Tensor


Peer = Callable[[Operands], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        commands = _COMMANDS if options.weights == "fp8" else _PACKED_COMMANDS
        return commands[options.command](options)
    except (LoweringError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    line = PackAndRun(__doc__, ROWS)
    checking = line.add("check", "check the kernels of DIR at ragged sizes")
    for command in (checking, line.run):  # which kernels there are depends on it
        add_target(command)
    for command in (checking, line.pack, line.run):
        command.add_argument(
            "--scales", choices=("blocks", "rows"), default="blocks", help="of 128, or of rows"
        )
        command.add_argument("--weights", choices=("fp8", "int4", "int8"), default="fp8")
        command.add_argument(
            "--tiles", type=int, default=1, metavar="N", help="of packed weights: ways tried"
        )
    for command in (line.pack, line.run):
        command.add_argument("--shape", type=_shape, nargs="+", default=SHAPES, metavar="NxK")
    return line.parser


def _shape(text: str) -> tuple[int, int]:
    columns, depth = text.split("x")
    return int(columns), int(depth)


def kernel_of(
    columns: int, depth: int, target: str, tile: object | None = None, scales: ScaleRows = "blocks"
) -> KernelInstance:
    """The kernel that a product of this size gets."""
    return instance(spec_of(columns, depth, scales=scales), resolve(target), tile)


def spec_of(
    columns: int,
    depth: int,
    dtype: str = "bfloat16",
    bias: bool = False,
    layout: ScaleLayout = "column_tma",
    scales: ScaleRows = "blocks",
) -> MatmulSpec:
    """A product of weights in the kernel's layout, with scales of blocks of 128 or of whole rows."""
    codes, group = "float8_e4m3fn", GROUP if scales == "blocks" else depth
    return MatmulSpec(
        columns, depth, group, codes, codes, dtype, bias, "swizzled_128", layout, b_scales=scales
    )


def checked(target: str, scales: ScaleRows) -> Iterator[tuple[KernelInstance, tuple[int, ...]]]:
    """Kernels that between them have everything there is, and the numbers of rows to check them with."""
    dtypes = ("bfloat16", "float16", "float32")
    layouts: tuple[ScaleLayout, ...] = ("row", "column", "column_tma")
    teams = [(1, 1), *((split, 1) for split in (2, 3, 4, 6, 8)), *((1, share) for share in (2, 4, 8))]
    cases = [(tokens, *team) for tokens in TOKENS[resolve(target).name] for team in teams]
    for number, (tokens, split, share) in enumerate(cases):
        columns, depth = (200, 2048, 129, 1032)[number % 4], (1024, 1536, 2048)[number % 3]
        spec = spec_of(columns, depth, dtypes[number % 3], number % 2 == 1, layouts[number // 3 % 3], scales)
        plans = (Plan(ANY_ROWS, tokens, split, share),)
        rows = (1, tokens - 1, tokens, 3 * tokens + 5, 1000 + number)
        yield instance(spec, resolve(target), plans), rows
    for columns, depth in ((576, 1536), (1, 128)):
        yield kernel_of(columns, depth, target, scales=scales), (0, 1, 9, 100, 300)


def _object(directory: Path, kernel: KernelInstance) -> Path:
    return directory / f"{kernel.entry}.cubin"


def pack(options: argparse.Namespace) -> int:
    """Compile each kernel to DIR/entry.cubin."""
    options.directory.mkdir(parents=True, exist_ok=True)
    kernels = [kernel for kernel, _ in checked(options.target, options.scales)]
    for columns, depth in options.shape:
        kernels.append(kernel_of(columns, depth, options.target, scales=options.scales))
    for kernel in kernels:
        _object(options.directory, kernel).write_bytes(compile_kernel(kernel))
    print(f"{len(kernels)} kernels")
    return 0


def run_packed(options: argparse.Namespace) -> int:
    """Check and time the products with packed weights in DIR; print the table and write it."""
    failed, bandwidth = packed_gpu.check(options), copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s; microseconds")
    print(packed_gpu.HEADER)
    table = []
    for columns, depth in options.shape:
        for rows in options.rows:
            table.append(packed_gpu.measure(options, columns, depth, rows, bandwidth))
            print(table[-1], flush=True)
    _write(options, bandwidth, [item.to_dict() for item in table])
    return failed or int(not all(item.right for item in table))


def _write(options: argparse.Namespace, bandwidth: float, table: list[dict[str, object]]) -> None:
    """Leave what was found, and where, in the file that is asked for."""
    gpu, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    command = shlex.join(["python", "tools/bench/gemm_gpu.py", *sys.argv[1:]])
    record = {"date": today, "gpu": gpu, "torch": torch.__version__, "command": command}
    record |= {"copy_bandwidth": bandwidth, "peak": PEAK[resolve(options.target).arch], "table": table}
    write_json(options.json, record)


def run(options: argparse.Namespace) -> int:
    """Check and time everything in DIR; print the table and write it."""
    failed = check(options)
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s; microseconds")
    print("     N x K         M    kernel  cuBLASLt  ratio TFLOP/s    GB/s  floor    error  peer's")
    table = []
    for columns, depth in options.shape:
        kernel = kernel_of(columns, depth, options.target, scales=options.scales)
        for rows in options.rows:
            table.append(measure(kernel, _object(options.directory, kernel), rows, bandwidth))
            print(table[-1], flush=True)
    extras = [{"ratio": item.ratio, "teraflops": item.teraflops} for item in table]
    _write(options, bandwidth, [{**asdict(i), **extra} for i, extra in zip(table, extras, strict=True)])
    return failed or int(not all(item.right for item in table))


def check(options: argparse.Namespace) -> int:
    """Compare every product of ``checked`` with float64; a line for each kernel."""
    wrong = 0
    for number, (kernel, counts) in enumerate(checked(options.target, options.scales)):
        path = _object(options.directory, kernel)
        errors = [check_one(kernel, path, rows, number % 4) for rows in counts]
        wrong += sum(error > LARGEST_ERROR for error in errors)
        values = dict(kernel.defines)
        what = f"{values['N']} x {values['K']}, {values['PLANS']}: {kernel.entry.split('_')[1]}"
        print(f"{what}, {counts} rows, largest error {max(errors):.1e}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


def check_one(kernel: KernelInstance, path: Path, rows: int, shift: int) -> float:
    """The largest error of a product; infinite if it is another one when computed again."""
    launch = launch_of(kernel, path, rows)
    given, call = operands(launch, kernel, seed=rows, shift=shift), CudaKernel(launch)
    call(launch, given.tensors)
    first = given.tensors["out"].clone()
    call(launch, given.tensors)
    if not torch.equal(first.view(torch.uint8), given.tensors["out"].view(torch.uint8)):
        return float("inf")
    return largest_error(first, *exact(given))


def measure(kernel: KernelInstance, path: Path, rows: int, bandwidth: float) -> Measured:
    """Check one product, then time it and the peer."""
    launch, spec = launch_of(kernel, path, rows), kernel.spec
    assert isinstance(spec, MatmulSpec)
    call, sets = CudaKernel(launch), operand_sets(launch, kernel)
    error, peer_error, peer = compare(call, launch, sets[0])
    ours = 1e6 * time_calls([lambda each=each: call(launch, each.tensors) for each in sets], launch.bytes)
    theirs = None
    if peer is not None:
        calls = [lambda each=each, peer=peer: peer(each) for each in sets]
        theirs = 1e6 * time_calls(calls, launch.bytes)
    operations = 2 * rows * spec.columns * spec.depth / PEAK[launch.arch]
    floor = 1e6 * max(launch.bytes / bandwidth, operations)
    return Measured(spec.columns, spec.depth, rows, ours, theirs, floor, launch.bytes, error, peer_error)


# Operands ---------------------------------------------------------------------------------------


def operand_sets(launch: Launch, kernel: KernelInstance) -> list[Operands]:
    """Random operands, in so many sets that the L2 does not hold one until it is read again."""
    return [operands(launch, kernel, seed) for seed in range(max(2, -(-_ROTATED // launch.bytes)))]


def operands(launch: Launch, kernel: KernelInstance, seed: int, shift: int = 0) -> Operands:
    """Codes of normal numbers, and scales between 1/2 and 3/2 over what makes results of order 1.

    Everything but the weights starts ``shift`` elements after where it would.
    """
    spec, generator = kernel.spec, torch.Generator("cuda").manual_seed(seed)
    assert isinstance(spec, MatmulSpec)
    rows, groups, out = launch.rows, spec.depth // spec.group, getattr(torch, spec.dtype)

    def codes(*shape: int) -> Tensor:
        values = torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)
        return (60 * values).clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(shape, device="cuda", generator=generator) + 0.5) / (60 * spec.depth**0.25)

    b, a_scale = codes(spec.columns, spec.depth), scales(rows, groups)
    tensors = {
        "a": shifted(codes(rows, spec.depth), shift),
        "b": swizzled(b),
        "a_scale": shifted(to_physical(a_scale, spec.a_scale_layout), shift),
        "b_scale": shifted(scales(*spec.b_scale_shape), shift),
        "out": shifted(torch.full((rows, spec.columns), torch.nan, device="cuda", dtype=out), shift),
    }
    if spec.bias:
        bias = torch.randn(spec.columns, device="cuda", generator=generator)
        tensors["bias"] = shifted(bias.to(out), shift)
    return Operands(b, tensors, a_scale)


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy that starts so many elements after an aligned address."""
    buffer = torch.empty(tensor.numel() + elements, device=tensor.device, dtype=tensor.dtype)
    return buffer[elements:].view(tensor.shape).copy_(tensor)


def swizzled(b: Tensor) -> Tensor:
    """b [N, K] in the layout ``swizzled_128``."""
    columns, depth = b.shape
    whole = torch.zeros(stored_rows(columns, "swizzled_128"), depth, device=b.device, dtype=torch.uint8)
    whole[:columns] = b.view(torch.uint8)
    tiles = whole.view(-1, 128, depth // 128, 8, 16).transpose(1, 2)
    out = torch.empty(tiles.shape, device=b.device, dtype=torch.uint8)
    for row in range(8):
        out[:, :, row::8] = tiles[:, :, row::8, [chunk ^ row for chunk in range(8)]]
    return out.view(b.dtype).view(whole.shape)


# Checks and the peer ----------------------------------------------------------------------------


def compare(kernel: CudaKernel, launch: Launch, given: Operands) -> tuple[float, float | None, Peer | None]:
    """The largest errors of the kernel and of the peer, and the peer, None if it takes no such product."""
    kernel(launch, given.tensors)
    value, magnitude = exact(given)
    error = largest_error(given.tensors["out"], value, magnitude)
    for peer in peers(given):
        return error, largest_error(peer(given)[: launch.rows], value, magnitude), peer
    return error, None, None


def exact(given: Operands) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sums of the magnitudes of its terms."""
    a, b, scale = given.tensors["a"], given.b, given.tensors["b_scale"]
    group = a.shape[1] // scale.shape[1]
    rows = 1 if len(scale) == len(b) else group  # of b that share a scale
    wide_a = a.double() * given.a_scale.double().repeat_interleave(group, -1)
    value = torch.empty(len(a), len(b), device=a.device, dtype=torch.float64)
    magnitude = torch.empty_like(value)
    for start in range(0, len(b), 4096):
        part = b[start : start + 4096].double()
        scales = scale[start // rows : -(-(start + 4096) // rows)].double()
        part *= scales.repeat_interleave(rows, 0)[: len(part)].repeat_interleave(group, -1)
        value[:, start : start + 4096] = wide_a @ part.T
        magnitude[:, start : start + 4096] = wide_a.abs() @ part.abs().T
    bias = given.tensors["bias"].double() if "bias" in given.tensors else torch.zeros(1, device=a.device)
    return value + bias, magnitude + bias.abs()


def largest_error(actual: Tensor, value: Tensor, magnitude: Tensor) -> float:
    """Beyond the rounding to the result's dtype; infinite where something is no number."""
    half = torch.finfo(actual.dtype).eps / 2
    beyond = ((actual.double() - value).abs() - half * value.abs()).clamp_min(0) / magnitude
    return float(beyond.nan_to_num(nan=torch.inf).max()) if actual.numel() else 0.0


def peers(given: Operands) -> Iterator[Peer]:
    """torch._scaled_mm with the fewest rows from those given on, and the first layout of scales, it takes."""
    rows, reason = len(given.tensors["a"]), ""
    for least, pad_a, pad_b in itertools.product((rows, 4, 16), (1, 4), (1, 4)):
        peer = _peer(max(rows, least), pad_a, pad_b)
        try:
            peer(given)
            torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            continue
        yield peer
    print(f"torch._scaled_mm does not take {list(given.tensors['a'].shape)}: {reason}")


def _peer(rows: int, pad_a: int, pad_b: int) -> Peer:
    """With ``rows`` rows; scales of a along columns, those of b along rows, of lengths that are multiples."""
    laid: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def call(given: Operands) -> Tensor:
        a = given.tensors["a"]
        if a.data_ptr() not in laid:
            more = torch.zeros(rows - len(a), a.shape[1], device=a.device, dtype=a.dtype)
            scales = torch.nn.functional.pad(given.a_scale, (0, 0, 0, rows - len(a)))
            padded = _padded(scales.t(), pad_a).t(), _padded(given.tensors["b_scale"], pad_b).t()
            laid[a.data_ptr()] = (
                torch.cat([a.view(torch.uint8), more.view(torch.uint8)]).view(a.dtype),
                *padded,
            )
        a, *padded = laid[a.data_ptr()]
        return torch._scaled_mm(a, given.b.t(), *padded, out_dtype=torch.bfloat16)

    return call


def _padded(scale: Tensor, multiple: int) -> Tensor:
    """The same with rows whose distance is a multiple of ``multiple``."""
    rows, length = scale.shape
    buffer = torch.zeros(rows, -(-length // multiple) * multiple, device=scale.device)
    buffer[:, :length] = scale
    return buffer[:, :length]


_COMMANDS = {"pack": pack, "check": check, "run": run}
_PACKED_COMMANDS = {"pack": packed_gpu.pack, "check": packed_gpu.check, "run": run_packed}


if __name__ == "__main__":
    sys.exit(main())
