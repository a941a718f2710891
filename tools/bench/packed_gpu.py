"""The product with packed weights on a GPU, beside the same product of 16-bit weights by PyTorch (cuBLAS).

Called by ``tools.bench.gemm_gpu`` for ``--weights int4`` and ``int8``: symmetric, groups of 128, scales of
the activation's dtype.  The peer multiplies the unpacked weights in bfloat16, in the same run; its own
operands, too, are so many that the L2 holds none.  ``--tiles N`` tries the N ways to divide a product that
are predicted to be best, and prints which was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowering.backends.toolchain import compile_kernel
from lowering.families.instance import KernelInstance
from lowering.families.packed import PackedTile, instance, ranked_tiles
from lowering.ops import shuffle_weight, unpacked_weight
from lowering.targets import resolve
from patterns.packed_matmul import PackedSpec
from tools.gpu.launch import CudaKernel, Launch, launch_of
from tools.gpu.timing import time_calls

LARGEST_ERROR = 2.0**-14  # of the sum of the magnitudes of a result's terms, beyond its rounding
PEAK = {"sm_90a": 989e12, "sm_100a": 2250e12}  # dense bfloat16, operations a second (datasheet)
_ROTATED = 400 << 20  # bytes of all sets together
_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class Measured:
    """One product; times in microseconds, ``peer`` that of 16-bit weights."""

    columns: int
    depth: int
    rows: int
    kernel: float
    peer: float
    floor: float
    bytes: int
    error: float
    tile: PackedTile

    @property
    def right(self) -> bool:
        return self.error <= LARGEST_ERROR

    @property
    def ratio(self) -> float:
        """The peer's time over the kernel's."""
        return self.peer / self.kernel

    def __str__(self) -> str:
        tile = self.tile
        return (
            f"{self.columns:6d} x {self.depth:5d} {self.rows:5d} {self.kernel:9.2f} {self.peer:9.2f} "
            f"{self.ratio:6.2f} {self.bytes / self.kernel / 1e3:7.0f} {self.floor / self.kernel:6.2f} "
            f"{self.error:8.1e}  {tile.tiles} x {tile.across}, K / {tile.along} / {tile.split}"
            f"{'' if self.right else '  WRONG'}"
        )

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio}


HEADER = "     N x K         M    kernel   16 bits  ratio    GB/s  floor    error  tile"


@dataclass(frozen=True)
class Operands:
    """Hold what one call reads and writes; ``weight`` is the codes' values as the kernel rounds them."""

    tensors: dict[str, Tensor]
    weight: Tensor


def spec_of(columns: int, depth: int, options: argparse.Namespace) -> PackedSpec:
    """The product of symmetric weights in groups of 128."""
    bits = _BITS[options.weights]
    return PackedSpec(columns, depth, 128, bits, "bfloat16", "bfloat16", b_layout="shuffled_16x16")


def kernels_of(options: argparse.Namespace, columns: int, depth: int) -> dict[PackedTile, KernelInstance]:
    """The kernels that are tried for a product, that of the default first."""
    spec, target = spec_of(columns, depth, options), resolve(options.target)
    tiles = ranked_tiles(spec, target)[: options.tiles]
    return {tile: instance(spec, target, tile) for tile in tiles}


