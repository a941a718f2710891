"""Make a kernel instance of a PackedSpec and a target: floats times packed integers of 4 or 8 bits.

On the CPU it is the product of ``kernels/matmul.c``; on GPUs ``kernels/packed.*``.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from iree.compiler import ir

from patterns import canonical
from patterns.contracts import stored_rows
from patterns.packed_matmul import BITS, PackedMatmul, PackedSpec
from patterns.packed_matmul import FAMILY as PATTERNS

from .. import ops
from ..errors import CompileError
from ..targets import Target
from .base import Family, Reference
from .instance import Binding, GridRule, KernelInstance, listed
from .matmul.cpu import DEPTH_MULTIPLE, MATMUL_C, ProductTile, tile_defines
from .matmul.variant import DTYPE_CODES, Specialised, addend_bindings, addend_defines, texts

_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_GROUP = 32  # elements that share a scale at least: a kernel takes so many at a time
_SOURCES = {"cpu": "matmul.c", "cuda": "packed.cu", "hip": "packed.hip"}
_SIDE = 16  # columns of a matrix instruction
_CHUNK_BITS = 128  # of a row of the weight that a lane reads at once
_CHUNKS = 4  # of a row that are read together
_MOST_WAVES = 8  # of a workgroup
_TOKENS = 8  # rows of a whose sums are stored at once
_STAGED_TOKENS = 16  # of which a wave on an NVIDIA GPU copies a block to shared memory
_MOST_TOKENS = {"cuda": 32, "hip": 64}  # of a unit
_LANES = {"cuda": 512, "hip": 1024}  # of a multiprocessor that are at work at once, with 128 registers each
_ENOUGH = 32  # KiB of codes on their way to a multiprocessor take its part of the bandwidth


@dataclass(frozen=True)
class PackedTile:
    """Say how a product is divided on a GPU.

    A workgroup has ``across`` waves beside each other, each with ``tiles`` times 16 columns, and ``along``
    waves that share K; ``split`` workgroups add up a part of K each.
    """

    tiles: int
    across: int
    along: int
    split: int = 1

    @property
    def columns(self) -> int:
        return _SIDE * self.tiles * self.across


def why_unsupported(spec: PackedSpec, target: Target) -> str | None:
    """Say in a sentence why no kernel computes ``spec`` on ``target``; None if one does."""
    floats = ("bfloat16", "float16") if target.is_gpu else tuple(DTYPE_CODES)
    if spec.bits not in BITS:
        return f"The kernel of packed weights knows codes of {listed(map(str, BITS))} bits, not {spec.bits}."
    if spec.dtype not in floats:
        named = listed(floats)
        return f"The kernel of packed weights of {target.name} multiplies {named}, not {spec.dtype}."
    if spec.scale_dtype not in DTYPE_CODES:
        return f"The kernel of packed weights takes scales of {listed(DTYPE_CODES)}, not {spec.scale_dtype}."
    multiple = _CHUNKS * _CHUNK_BITS // spec.bits if target.is_gpu else DEPTH_MULTIPLE
    if spec.depth % multiple:
        return f"The kernel of packed weights takes rows of whole {multiple} codes, not of {spec.depth}."
    if spec.group % _GROUP:
        return f"The kernel of packed weights knows groups of multiples of {_GROUP}, not of {spec.group}."
    if spec.b_layout != ("shuffled_16x16" if target.is_gpu else "row"):
        return f"The kernel of packed weights of {target.name} does not read them in {spec.b_layout}."
    return None


def instance(spec: PackedSpec, target: Target, tile: PackedTile | None = None) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; ``tile``, on GPUs alone, overrides the default.

    Raises CompileError with ``why_unsupported``'s words.
    """
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    special = _on_cpu(spec) if target.backend == "cpu" else _on_gpu(spec, target, tile)
    group = "" if spec.group == spec.depth else spec.group
    stem = f"packed{spec.bits}_{group}_{_SHORT[spec.dtype]}_n{spec.columns}_k{spec.depth}"
    return KernelInstance.named(
        stem.replace("__", "_"),
        target,
        spec,
        _SOURCES[target.backend],
        special.defines,
        bindings(spec),
        special.grid_rule,
        special.threads,
        special.dynamic_shared,
    )


def _common(spec: PackedSpec) -> dict[str, int]:
    return {
        "N": spec.columns,
        "K": spec.depth,
        "BITS": spec.bits,
        "SCALED": spec.group,
        "SCALE_DTYPE": DTYPE_CODES[spec.scale_dtype],
        "OUT_DTYPE": DTYPE_CODES[spec.dtype],
        "HAS_ZERO": int(spec.zeros),
        **addend_defines(spec),
    }


def _on_cpu(spec: PackedSpec) -> Specialised:
    values, grid_rule = tile_defines(spec.columns, ProductTile())
    return Specialised(texts({**_common(spec), "PLAIN": DTYPE_CODES[spec.dtype], **values}), grid_rule)


