"""Say what a site computes, bit for bit, in frozen values.

Patterns attach them to operations, the report prints them and the kernels are
specialised by them; nothing here knows about IR, targets or compilers.  The
meaning of every field follows the serving stacks (vLLM, AITER, FlashInfer,
DeepGEMM, torch.nn.RMSNorm); where those disagree the field exists.
"""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

Rounding = Literal["once", "twice", "none"]
Residual = Literal["exact", "rounded"]
Statistic = Literal["mean_square", "variance"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
ScaleEncoding = Literal["float32", "ue8m0"]
ScaleLayout = Literal["row", "column", "column_tma", "ue8m0_packed"]
BiasRounding = Literal["once", "twice"]
WeightLayout = Literal["row", "shuffled_16x16", "swizzled_128"]
Division = Literal["true", "reciprocal"]
Quotient = Literal["true", "reciprocal", "inverse"]
Scores = Literal["sigmoid", "softmax", "sqrt_softplus", "gating"]
GroupValue = Literal["two_largest", "largest"]
Dropped = Literal["never", "least", "zero"]
RoutingWeights = Literal["scores", "choices", "softmax", "sigmoid"]
RoutingDtype = Literal["float32", "bfloat16", "float16"]
ChoiceOrder = Literal["first", "torch", "torch_unsorted"]
ScaleDivision = Quotient

# How the bytes of a weight [N, K] of 8-bit floats lie in memory.  Rows of zeros are added up to a multiple of
# ROW_MULTIPLE, K is a multiple of DEPTH_MULTIPLE, and element (n, k) is at
#   row              n*K + k, as in a checkpoint
#   shuffled_16x16   (n/16)*16*K + (k/16)*256 + (n%16)*16 + k%16: AITER's shuffle_weight(w, (16, 16))
#   swizzled_128     (n/128)*128*K + (k/128)*16384 + (n%128)*128 + (((k%128)/16) ^ (n%8))*16 + k%16: tiles of
#                    128 x 128, each in one piece, its 16-byte chunks where wgmma's 128-byte swizzle has them
ROW_MULTIPLE: dict[WeightLayout, int] = {"row": 1, "shuffled_16x16": 16, "swizzled_128": 128}
DEPTH_MULTIPLE: dict[WeightLayout, int] = {"row": 1, "shuffled_16x16": 32, "swizzled_128": 128}

LARGEST_FINITE = {
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2": 57344.0,
    "int8": 127.0,
}


@dataclass(frozen=True)
class GatedActivation:
    """``y = act(gate) * up`` of two tensors [T, H], or of one [T, 2H] that holds gate, then up, in each row.

    rounding
        ``once``: y = round(act32(gate) * up32), the fused ops of the serving stacks.
        ``twice``: y = round(round(act32(gate)) * up), an eager ``act(gate) * up``.
        ``none``: float32 goes on into the quantizations unrounded.
    activation
        In float32: ``silu``: g / (1 + exp(-g)), within 2 units in the last place; ``gelu``:
        g/2 * (1 + erf(g/sqrt(2))), and ``gelu_tanh``, its tanh approximation, within 2.1 units for g >= 0 and
        |g| * 2^-23 below, where the sum cancels in eager torch as well.
    """

    activation: Activation
    rounding: Rounding = "once"
    packed: bool = True


@dataclass(frozen=True)
class Norm:
    """``y = d * rstd * w + b`` over the last axis, of H elements; all of it in float32.

    statistic
        ``mean_square``: d = x32, rstd = 1/sqrt(sum(x32^2)/H + eps), RMSNorm.
        ``variance``: d = x32 - sum(x32)/H, rstd = 1/sqrt(sum(d^2)/H + eps), LayerNorm: the mean first, then
        the squares of what is left.
        Each operation is rounded, but sums are taken in any order.
    group
        How many elements share a statistic, each H of the above; None: all of the last axis.
    rounding
        ``once``: y = round(d*rstd*w + b), torch.nn.RMSNorm and LayerNorm, and FlashInfer.
        ``twice``: y = round(round(round(d*rstd) * w) + b), Hugging Face and vLLM CUDA: the
        inner rounding is to x's dtype, product and sum are taken in the promoted dtype of
        their factors or terms and rounded to it.
        ``none``: float32 goes on into the quantizations unrounded, AITER.
    residual
        None: there is no add before the norm and x32 = float32(x).
        ``exact``: x32 = float32(x) + float32(residual), not rounded before the
        statistic (the fused ops of vLLM and FlashInfer).
        ``rounded``: x32 = float32(round(x + residual)), what an eager ``x + residual``
        followed by a norm computes.
        Either way the residual written back is round(x + residual) in x's dtype.
    gate
        None, or what is normed is a product: x32 = act(gate) * x, rounded as it says.  Not with a residual.
        The gate of a float32 x may be of 16 bits.
    weight_offset
        w = float32(weight) + weight_offset, added in float32 (Gemma stores w - 1).  Such a w is float32:
        under ``twice`` the product is too.
    bias
        None: there is no b.
        ``once``: b is added to the last product before that is rounded (a fused multiply-add in float32), as
        torch's LayerNorm does on CPUs and GPUs; not with ``twice``.
        ``twice``: the product is rounded, then the sum, as where it is written out.

    dtype
        None: y is of x's dtype, as far as it is not promoted.  Or y's dtype, where a float32 x is rounded
        ``once`` to 16 bits.

    Sources besides: torch.nn.LayerNorm; Mamba2, Zamba2, Nemotron-H and Granite (gate, group).
    """

    eps: float
    rounding: Rounding = "once"
    residual: Residual | None = None
    weight_offset: float = 0.0
    statistic: Statistic = "mean_square"
    group: int | None = None
    bias: BiasRounding | None = None
    gate: GatedActivation | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Quantization:
    """Group quantization along the last axis: one scale per ``group`` elements, or per row (None).

    In float32, for each group:
        amax = min(max(max|y|, amax_floor), amax_ceiling)
        scale = amax / qmax (``scale_division`` true) or amax * float32(1/qmax) (reciprocal)
        scale = max(scale, scale_floor)
        ``ue8m0``: scale = 2^ceil(log2(scale)), the exponent kept in [-126, 127]; with ``infinite`` an
            infinite scale stays so, and its finite values become zeros
        q = clamp(y / scale, -qmax, qmax) (``quotient`` true) or of y * (1/scale) (reciprocal),
            rounded to nearest even.
    Some stacks compute the inverse of a scale first: qmax / amax (``inverse`` true) or qmax * (1/amax)
    (reciprocal).  With a ``quotient`` of inverse y is multiplied by that, and with a ``scale_division`` of
    inverse the scale is 1 over it.  Such a scale is float32 and has no floor.
    qmax is the largest finite value of ``dtype`` unless ``limit`` says otherwise (vLLM's 224 for e4m3fnuz).
    A NaN in a group makes its scale NaN and, in a float dtype, every q NaN.  In int8, where torch leaves the
    conversion of NaN undefined, a NaN quotient becomes 0.

    ``static``: the scale is given, one float32 for all rows, and only q is made (group None, and none of the
    fields that say how a scale is computed or laid out).  Then the quotient may also be ``inverse``: what is
    given is multiplied by.  With ``lowest`` values are clamped to [lowest, qmax]: int8 has -128 too.

    Layouts, for q of [M, K] and Gn scales a row: ``row`` is [M, Gn] row major; ``column`` a logical
    [M, Gn] with strides (1, M); ``column_tma`` with strides (1, Mp), Mp = M rounded up to 4, pad rows
    zero.  Their scales are float32, powers of two under ``ue8m0``.  ``ue8m0_packed`` (scale encoding ue8m0
    only) is int32 [M, ceil(Gn/4)] with strides (1, Mp): byte ((g//4)*Mp + m)*4 + g%4 is the biased
    exponent of scale (m, g), 255 for NaN; pad bytes and pad rows are zero.

    Sources: vLLM per_token_group_quant_fp8 and its fused kernels, AITER, FlashInfer, DeepGEMM.
    """

    group: int | None
    dtype: str = "float8_e4m3fn"
    scale: ScaleEncoding = "float32"
    layout: ScaleLayout = "row"
    amax_floor: float = 1e-10
    amax_ceiling: float | None = None
    scale_floor: float = 0.0
    scale_division: ScaleDivision = "true"
    quotient: Quotient = "true"
    limit: float | None = None
    infinite: bool = False
    static: bool = False
    lowest: float | None = None
    inverse: Division = "true"

    @property
    def inverts(self) -> bool:
        """Tell whether the inverse of a scale is computed from amax, and not from the scale."""
        return not self.static and "inverse" in (self.scale_division, self.quotient)

    @property
    def qmax(self) -> float:
        return LARGEST_FINITE[self.dtype] if self.limit is None else self.limit

    @property
    def least(self) -> float:
        return -self.qmax if self.lowest is None else self.lowest

    def groups(self, hidden: int) -> int:
        """Scales in a row of ``hidden`` elements."""
        return 1 if self.group is None else hidden // self.group


@dataclass(frozen=True)
class GroupedTopk:
    """Grouped top-k: route a token to ``topk`` of E experts, which lie in ``num_expert_group`` equal groups.

    For each token, in float32:
        score = sigmoid(gating), softmax(gating) over all experts, sqrt(softplus(gating)), or gating itself,
        as ``scores`` says: each the float32 nearest to the exact value (but for one in 10^7), the root that
        of the softplus so rounded; then rounded to ``score_dtype``
        choice = score + bias, rounded to ``choice_dtype``, or score where no bias is given
        value of a group = the sum of its two largest choices, rounded to ``choice_dtype``, or its largest, as
        ``group_value`` says
        kept are the ``topk_group`` groups of largest value; what is in others is chosen ``never``, or with a
        choice of -inf (``least``) or ``zero``, as ``dropped`` says
        chosen are the ``topk`` experts of largest choice; weight = the expert's score, its choice, the
        softmax of the chosen choices, or the sigmoid of its choice, rounded to float32 once, as ``weights``
        says
        ``renormalize``: weight = weight / (total + eps), total the sum of the chosen weights, rounded once;
        with a ``least_total`` what is divided by is at least that
        weight = weight * routed_scaling_factor
        each of these, the weight before them included, rounded to ``step_dtype``
    A NaN is larger than every number, as in torch.topk.  In ``order`` ``first`` the chosen come largest
    first, and among equals the lower index, of groups as of experts; in ``torch`` and ``torch_unsorted`` as
    torch.topk, sorted or not, chooses and returns them: of a CPU, as eager PyTorch does there; of a GPU,
    where PyTorch promises no order among equals, as in ``first``.

    Sources: DeepSeek-V3 (Hugging Face: eps 1e-20), biased_grouped_topk of AITER and SGLang (eps 0),
    grouped_topk of vLLM (eps 1e-20); DeepSeek-V2 and V4, Mixtral, Qwen3-MoE, gpt-oss, Llama 4 (sigmoid of the
    chosen), Ernie 4.5 (a least total) and LFM2 (16 bits) of Hugging Face.
    """

    topk: int
    num_expert_group: int = 1
    topk_group: int = 1
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    eps: float = 0.0
    scores: Scores = "sigmoid"
    group_value: GroupValue = "two_largest"
    dropped: Dropped = "never"
    weights: RoutingWeights = "scores"
    order: ChoiceOrder = "first"
    least_total: float | None = None
    score_dtype: RoutingDtype = "float32"
    choice_dtype: RoutingDtype = "float32"
    step_dtype: RoutingDtype = "float32"


@dataclass(frozen=True)
class BlockScaledMatmul:
    """The product that ``MatmulSpec`` writes down, of a b whose bytes the model gives in ``b_layout``."""

    b_layout: WeightLayout = "row"
    bias_rounding: BiasRounding = "once"


def static_quantization(
    dtype: str = "float8_e4m3fn",
    quotient: Quotient = "true",
    limit: float | None = None,
    lowest: float | None = None,
) -> Quantization:
    """The contract of a quantization whose scale is given."""
    limit = None if limit == LARGEST_FINITE[dtype] else limit
    made = Quantization(None, dtype, amax_floor=0.0, quotient=quotient, limit=limit, static=True)
    return made if lowest in (None, made.least) else replace(made, lowest=lowest)


class Contract(Protocol):
    """Say what one operation computes: a frozen dataclass of plain values, one of these or an outsider's."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def in_words(contract: Contract) -> str:
    """``eps=1e-06 rounding=twice``: the fields that are not as usual, for people."""
    values = {field.name: getattr(contract, field.name) for field in fields(contract)}
    usual = {field.name: field.default for field in fields(contract)}
    if values.get("group", 0) is None and not values.get("static"):
        values["group"] = "row"
    return " ".join(
        f"{name}={_in_words(value)}"
        for name, value in values.items()
        if value is not None and value not in (0.0, usual[name])
    )


def _in_words(value: Any) -> str:
    if is_dataclass(value):
        return f"({in_words(value)})"  # type: ignore[arg-type]
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Window:
    """Say where the rows of an input lie: in those of a tensor [T, ``pitch``], from column ``offset`` on."""

    pitch: int
    offset: int


@dataclass(frozen=True)
class RowSpec:
    """One fused site: what a kernel reads, computes and writes for each row of [T, hidden].

    The producer of y is ``norm``, ``gate`` or, with neither, x itself.  With both y = act(gate) * norm(x), or
    with ``gate_first`` norm(act(gate) * x), where the gate is the second input.
    Reads x (gate and up in one tensor [T, 2*hidden] if the gate is packed), then up if it is not, then
    residual if the norm has one, then weight (``weight_dtype`` not None) and bias (``bias_dtype``), then the
    scale of every quantization that is static.  With a window an input's rows are part of those of a wider
    tensor, which is what the kernel is given: ``x_window`` that of x, ``other_window`` that of up or the
    residual.
    All is of ``dtype`` but for what a norm of float32 may have otherwise: its gate (``gate_dtype``), and y.
    Writes, in this order: the residual sum (``writes_sum``), y rounded (``writes_y``), and q and
    scale of every quantization, of a static one q alone.
    """

    hidden: int
    dtype: str
    norm: Norm | None = None
    gate: GatedActivation | None = None
    weight_dtype: str | None = None
    writes_sum: bool = False
    writes_y: bool = False
    quantizations: tuple[Quantization, ...] = ()
    x_window: Window | None = None
    other_window: Window | None = None
    bias_dtype: str | None = None
    gate_first: bool = False
    gate_dtype: str | None = None

    @property
    def y_dtype(self) -> str:
        """The dtype that y is written in."""
        return self.norm.dtype if self.norm and self.norm.dtype else self.dtype

    def dtype_of(self, name: str) -> str:
        """The dtype of the input ``name``: x, up, gate or residual."""
        return self.gate_dtype or self.dtype if name in ("gate", "up") else self.dtype

    def columns(self, name: str) -> slice:
        """The columns of the input ``name`` (x, up or residual) that the kernel reads, from the first on."""
        window = self.x_window if name == "x" else self.other_window
        first = window.offset if window else 0
        packed = name == "x" and self.gate is not None and self.gate.packed
        return slice(first, first + (2 * self.hidden if packed else self.hidden))

    def pitch(self, name: str) -> int:
        """Elements from one row of the input ``name`` to the next."""
        window = self.x_window if name == "x" else self.other_window
        return window.pitch if window else self.columns(name).stop

    @property
    def given_scales(self) -> int:
        return sum(quantization.static for quantization in self.quantizations)

    def scale_of(self, result: int) -> int | None:
        """Which quantization's scale the result of that number is; None for any other result."""
        made: list[int | None] = [None] * (self.writes_sum + self.writes_y)
        for number, quantization in enumerate(self.quantizations):
            made += [None] if quantization.static else [None, number]
        return made[result]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TopkSpec:
    """One grouped top-k: what a kernel reads and writes for each token.

    Reads gating [T, experts] in ``dtype`` and, unless ``bias_dtype`` is None, bias [experts] in it.  Writes
    weights [T, topk], rounded to ``weights_dtype``, and ids, ``ids_dtype`` [T, topk].
    """

    experts: int
    dtype: str
    bias_dtype: str | None
    routing: GroupedTopk
    ids_dtype: str = "int32"
    weights_dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What shares a scale of b: a block of as many rows as elements, a row (an output channel), or all rows.
ScaleRows = Literal["blocks", "rows", "one"]


@dataclass(frozen=True)
class MatmulSpec:
    """One scaled product of 8-bit codes: what a kernel reads and writes.

    Reads a [T, depth] in ``a_dtype``, b [columns, depth] in ``b_dtype``, float32 scales of both, then bias
    [columns] in ``dtype`` if it has one.  Writes out [T, columns] in ``dtype``:

        out[m, n] = sum over groups g of a_scale[m, g] * b_scale[n, g] * (a[m, g] . b[n, g]) + bias[n]

    ``group`` elements along ``depth`` share a scale; where they are all of them the scales are ``whole``.
    ``a_scales``: ``rows``, [T, depth/group], or ``one``, [1], for all of a.  ``b_scales``: ``blocks``,
    [ceil(columns/group), depth/group], of which n reads row n/group; ``rows``, [columns, depth/group]; or
    ``one``, [1, 1], for all of b.

    float8: accumulated in float32 in an order of the kernel's own, a group's products before they are scaled,
    the bias added last, and rounded once; or, with a ``bias_rounding`` of ``twice``, rounded to ``dtype``
    before the bias is added, and then again.  Where a scale is infinite the reference gives NaN for a code of
    0 and the kernel for a block that sums up to 0; both give no finite number.
    int8, of whole scales alone: the sum of products is exact in int32, rounded to float32, multiplied by the
    scale of a and then by that of b.
    With a ``residual`` it reads one more tensor, [T, columns] in ``dtype``, adds it to what would be written,
    and rounds the sum, as eager PyTorch does.

    ``b_layout`` is how the bytes of b lie in memory, padding included; ``a_scale_layout`` how the scales of a
    do, one of those that ``Quantization`` describes but for ``ue8m0_packed``.
    """

    columns: int
    depth: int
    group: int
    a_dtype: str
    b_dtype: str
    dtype: str
    bias: bool = False
    b_layout: WeightLayout = "row"
    a_scale_layout: ScaleLayout = "row"
    a_scales: Literal["rows", "one"] = "rows"
    b_scales: ScaleRows = "blocks"
    bias_rounding: BiasRounding = "once"
    residual: bool = False

    @property
    def whole(self) -> bool:
        """Tell whether a row has one scale, which is then applied to the sum."""
        return self.group == self.depth

    @property
    def b_scale_shape(self) -> tuple[int, int]:
        return scale_rows(self.b_scales, self.columns, self.group), self.depth // self.group

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scale_rows(kind: ScaleRows, columns: int, group: int) -> int:
    """Count the rows of the scales of a weight of ``columns`` rows."""
    return {"blocks": -(-columns // group), "rows": columns, "one": 1}[kind]


def scale_kind(shape: tuple[int | None, ...], columns: int, depth: int) -> ScaleRows | None:
    """Tell from their shape what the scales of a weight [columns, depth] are of; None if they fit no kind.

    Where a block holds all rows, ``one`` and ``blocks`` are the same; several groups have no ``one``.
    """
    if len(shape) != 2 or not shape[1] or depth % shape[1]:
        return None
    kinds: list[ScaleRows] = ["blocks", "rows", *(["one"] if shape[1] == 1 else [])]
    group = depth // shape[1]
    return next((kind for kind in kinds if scale_rows(kind, columns, group) == shape[0]), None)


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer that is not quantized: what a kernel reads and writes.

    Reads a [T, depth] and b [columns, depth], then bias [columns] if it has one, and writes out [T, columns],
    all in ``dtype``: out[m, n] = a[m] . b[n] + bias[n], accumulated in float32 in an order of the kernel's
    own and rounded once.  A ``residual`` is one of ``MatmulSpec``.
    """

    columns: int
    depth: int
    dtype: str
    bias: bool = False
    residual: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SelectionSpec:
    """A top-k by itself: the ``count`` first of rows of ``elements``, the ``largest`` or the smallest.

    Reads x [T, elements] and writes values [T, count] in ``dtype`` and their places, int64 [T, count].  A NaN
    is larger than every number.  Equal elements come in the order in which eager PyTorch has them on a CPU,
    and so do all that are not ``sorted``.
    """

    elements: int
    count: int
    dtype: str
    largest: bool = True
    sorted: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stored_rows(columns: int, layout: WeightLayout) -> int:
    """The rows of a weight [columns, K] in ``layout``, padding included."""
    return -(-columns // ROW_MULTIPLE[layout]) * ROW_MULTIPLE[layout]


class Spec(Protocol):
    """Specialise a kernel by a frozen value that can be written as plain data."""

    def to_dict(self) -> dict[str, Any]: ...
