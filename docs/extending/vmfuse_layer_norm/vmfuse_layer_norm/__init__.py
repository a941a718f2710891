"""LayerNorm and the quantization of its rows as one kernel, brought to vmfuse from outside.

Importing this registers ``torch.ops.vmfuse_layer_norm.layer_norm_fp8``.  A model that only has a
``torch.nn.LayerNorm`` need not: vmfuse finds the family by the entry point in pyproject.toml.
"""

from __future__ import annotations

from .contract import LayerNorm
from .eager import layer_norm_fp8

__all__ = ["LayerNorm", "layer_norm_fp8"]