def _on_gpu(spec: PackedSpec, target: Target, tile: PackedTile | None) -> Specialised:
    tile = tile or default_tile(spec, target)
    threads = target.wave * tile.across * tile.along
    values = {"TILES": tile.tiles, "ACROSS": tile.across, "ALONG": tile.along}
    groups, shared = -(-spec.columns // tile.columns), 0
    if target.backend == "cuda":
        staged = threads // target.wave * _STAGED_TOKENS * _CHUNKS * _CHUNK_BITS // spec.bits * 2
        shared = max(staged, tile.along * _TOKENS * (tile.columns + 4) * 4)
        resident = max(1, _LANES[target.backend] // threads)
        values |= {"CLUSTER": tile.split, "RESIDENT": resident, "SHARED": shared}
    grid_rule = GridRule(_MOST_TOKENS[target.backend], columns=groups * tile.split)
    return Specialised(texts({**_common(spec), **values}), grid_rule, threads, shared)


def default_tile(spec: PackedSpec, target: Target) -> PackedTile:
    """Choose how the product of few rows is divided: as was measured to be best, or by a rule."""
    measured = _measured(target.name).get((spec.columns, spec.depth, spec.bits))
    return measured or ranked_tiles(spec, target)[0]


@functools.cache
def _measured(target: str) -> dict[tuple[int, int, int], PackedTile]:
    """Read what was fastest up to 8 rows on ``target``, by columns, depth and bits.

    Written down from ``python -m tools.bench.gemm_gpu run DIR --weights int4 --tiles 8``.
    """
    path = Path(__file__).with_name("tuning") / f"{target}_packed.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["products"]
    return {(item["columns"], item["depth"], item["bits"]): PackedTile(*item["tile"]) for item in found}


def ranked_tiles(spec: PackedSpec, target: Target) -> list[PackedTile]:
    """List every way to divide a product in which each wave has a block of K to read, the best first."""
    splits = (1, 2, 4, 8) if target.backend == "cuda" else (1,)  # what a cluster is needed for
    blocks = spec.depth * spec.bits // (_CHUNKS * _CHUNK_BITS)
    sizes = itertools.product((1, 2), (1, 2, 4), (1, 2, 4, 8), splits)
    fitting = [
        tile
        for tile in itertools.starmap(PackedTile, sizes)
        if tile.along * tile.split <= blocks
        and _SIDE * tile.tiles < spec.columns + _SIDE
        and tile.across * tile.along <= _MOST_WAVES
    ]
    return sorted(fitting, key=lambda tile: _predicted(spec, target, tile))


def _predicted(spec: PackedSpec, target: Target, tile: PackedTile) -> float:
    """Predict a time, in no unit: of the fullest multiprocessor, and what each workgroup costs besides."""
    waves = tile.across * tile.along
    each = -(-spec.columns // tile.columns) * tile.split / target.multiprocessors  # workgroups
    on_their_way = min(each, _LANES[target.backend] // target.wave // waves) * waves * tile.tiles
    steps = spec.depth * spec.bits / (_CHUNKS * _CHUNK_BITS) / (tile.along * tile.split)
    return (
        math.ceil(each) / each * max(1, _ENOUGH / on_their_way) * (1 + 0.5 / steps) * (1 + 16 / tile.columns)
    )


def bindings(spec: PackedSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order: a, b, scale, zero points if any, what is added; out."""
    scales = (spec.depth // spec.group, spec.columns)
    rows = stored_rows(spec.columns, spec.b_layout)
    read = [
        Binding("a", spec.dtype, ("T", spec.depth), "read"),
        Binding("b", "uint8", (rows, spec.row_bytes), "read"),
        Binding("scale", spec.scale_dtype, scales, "read"),
    ]
    if spec.zeros:
        read.append(Binding("zero", "uint8", scales, "read"))
    return (*read, *addend_bindings(spec), Binding("out", spec.dtype, ("T", spec.columns), "write"))


def _reference(op: ir.Operation) -> Reference:
    product = canonical.from_attribute(PackedMatmul, op.attributes["contract"])

    def packed_matmul(
        a: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        zero = rest[0] if product.zeros else None
        bias = rest[product.zeros] if len(rest) > product.zeros else None
        return ops.packed_matmul_reference(a, codes, scale, zero, bias, product.bits)

    return product, packed_matmul


FAMILY = Family(
    name="packed_matmul",
    patterns=PATTERNS,
    spec=PackedSpec,
    instance=instance,
    why_unsupported=why_unsupported,
    sources={
        "matmul.c": (*MATMUL_C["matmul.c"], "packed.h"),
        "packed.cu": ("mma.h",),
        "packed.hip": (),
    },
    references={canonical.PACKED_MATMUL: _reference},
)
