"""List the operations that have a name: this project's own and PyTorch's, and the tables of other libraries.

A row is a ``NamedOp`` of ``named_call``, which reads the calls; each library has a table of its own beside
this one (``named_vllm``, ``named_aiter``, ``named_sglang``, ``named_routings``).

How sure a row is: "read" means the schema and the arithmetic were read in the library's sources,
"numerics" that the arithmetic follows the numeric contracts this project wrote down, "memory" that
it was not looked up.  Where a library changed its arithmetic, the row says so.
"""

from __future__ import annotations

from . import named_aiter, named_sglang, named_vllm
from .named_call import Arg, NamedOp, RefusedCall

_PLAIN = {"eps": Arg("eps"), "rounding": "once"}
_LAYER_NORM = {**_PLAIN, "statistic": "variance"}

_OURS = (  # read: they are this project's own, and PyTorch's
    NamedOp(
        "lowering::rms_norm",
        "(Tensor x, Tensor? weight, float eps) -> Tensor",
        ("y",),
        x="x",
        weight="weight",
        norm=_PLAIN,
    ),
    NamedOp(
        "lowering::add_rms_norm",
        "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
        ("y", "sum"),
        x="x",
        weight="weight",
        residual="residual",
        norm={**_PLAIN, "residual": "exact"},
    ),
    NamedOp(
        "aten::rms_norm",
        "(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
        ("y",),
        weight="weight",
        norm=_PLAIN,
        shape="normalized_shape",
    ),
    NamedOp(
        "aten::native_layer_norm",
        "(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        ("y", "mean", "rstd"),
        weight="weight",
        bias="bias",
        norm=_LAYER_NORM,
        shape="normalized_shape",
    ),
    NamedOp(
        "aten::layer_norm",
        "(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
        "bool cudnn_enable=True) -> Tensor",
        ("y",),
        weight="weight",
        bias="bias",
        norm=_LAYER_NORM,
        shape="normalized_shape",
    ),
    NamedOp(
        "lowering::silu_mul",
        "(Tensor gate_up) -> Tensor",
        ("y",),
        x="gate_up",
        gate={"activation": "silu", "rounding": "once"},
    ),
    NamedOp(
        "lowering::group_quant",
        "(Tensor x, int group_size, *, ScalarType dtype=float8_e4m3fn, str scale='float32', "
        "str scale_layout='row', float amax_floor=1e-10, float? amax_ceiling=None, float scale_floor=0.0, "
        "str scale_division='true', str quotient='true', float? limit=None, bool infinite=False, "
        "str inverse='true') -> (Tensor, Tensor)",
        ("q", "scale"),
        x="x",
        quantization={
            "group": Arg("group_size"),
            "layout": Arg("scale_layout"),
            **{
                name: Arg(name)
                for name in (
                    "scale",
                    "amax_floor",
                    "amax_ceiling",
                    "scale_floor",
                    "scale_division",
                    "quotient",
                    "limit",
                    "infinite",
                    "inverse",
                )
            },
        },
    ),
    NamedOp(
        "lowering::static_quant",
        "(Tensor x, Tensor scale, *, ScalarType dtype=float8_e4m3fn, str quotient='true', "
        "float? limit=None, float? lowest=None) -> Tensor",
        ("q",),
        x="x",
        given="scale",
        quantization={name: Arg(name) for name in ("quotient", "limit", "lowest")},
    ),
)

NAMED_OPS: tuple[NamedOp, ...] = (*_OURS, *named_vllm.ROWS, *named_aiter.ROWS, *named_sglang.ROWS)

RECOGNISERS = NAMED_OPS


SUSPICIONS = (RefusedCall(NAMED_OPS),)
