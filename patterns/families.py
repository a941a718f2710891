"""List the pattern families of this project, in the order in which they are asked.

Bring one of your own by the entry point group ``vmfuse.families`` (docs/extending.md).
"""

from __future__ import annotations

from . import (
    block_scaled_matmul,
    dequantized,
    gated_activation,
    group_quant,
    integer_products,
    matmul_fusion,
    named_ops,
    near_gates,
    near_norms,
    near_quantizations,
    norms,
    row_fusion,
)
from .operation import PatternFamily

# Norms, gates and quantizations: one kernel family computes all that is done to a row.
ROW = PatternFamily(
    operations=(
        norms.OPERATION,
        gated_activation.OPERATION,
        group_quant.OPERATION,
        row_fusion.OPERATION,
    ),
    recognisers=(
        *named_ops.RECOGNISERS,
        *norms.RECOGNISERS,
        *gated_activation.RECOGNISERS,
        *group_quant.RECOGNISERS,
    ),
    suspicions=(
        *near_norms.SUSPICIONS,
        *near_gates.SUSPICIONS,
        *near_quantizations.SUSPICIONS,
        *named_ops.SUSPICIONS,
        *dequantized.SUSPICIONS,
    ),
    named=named_ops.NAMED_OPS,
    fuse=row_fusion.fuse_rows,
)
# What a product reads is laid out for it in a step of its own, which gives it its kernel.
PRODUCT = PatternFamily(
    operations=(block_scaled_matmul.OPERATION, matmul_fusion.OPERATION),
    recognisers=(*block_scaled_matmul.RECOGNISERS, *integer_products.RECOGNISERS),
    named=block_scaled_matmul.NAMED_OPS,
)
