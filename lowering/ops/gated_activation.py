"""``torch.ops.lowering.silu_mul`` and every other ``act(gate) * up``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from patterns.contracts import GatedActivation

from .checks import FLOAT_DTYPES, check_dtype, check_rank


def gated_activation_reference(gate: Tensor, up: Tensor, gate_activation: GatedActivation) -> Tensor:
    """``act(gate) * up``, as ``gate_activation`` says.

    gate, up: [..., H], already split where the contract is ``packed``.  Returns [..., H] in up's dtype
    (``once``), the promoted dtype of gate and up (``twice``) or float32 (``none``).

    The activation itself is torch's, in float32.

    Source: silu_and_mul of vLLM, SGLang and FlashInfer (once), Hugging Face MLPs (twice).
    """
    activated = _ACTIVATIONS[gate_activation.activation](gate.to(torch.float32))
    if gate_activation.rounding == "twice":
        return activated.to(gate.dtype) * up
    y = activated * up.to(torch.float32)
    return y if gate_activation.rounding == "none" else y.to(up.dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of [..., 2H]: gate, then up, each [..., H]."""
    half = gate_up.shape[-1] // 2
    return gate_up[..., :half], gate_up[..., half:]


@torch.library.custom_op("lowering::silu_mul", mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def silu_mul(gate_up: Tensor) -> Tensor:
    """y = round(silu(gate) * up) of rows that hold gate, then up; contract ``once``.

    gate_up: [..., 2H] float32, bfloat16 or float16.  Returns [..., H] in its dtype; g / (1 + exp(-g)) and the
    product are float32, rounded once.  Raises ValueError naming the argument if it does not fit.
    Source: silu_and_mul of vLLM, SGLang and FlashInfer.
    """
    _check_gate_up(gate_up)
    return gated_activation_reference(*split_gate_up(gate_up), GatedActivation("silu")).contiguous()


@silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    _check_gate_up(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _check_gate_up(gate_up: Tensor) -> None:
    check_dtype("gate_up", gate_up, FLOAT_DTYPES)
    check_rank("gate_up", gate_up, 1)
    if gate_up.shape[-1] % 2 != 0:
        raise ValueError(f"gate_up: the last axis, {gate_up.shape[-1]}, has no two halves")
