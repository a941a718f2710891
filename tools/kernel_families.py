"""The kernel families that are tuned and timed, by name, and the sizes they are tried at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from patterns.contracts import (
    Activation,
    GatedActivation,
    Norm,
    Quantization,
    RowSpec,
    Window,
    static_quantization,
)

ROWS = (1, 4, 16, 64, 128, 512, 1024, 4096, 16384)
HIDDEN = (1536, 2048, 4096, 5120, 7168, 16384)

GROUP_128 = Quantization(128)
FOR_TMA = Quantization(128, layout="column_tma")
MICROSCALED = Quantization(32, scale="ue8m0")
PER_ROW_INT8 = Quantization(None, "int8")
PACKED = Quantization(128, scale="ue8m0", layout="ue8m0_packed")


def _gated(
    activation: Activation, *quantizations: Quantization, packed: bool = True, dtype: str = "bfloat16"
):
    gate = GatedActivation(activation, packed=packed)
    return lambda hidden: RowSpec(hidden, dtype, gate=gate, quantizations=quantizations)


def _norm(
    *quantizations: Quantization, residual: bool = False, writes_y: bool = False
) -> Callable[[int], RowSpec]:
    norm = Norm(1e-6, "once", "exact" if residual else None)
    return lambda hidden: RowSpec(
        hidden,
        "bfloat16",
        norm,
        weight_dtype="bfloat16",
        writes_sum=residual,
        writes_y=writes_y,
        quantizations=quantizations,
    )


def _layer_norm(
    *quantizations: Quantization, residual: bool = False, writes_y: bool = False, group: int | None = None
) -> Callable[[int], RowSpec]:
    """A LayerNorm with weight and bias, of a residual sum that eager torch rounds."""
    norm = Norm(1e-5, "once", "rounded" if residual else None, statistic="variance", group=group, bias="once")
    usual = _norm(*quantizations, residual=residual, writes_y=writes_y)
    return lambda hidden: replace(usual(hidden), norm=norm, bias_dtype="bfloat16")


def _norm_of_gated(*quantizations: Quantization, groups: int = 1) -> Callable[[int], RowSpec]:
    """A norm of silu(gate) * x, in so many groups, as Mamba2's."""

    def family(hidden: int) -> RowSpec:
        group = None if groups == 1 else hidden // groups
        usual = _norm(*quantizations)(hidden)
        gate = GatedActivation("silu", "none", packed=False)
        return replace(usual, norm=Norm(1e-5, "twice", group=group), gate=gate, gate_first=True)

    return family


FAMILIES: dict[str, Callable[[int], RowSpec]] = {
    "norm, quant": _norm(GROUP_128),
    "norm, quant, y": _norm(GROUP_128, writes_y=True),
    "add, norm, quant": _norm(GROUP_128, residual=True),
    "add, norm, quant, y": _norm(FOR_TMA, residual=True, writes_y=True),
    "norm, 2 quants": _norm(GROUP_128, MICROSCALED),
    "norm, 3 quants": _norm(GROUP_128, MICROSCALED, PER_ROW_INT8),
    "add, norm, 2 quants, y": _norm(GROUP_128, MICROSCALED, residual=True, writes_y=True),
    "norm, packed quant": _norm(PACKED),
    "silu*up, quant": _gated("silu", GROUP_128),
    "quant": lambda hidden: RowSpec(hidden, "bfloat16", quantizations=(GROUP_128,)),
}

# What is only checked, at lengths that leave lanes idle: other schemes, activations and dtypes.
CHECKED_HIDDEN = (384, 3200)
CHECKED: dict[str, Callable[[int], RowSpec]] = {
    "gelu, e5m2": _gated("gelu", Quantization(64, "float8_e5m2", layout="column_tma"), packed=False),
    "gelu_tanh, int8": _gated("gelu_tanh", Quantization(128, "int8"), dtype="float16"),
    "silu, whole row, packed": _gated("silu", Quantization(None), PACKED),
    "add, norm, whole rows": _norm(Quantization(None), PER_ROW_INT8, residual=True, writes_y=True),
    "norm, e5m2, packed": _norm(Quantization(128, "float8_e5m2"), PACKED),
    "norm, gated": lambda hidden: replace(
        _norm(GROUP_128)(hidden), gate=GatedActivation("silu", packed=False)
    ),
    "layer norm, quant": _layer_norm(GROUP_128, PER_ROW_INT8),
    "add, layer norm, quant, y": _layer_norm(FOR_TMA, residual=True, writes_y=True),
    "layer norm of groups": _layer_norm(GROUP_128, group=64, writes_y=True),
    "layer norm, by a given scale": _layer_norm(static_quantization()),
    "layer norm, float32": lambda hidden: RowSpec(
        hidden,
        "float32",
        Norm(1e-5, "once", statistic="variance", bias="once"),
        weight_dtype="float32",
        bias_dtype="float32",
        writes_y=True,
        quantizations=(Quantization(64),),
    ),
    "norm of silu*x": _norm_of_gated(GROUP_128, PER_ROW_INT8),
    "norm of silu*x in groups": _norm_of_gated(GROUP_128, PER_ROW_INT8, groups=4),
    "norm of silu*x in groups, of float32": lambda hidden: replace(
        _norm_of_gated(GROUP_128)(hidden),
        dtype="float32",
        norm=Norm(1e-5, "once", group=hidden // 4, dtype="bfloat16"),
        gate=GatedActivation("silu", packed=False),
        gate_dtype="bfloat16",
        writes_y=True,
    ),
    "norm, by given scales": _norm(static_quantization(), static_quantization("int8", lowest=-128.0)),
    "silu*up, by a given inverse": _gated("silu", static_quantization(quotient="inverse")),
    "quant of float32": lambda hidden: RowSpec(hidden, "float32", quantizations=(GROUP_128, MICROSCALED)),
    "twice, float16, float32 weight": lambda hidden: RowSpec(
        hidden,
        "float16",
        Norm(1e-6, "twice", "rounded"),
        weight_dtype="float32",
        writes_sum=True,
        quantizations=(GROUP_128,),
    ),
    "float32 throughout": lambda hidden: RowSpec(
        hidden,
        "float32",
        Norm(1e-6, "none", "exact"),
        weight_dtype="float32",
        writes_sum=True,
        writes_y=True,
        quantizations=(Quantization(64, layout="column_tma"),),
    ),
    # Rows of wider tensors: aligned as dense ones are, to 4 bytes, and to an element.
    "norm, quant of a part": lambda hidden: replace(
        FAMILIES["norm, quant"](hidden), x_window=Window(3 * hidden, hidden)
    ),
    "add, norm, quant, y of parts": lambda hidden: replace(
        FAMILIES["add, norm, quant, y"](hidden),
        x_window=Window(hidden + 6, 2),
        other_window=Window(hidden + 9, 5),
    ),
    "silu*up, quant of parts": lambda hidden: RowSpec(
        hidden,
        "bfloat16",
        gate=GatedActivation("silu", packed=False),
        quantizations=(GROUP_128,),
        x_window=Window(2 * hidden + 12, 4),
        other_window=Window(2 * hidden + 12, hidden + 12),
    ),
}