def checked(options: argparse.Namespace) -> Iterator[tuple[KernelInstance, tuple[int, ...]]]:
    """Kernels that between them have everything there is, and the numbers of rows to check them with."""
    bits, target = _BITS[options.weights], resolve(options.target)
    dtypes, sizes = ("bfloat16", "float16"), ((200, 1024), (2048, 1536), (17, 2048), (1032, 512))
    tiles = (PackedTile(2, 2, 2, 2), PackedTile(2, 4, 1, 1), PackedTile(1, 1, 4, 8), PackedTile(2, 1, 8, 4))
    for number in range(12):
        columns, depth = sizes[number % 4]
        dtype, scale = dtypes[number % 2], (*dtypes, "float32")[number % 3]
        group, flags = (128, 32, depth)[number // 4], {"zeros": number % 3 == 1, "bias": number % 5 < 2}
        spec = PackedSpec(columns, depth, group, bits, dtype, scale, **flags, b_layout="shuffled_16x16")
        yield instance(spec, target, tiles[number // 3]), (0, 1, 8, 9, 16, 31, 33, 200 + number)


def every(options: argparse.Namespace) -> Iterator[KernelInstance]:
    """All kernels that are packed."""
    yield from (kernel for kernel, _ in checked(options))
    for columns, depth in options.shape:
        yield from kernels_of(options, columns, depth).values()


def _object(directory: Path, kernel: KernelInstance) -> Path:
    return directory / f"{kernel.entry}.cubin"


def pack(options: argparse.Namespace) -> int:
    """Compile each kernel to DIR/entry.cubin."""
    options.directory.mkdir(parents=True, exist_ok=True)
    kernels = list(every(options))
    for kernel in kernels:
        _object(options.directory, kernel).write_bytes(compile_kernel(kernel))
    print(f"{len(kernels)} kernels")
    return 0


def check(options: argparse.Namespace) -> int:
    """Compare every product of ``checked`` with float64; a line for each kernel."""
    wrong = 0
    for number, (kernel, counts) in enumerate(checked(options)):
        path = _object(options.directory, kernel)
        errors = [check_one(kernel, path, rows, number % 4) for rows in counts]
        wrong += sum(error > LARGEST_ERROR for error in errors)
        print(f"{kernel.entry}, {counts} rows, largest error {max(errors):.1e}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


def check_one(kernel: KernelInstance, path: Path, rows: int, shift: int) -> float:
    """The largest error of a product; infinite if it is another one when computed again."""
    launch = launch_of(kernel, path, rows)
    given, call = operands(launch, kernel, seed=rows, shift=shift), CudaKernel(launch)
    call(launch, given.tensors)
    first = given.tensors["out"].clone()
    call(launch, given.tensors)
    if not torch.equal(first.view(torch.int16), given.tensors["out"].view(torch.int16)):
        return float("inf")
    return largest_error(first, given)


def measure(options: argparse.Namespace, columns: int, depth: int, rows: int, bandwidth: float) -> Measured:
    """Check one product, then time it, in every way that is tried, and the peer."""
    kernels = kernels_of(options, columns, depth)
    default = next(iter(kernels.values()))
    launch = launch_of(default, _object(options.directory, default), rows)
    sets = operand_sets(launch, default)
    found: dict[PackedTile, tuple[float, float]] = {}
    for tile, kernel in kernels.items():
        launch = launch_of(kernel, _object(options.directory, kernel), rows)
        call = CudaKernel(launch)
        call(launch, sets[0].tensors)
        error = largest_error(sets[0].tensors["out"], sets[0])
        calls = [lambda each=each, call=call, launch=launch: call(launch, each.tensors) for each in sets]
        found[tile] = (1e6 * time_calls(calls, launch.bytes), error)
    moved = 2 * (columns * depth + rows * (columns + depth))
    peers = [(each.tensors["a"], each.weight) for each in sets[: _sets(moved)]]
    peer_calls = [lambda a=a, w=w: torch.nn.functional.linear(a, w) for a, w in peers]
    peer = 1e6 * time_calls(peer_calls, moved)
    best = min(found, key=lambda tile: found[tile][0])
    floor = 1e6 * max(launch.bytes / bandwidth, 2 * rows * columns * depth / PEAK[launch.arch])
    error = max(error for _, error in found.values())
    return Measured(columns, depth, rows, found[best][0], peer, floor, launch.bytes, error, best)


# Operands ---------------------------------------------------------------------------------------


def _sets(bytes_: int) -> int:
    """Count the sets of so many bytes that the L2 does not hold."""
    return max(2, -(-_ROTATED // bytes_))


def operand_sets(launch: Launch, kernel: KernelInstance) -> list[Operands]:
    """Make random operands, in so many sets that the L2 does not hold one until it is read again."""
    return [operands(launch, kernel, seed) for seed in range(_sets(launch.bytes))]


def operands(launch: Launch, kernel: KernelInstance, seed: int, shift: int = 0) -> Operands:
    """Draw codes, and scales that make results of order 1.

    Everything but the codes starts ``shift`` elements after where it would.
    """
    spec, generator = kernel.spec, torch.Generator("cuda").manual_seed(seed)
    assert isinstance(spec, PackedSpec)
    groups, dtype = spec.depth // spec.group, getattr(torch, spec.dtype)

    def integers(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top, shape, device="cuda", generator=generator, dtype=torch.uint8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    codes = integers(256, spec.columns, spec.row_bytes)
    scale = (normal(spec.columns, groups).abs() + 0.5) / (2**spec.bits * spec.depth**0.5)
    scale = scale.to(getattr(torch, spec.scale_dtype))
    zero = integers(1 << spec.bits, spec.columns, groups) if spec.zeros else None
    tensors = {
        "a": _shifted(normal(launch.rows, spec.depth).to(dtype), shift),
        "b": shuffle_weight(codes, "shuffled_16x16"),
        "scale": _shifted(scale.t().contiguous(), shift),
        "out": _shifted(
            torch.full((launch.rows, spec.columns), torch.nan, device="cuda", dtype=dtype), shift
        ),
    }
    if zero is not None:
        tensors["zero"] = _shifted(zero.t().contiguous(), shift)
    if spec.bias:
        tensors["bias"] = _shifted(normal(spec.columns).to(dtype), shift)
    return Operands(tensors, unpacked_weight(codes, scale, zero, spec.bits).to(dtype))


def _shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy that starts so many elements after an aligned address."""
    buffer = torch.empty(tensor.numel() + elements, device=tensor.device, dtype=tensor.dtype)
    return buffer[elements:].view(tensor.shape).copy_(tensor)


def largest_error(actual: Tensor, given: Operands) -> float:
    """Beyond the rounding to the result's dtype; infinite where something is no number."""
    a, half = given.tensors["a"].double(), torch.finfo(actual.dtype).eps / 2
    bias = given.tensors["bias"].double() if "bias" in given.tensors else torch.zeros(1, device=a.device)
    largest = 0.0
    for start in range(0, actual.shape[1] if actual.numel() else 0, 4096):
        part, some = given.weight[start : start + 4096].double(), bias[start : start + 4096]
        some = some if len(some) else bias
        value = a @ part.T + some
        magnitude = a.abs() @ part.abs().T + some.abs()
        found = actual[:, start : start + 4096].double()
        beyond = ((found - value).abs() - half * value.abs()).clamp_min(0) / magnitude
        largest = max(largest, float(beyond.nan_to_num(nan=torch.inf).max()))
    return largest
