"""``torch.ops.lowering.*``: the operations this project knows, and what each one computes.

Every operation is functional and has an eager implementation, which is the executable
definition of its contract, and a fake kernel, which gives shapes, dtypes and strides without
computing.  The definitions themselves are the plain functions ``*_reference``: they take a
contract of ``patterns.contracts``, so they can also express contracts that no operation here
defaults to, and they use simple aten operations with free leading dimensions, so that
torch.export can trace them to lower a site that did not fuse.  What an operation returns is
contiguous, whatever strides its arguments have; only scale layouts are otherwise.

Each operation is a file of its own, and this one is their table; ``from lowering.ops import`` finds them all.
Nothing in any of them knows about IR, compilers or devices.
"""

from __future__ import annotations

from .block_scaled_matmul import block_scaled_matmul, block_scaled_matmul_reference
from .gated_activation import gated_activation_reference, silu_mul, split_gate_up
from .group_quant import (
    group_quant,
    group_quant_contiguous_reference,
    group_quant_physical_reference,
    group_quant_reference,
    static_quant_reference,
)
from .grouped_topk import grouped_topk, grouped_topk_reference
from .packed_matmul import packed_matmul, packed_matmul_reference, repack, unpacked_weight
from .rms_norm import add_rms_norm, norm_reference, rms_norm
from .scale_layouts import SCALE_LAYOUTS, from_physical, physical_shape, to_physical
from .shuffle_weight import (
    shuffle_weight,
    shuffle_weight_reference,
    unshuffle_weight,
    unshuffle_weight_reference,
)
from .static_quant import static_quant

__all__ = [
    "SCALE_LAYOUTS",
    "add_rms_norm",
    "block_scaled_matmul",
    "block_scaled_matmul_reference",
    "from_physical",
    "gated_activation_reference",
    "group_quant",
    "group_quant_contiguous_reference",
    "group_quant_physical_reference",
    "group_quant_reference",
    "grouped_topk",
    "grouped_topk_reference",
    "norm_reference",
    "packed_matmul",
    "packed_matmul_reference",
    "physical_shape",
    "repack",
    "rms_norm",
    "shuffle_weight",
    "shuffle_weight_reference",
    "silu_mul",
    "split_gate_up",
    "static_quant",
    "static_quant_reference",
    "to_physical",
    "unpacked_weight",
    "unshuffle_weight",
    "unshuffle_weight_reference",
]
