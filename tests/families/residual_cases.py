"""Products that add a residual: what such a kernel writes is the plain one's result plus the residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lowering.families.instance import KernelInstance
from tests.families.host_kernels import Launch, assert_same, run


def assert_adds(
    plain: KernelInstance,
    adding: KernelInstance,
    launcher: Callable[[KernelInstance], Launch],
    tensors: Sequence[torch.Tensor],
    rows: int,
    shift: int = 0,
) -> None:
    """Compare bit for bit with eager's add of what ``plain`` writes for the same ``tensors``.

    Every tensor starts ``shift`` elements off a boundary but for b.
    """
    (product,) = run(plain, launcher(plain), tensors, rows, shift, aligned=["b"])
    residual = torch.randn(product.shape, generator=torch.Generator().manual_seed(rows)).mul(8)
    residual = residual.to(product.dtype)
    given = [*tensors, residual]
    assert_same(run(adding, launcher(adding), given, rows, shift, aligned=["b"]), [product + residual])
