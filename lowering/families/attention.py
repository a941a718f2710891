"""Make the kernels of an AttentionSpec and a target: attention of few queries, of ``kernels/attention.c``.

On GPUs, and for other sizes, attention is left to IREE, or spelled out (``passes.attention``).
"""

from __future__ import annotations

import math

from patterns.attention import FAMILY as PATTERNS
from patterns.attention import AttentionSpec

from ..errors import CompileError
from ..targets import Target
from .base import Family
from .instance import Binding, GridRule, KernelInstance, float32_literal
from .matmul.variant import DTYPE_CODES, texts

_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_LANES = 16  # of the widest vectors, which rows of keys and values are made of
_MOST_ROWS = 32  # queries that share keys; with more of them a product is faster
_MOST_ELEMENTS = 256  # of a key or value: queries and scores lie on the stack of a worker
_MOST_PARTS = 4096


def why_unsupported(spec: AttentionSpec, target: Target) -> str | None:
    """Say in a sentence why no kernel computes ``spec`` on ``target``; None if one does."""
    if target.is_gpu:
        return f"The kernel of attention is written for the cpu, not for {target.name}."
    if spec.dtype not in DTYPE_CODES:
        return f"The kernel of attention takes {', '.join(DTYPE_CODES)}, not {spec.dtype}."
    together = spec.heads // spec.shared * spec.queries
    if together > _MOST_ROWS:
        return f"The kernel of attention takes {_MOST_ROWS} queries of the same keys, not {together}."
    for size in (spec.depth, spec.width):
        if size % _LANES or size > _MOST_ELEMENTS:
            return (
                f"The kernel of attention takes whole {_LANES} elements up to {_MOST_ELEMENTS}, not {size}."
            )
    if spec.parts > _MOST_PARTS:
        return f"The kernel of attention takes up to {_MOST_PARTS * spec.part} keys, not {spec.keys}."
    return None


def instance(spec: AttentionSpec, target: Target) -> KernelInstance:
    """Make the kernel for ``spec`` on ``target``; raises CompileError with ``why_unsupported``'s words."""
    if reason := why_unsupported(spec, target):
        raise CompileError(reason)
    values = {
        "DTYPE": DTYPE_CODES[spec.dtype],
        "WIDTH": spec.width,
        "PARTS": spec.parts,
        "JOINED": int(spec.joined),
    }
    what = "attention_joined" if spec.joined else f"attention_of{spec.keys}x{spec.depth}"
    defines, grid_rule = texts(values), GridRule(1)
    if not spec.joined:
        pairs = spec.batch * spec.shared
        defines += (*texts(_of_parts(spec)), ("SCALE", float32_literal(spec.scale)))
        grid_rule = GridRule(spec.rows, columns=pairs * spec.parts)
    stem = f"{what}_{_SHORT[spec.dtype]}_{spec.rows}x{spec.width}"
    return KernelInstance.named(stem, target, spec, "attention.c", defines, bindings(spec), grid_rule)


def _of_parts(spec: AttentionSpec) -> dict[str, int]:
    """The constants of the kernel of parts; rows from one sequence, head or query of the mask to the next."""
    sequences, heads, queries = spec.mask or (1, 1, 1)
    steps = {
        "MASK_QUERY": int(queries > 1),
        "MASK_HEAD": queries * (heads > 1),
        "MASK_BATCH": queries * heads * (sequences > 1),
    }
    return {
        "PAIRS": spec.batch * spec.shared,
        "SHARED": spec.shared,
        "GROUP": spec.heads // spec.shared,
        "QUERIES": spec.queries,
        "KEYS": spec.keys,
        "KEYS_EACH": spec.part,
        "DEPTH": spec.depth,
        "MASKED": int(bool(spec.mask)),
        **steps,
    }


def bindings(spec: AttentionSpec) -> tuple[Binding, ...]:
    """List the tensors of ``spec`` in dispatch order."""
    out = Binding("out", spec.dtype, ("T", spec.width), "write")
    if spec.joined:
        return (Binding("parts", "float32", ("T", spec.row_parts), "read"), out)
    held = spec.batch * spec.shared * spec.keys
    read = [
        Binding("q", spec.dtype, ("T", spec.depth), "read"),
        Binding("k", spec.dtype, (held, spec.depth), "read"),
        Binding("v", spec.dtype, (held, spec.width), "read"),
    ]
    if spec.mask:
        read.append(Binding("mask", "float32", (math.prod(spec.mask), spec.keys), "read"))
    return (*read, Binding("parts", "float32", ("T", spec.row_parts), "write"))


FAMILY = Family(
    "attention",
    PATTERNS,
    AttentionSpec,
    instance,
    why_unsupported,
    sources={"attention.c": ("cpu.h", "vectors.h", "lanes.h", "reals_cpu.h", "activation.h")},
)
