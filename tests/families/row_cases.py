"""What the row kernel is tested on: specs in short, cases with a name, and inputs whose results are exact.

Rows are made of small integers where bits are compared: their sum of squares is exact in every order.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowering.targets import Target, resolve
from patterns.contracts import GatedActivation, Norm, Quantization, RowSpec, static_quantization

CPU, SM90, SM100 = resolve("cpu"), resolve("sm_90"), resolve("sm_100")
GFX950, GFX942 = resolve("gfx950"), resolve("gfx942")
Q128 = Quantization(128)


def spec(hidden: int, dtype: str = "bfloat16", rounding: str | None = "once", **fields) -> RowSpec:
    """A RowSpec in short: ``rounding`` None is no norm at all; ``quants`` its quantizations."""
    norm = None
    if rounding and "gate" not in fields:
        given = {name: fields.pop(name) for name in ("residual", "statistic", "group", "y") if name in fields}
        bias = ("twice" if rounding == "twice" else "once") if fields.get("bias_dtype") else None
        bias = fields.pop("bias", bias)
        given["dtype"] = given.pop("y", None)
        eps, offset = fields.pop("eps", 1e-6), fields.pop("offset", 0.0)
        norm = Norm(eps, rounding, weight_offset=offset, bias=bias, **given)  # type: ignore[arg-type]
    weight = fields.pop("weight", dtype if norm else None)
    quantizations = tuple(fields.pop("quants", ()))
    return RowSpec(hidden, dtype, norm, weight_dtype=weight, quantizations=quantizations, **fields)


def gated_norm(hidden: int, dtype: str = "bfloat16", gate: str = "once", **fields) -> RowSpec:
    """A norm times silu of another tensor, whose product is rounded as ``gate`` says."""
    activation = GatedActivation("silu", gate, packed=False)  # type: ignore[arg-type]
    return replace(spec(hidden, dtype, **fields), gate=activation)


def layer_norm(hidden: int, dtype: str = "bfloat16", **fields) -> RowSpec:
    """A LayerNorm with a bias of ``dtype``."""
    return spec(hidden, dtype, statistic="variance", **{"bias_dtype": dtype, **fields})


def norm_of_gated(hidden: int, dtype: str = "bfloat16", gate: str = "none", **fields) -> RowSpec:
    """A norm of what a silu of another tensor is multiplied with, as in Mamba2: of groups, where given."""
    return replace(gated_norm(hidden, dtype, gate, **{"rounding": "twice", **fields}), gate_first=True)


CASES = {
    "once": spec(7168, quants=[Q128]),
    "none": spec(7168, rounding="none", weight="float32", quants=[Q128]),
    "add_exact_all": spec(
        1536,
        residual="exact",
        writes_sum=True,
        writes_y=True,
        quants=[Quantization(128, layout="column_tma")],
    ),
    "add_rounded_twice": spec(
        576, rounding="twice", residual="rounded", writes_sum=True, quants=[Quantization(64)]
    ),
    "twice_wide_weight": spec(
        1536, rounding="twice", weight="float32", writes_y=True, quants=[Quantization(32)]
    ),
    "add_none_f16": spec(
        2048, "float16", "none", residual="exact", weight="bfloat16", writes_y=True, quants=[Quantization(64)]
    ),
    "f16_once": spec(384, "float16", weight="float32", writes_y=True, quants=[Q128]),
    "f16_twice": spec(4096, "float16", "twice", residual="rounded", writes_sum=True, quants=[Q128]),
    "f32": spec(1536, "float32", residual="exact", writes_sum=True, writes_y=True, quants=[Q128]),
    "f32_narrow_weight": spec(512, "float32", "twice", weight="bfloat16", quants=[Quantization(32)]),
    "no_weight": spec(128, weight=None, writes_y=True, quants=[Q128]),
    "plain": spec(7168, rounding=None, quants=[Q128]),
    "plain_smallest": spec(32, "float32", None, quants=[Quantization(32, layout="column_tma")]),
    "four": spec(
        16384,
        residual="exact",
        writes_sum=True,
        writes_y=True,
        quants=[
            Q128,
            Quantization(32, layout="column_tma"),
            Quantization(64),
            Quantization(128, amax_floor=1e-4),
        ],
    ),
    "no_floor": spec(256, rounding=None, quants=[Quantization(64, amax_floor=0.0)]),
    "norm_gate": gated_norm(3200, quants=[Q128, Quantization(None)]),
    "norm_gate_twice": gated_norm(
        384, rounding="twice", gate="twice", writes_y=True, quants=[Quantization(32)]
    ),
    "norm_gate_f16": gated_norm(1000, "float16", rounding="twice", gate="once", writes_y=True),
    "norm_gate_unrounded": gated_norm(
        128, rounding="none", gate="none", weight="float32", offset=1.0, quants=[Quantization(64, "int8")]
    ),
    "layer": layer_norm(7168, quants=[Q128, Quantization(None)]),
    "layer_add_all": layer_norm(
        1536,
        residual="rounded",
        writes_sum=True,
        writes_y=True,
        quants=[Quantization(64), Quantization(None, "int8")],
    ),
    "layer_any_length": layer_norm(131, "float16", writes_y=True),
    "layer_f32": layer_norm(1000, "float32", residual="exact", writes_sum=True, writes_y=True),
    "layer_no_bias": layer_norm(384, weight="float32", bias_dtype=None, quants=[Q128, static_quantization()]),
    "layer_bias_alone": layer_norm(520, weight=None, writes_y=True),
    "layer_twice": layer_norm(640, rounding="twice", bias_dtype="float32", quants=[Quantization(32)]),
    "layer_written_out": layer_norm(
        640, rounding="none", weight="float32", bias_dtype="float32", bias="twice", quants=[Quantization(64)]
    ),
    "layer_groups": layer_norm(3584, group=448, writes_y=True),
    "groups": spec(8192, rounding="twice", group=1024, writes_y=True, quants=[Q128]),
    "groups_short": spec(384, "float16", group=96, offset=1.0, quants=[Quantization(32)]),
    "gate_groups": norm_of_gated(7168, group=3584, quants=[Q128, Quantization(None)]),
    "gate_first": norm_of_gated(1536, gate="twice", writes_y=True, quants=[Quantization(64)]),
    "gate_groups_f16": norm_of_gated(
        1024, "float16", rounding="once", group=64, weight="float32", writes_y=True
    ),
    # A gate and y of 16 bits, as Mamba2's mixers have them, and a stream of float32.
    "gate_groups_wide": norm_of_gated(
        8192,
        "float32",
        "once",
        rounding="once",
        group=1024,
        weight="bfloat16",
        y="bfloat16",
        gate_dtype="bfloat16",
        writes_y=True,
        quants=[Q128, Quantization(None)],
    ),
    "layer_narrow": layer_norm(
        1003, "float32", residual="exact", y="float16", writes_sum=True, writes_y=True
    ),
    "norm_only": spec(1000, rounding="twice", residual="rounded", writes_sum=True, writes_y=True),
    "norm_any_length": spec(131, "float16", writes_y=True),
    "norm_one": spec(1, "float32", rounding="none", writes_y=True),
}


# Schemes in fours, so that few instances cover many: e5m2, column, packed, Triton's reciprocals; ...
SCHEMES = {
    "layouts": [
        Quantization(128, "float8_e5m2"),
        Quantization(64, layout="column"),
        Quantization(128, scale="ue8m0", layout="ue8m0_packed"),
        Quantization(32, scale_division="reciprocal", quotient="reciprocal"),
    ],
    "rows": [
        Quantization(None),
        Quantization(None, "int8", scale_division="reciprocal", quotient="reciprocal", scale_floor=2**-23),
        Quantization(128, amax_floor=0.0, scale_floor=1 / (448 * 512)),
        Quantization(64, scale="ue8m0", infinite=True),
    ],
    "bounds": [
        Quantization(128, "int8", layout="column_tma"),
        Quantization(32, "int8", scale="ue8m0", layout="ue8m0_packed"),
        Quantization(None, amax_ceiling=20.0, layout="column"),
        Quantization(64, limit=203.0, scale="ue8m0", layout="column_tma", scale_division="reciprocal"),
    ],
    "static": [
        static_quantization(),
        static_quantization("int8", lowest=-128.0),
        static_quantization("float8_e5m2", "reciprocal"),
        Quantization(64, layout="column_tma"),
    ],
    "inverse": [
        Quantization(None, "int8", amax_floor=0.0, quotient="inverse"),
        Quantization(128, quotient="inverse", scale_division="inverse"),
        Quantization(
            64, layout="column_tma", quotient="inverse", inverse="reciprocal", scale_division="inverse"
        ),
        Quantization(32, "float8_e5m2", scale_division="inverse", amax_ceiling=20.0),
    ],
    "static_inverse": [
        static_quantization("int8", "inverse", limit=100.0),
        static_quantization(quotient="inverse"),
        Quantization(None, "int8"),
        static_quantization(limit=240.0, lowest=-7.0),
    ],
    "fnuz": [
        Quantization(128, "float8_e4m3fnuz"),
        Quantization(64, "float8_e4m3fnuz", limit=224.0, scale_division="reciprocal"),
        Quantization(128, "float8_e4m3fnuz", scale="ue8m0", layout="ue8m0_packed"),
        Quantization(32, "int8", amax_floor=0.0, quotient="reciprocal"),
    ],
}


PRODUCERS: dict[str, dict] = {
    "once": {"writes_y": True},
    "twice": {"rounding": "twice", "weight": "float32"},
    "none": {"rounding": "none", "dtype": "float16"},
    "gemma": {"offset": 1.0},
    "gemma_twice": {"offset": 1.0, "rounding": "twice", "writes_y": True},
    "add": {"residual": "rounded", "writes_sum": True, "writes_y": True},
    "plain": {"rounding": None},
    "plain_f32": {"rounding": None, "dtype": "float32"},
    "silu": {"gate": GatedActivation("silu")},
    "gelu": {"gate": GatedActivation("gelu", "twice", packed=False), "dtype": "float16", "writes_y": True},
    "gelu_tanh": {"gate": GatedActivation("gelu_tanh", "none")},
}


def scheme_lengths(producer: str, schemes: str, target: Target) -> tuple[int, ...]:
    """Short rows, which share a wave, and long ones, which need a barrier.

    Of a GPU, whose kernels take long to build and run here, one of them, by turns.
    """
    turn = list(PRODUCERS).index(producer) + list(SCHEMES).index(schemes)
    return (384, 3200) if target is CPU else ((384, 3200)[turn % 2],)


def scheme_case(producer: str, schemes: str, hidden: int) -> RowSpec:
    return spec(hidden, quants=SCHEMES[schemes], **PRODUCERS[producer])


# Every producer and every scheme; short rows share a wave, long ones need a barrier.
SCHEME_CASES = [
    ("once", "layouts", 384),
    ("twice", "bounds", 3200),
    ("none", "layouts", 640),
    ("gemma", "rows", 3200),
    ("gemma_twice", "bounds", 384),
    ("add", "rows", 640),
    ("plain", "rows", 128),
    ("plain_f32", "bounds", 384),
    ("silu", "layouts", 3200),
    ("gelu", "rows", 384),
    ("gelu_tanh", "bounds", 640),
    ("once", "static", 3200),
    ("add", "static_inverse", 384),
    ("plain_f32", "static", 640),
    ("silu", "static", 18432),
    ("twice", "inverse", 640),
    ("plain_f32", "inverse", 384),
]


def integer_inputs(spec: RowSpec, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """x and residual of small integers times a power of two per row, and a weight with every bit in use."""
    generator = torch.Generator().manual_seed(seed)

    length = (spec.norm.group if spec.norm else None) or spec.hidden
    centred = spec.norm is not None and spec.norm.statistic == "variance"

    def integers() -> torch.Tensor:
        values = torch.randint(-9, 10, (rows, spec.hidden), generator=generator).float()
        # A few groups of zeros, and rows of very different magnitude.
        values[:, : spec.hidden // 4] *= torch.randint(0, 2, (rows, 1), generator=generator)
        if centred:  # a mean that is a small integer
            groups = values.unflatten(-1, (-1, length))
            halves = groups[..., : length // 2]
            groups[..., -(length // 2) :] = -halves.flip(-1)
            groups[..., length // 2 : -(length // 2)] = 0.0
            values += torch.randint(-2, 3, (rows, 1), generator=generator)
        return values

    power = torch.exp2(torch.randint(-6, 4, (rows, 1), generator=generator).float())
    dtype = getattr(torch, spec.dtype)
    inputs = [(integers() * power).to(dtype)]
    if spec.gate:
        # Where the activation is exact: silu(g) is g, 0 and -0 here, and so are the others.
        exact = torch.tensor([-512.0, 0.0, 32.0, 64.0] + [40.0, 56.0, 112.0] * (not spec.gate_first))
        gate = exact[torch.randint(len(exact), (rows, spec.hidden), generator=generator)].to(dtype)
        gate = gate.to(getattr(torch, spec.gate_dtype or spec.dtype))
        inputs = [torch.cat([gate, inputs[0]], -1)] if spec.gate.packed else [gate, inputs[0]]
        if spec.norm:
            inputs.reverse()
    if spec.norm and spec.norm.residual:
        inputs.append((integers() * power).to(dtype))
    if spec.weight_dtype:
        weight = torch.randn(spec.hidden, generator=generator) * 3
        inputs.append(weight.to(getattr(torch, spec.weight_dtype)))
    if spec.bias_dtype:
        inputs.append(torch.randn(spec.hidden, generator=generator).to(getattr(torch, spec.bias_dtype)))
    for _ in range(spec.given_scales):
        inputs.append(torch.rand(1, generator=generator) + 2.0**-5)
    return inputs
