"""vLLM's and FlashInfer's quantizations by name: raised, compiled, and compared with the definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering
from lowering.errors import CompileError
from lowering.importing import foreign
from patterns import named_ops
from patterns.contracts import GatedActivation, Norm, Quantization, static_quantization
from tests.importing import test_foreign as others
from tests.importing.test_foreign import Calls, contracts, op, randn
from tests.raised import bits

UNDECLARED = {row.name for row in named_ops.NAMED_OPS if not row.is_declared}
foreign.declare_ops(names=UNDECLARED)

FP8, INT8, HIDDEN = torch.float8_e4m3fn, torch.int8, 256
# Small integers and a power of two: their squares have one sum, so results are equal bit for bit.
X, RESIDUAL = (torch.randint(-8, 9, (5, HIDDEN)).bfloat16() for _ in range(2))
WEIGHT, GATE_UP, SCALE = randn(HIDDEN, seed=1), randn(5, 2 * HIDDEN, seed=2), torch.tensor([0.037])

TWICE, ADDED = Norm(1e-6, "twice"), Norm(1e-6, "twice", "exact")
NONE, NONE_ADDED = Norm(1e-6, "none"), Norm(1e-6, "none", "exact")
ONCE, ONCE_ADDED = Norm(1e-6), Norm(1e-6, residual="exact")
SILU = GatedActivation("silu", "none")
ROW_FP8 = Quantization(None, amax_floor=0.0, scale_floor=1 / (448 * 512))
ROW_INT8 = Quantization(None, "int8", amax_floor=0.0, scale_floor=2.0**-23, quotient="reciprocal")
GROUPS = replace(ROW_FP8, group=128)
STATIC = static_quantization(quotient="reciprocal")
AITER_GROUPS = Quantization(128, scale_division="reciprocal", quotient="reciprocal")
LEAST = static_quantization("int8", lowest=-128.0)

Function = Callable[..., Any]


def sglang(name: str, *rest: Any, dtype: torch.dtype = FP8, scale: bool = False) -> Function:
    """A call whose first arguments are x, the codes and the scales, made or given; then ``rest``."""

    def function(x: Tensor, *given: Tensor) -> Any:
        q, groups = torch.empty_like(x, dtype=dtype), HIDDEN // rest[0] if len(rest) > 1 else 1
        made = [torch.empty(x.shape[0], groups)] if scale else []
        op(name)(x, q, *made, *given, *rest)
        return [q, *made]

    return function


def aiter(name: str, *rest: Any, out: bool = False, groups: int = 0) -> Function:
    """One of AITER's norms, quantized where there are ``groups`` of scales; ``rest`` follows epsilon."""

    def function(x: Tensor, w: Tensor, residual: Tensor | None = None, smooth: Tensor | None = None) -> Any:
        added = [] if residual is None else [residual, torch.empty_like(residual)]
        scales = [torch.empty(x.shape[0], groups)] if groups else []
        if not (out or groups):
            return op(name)(x, w, 1e-6, *rest)
        made = torch.empty_like(x, dtype=FP8 if groups else None)
        smoothing = [] if smooth is None else [smooth]
        op(name)(made, x, *added, *smoothing, *scales, w, 1e-6, *rest)
        return [made, *scales, *added[1:]]

    return function


def quantized(
    name: str, *rest: Any, dtype: torch.dtype = FP8, scale: bool = False, groups: int = 1
) -> Function:
    """A call whose first arguments are the codes, x and, where they are made, the scales; then ``rest``."""

    def function(x: Tensor, *tensors: Tensor) -> Any:
        hidden = x.shape[1] // 2 if "silu" in name else x.shape[1]
        q = torch.empty(x.shape[0], hidden, dtype=dtype)
        made = [torch.empty(x.shape[0], groups)] if scale else []
        op(name)(q, x, *made, *tensors, *rest)
        return [q, *made]

    return function


def normed(
    name: str, *rest: Any, dtype: torch.dtype = FP8, groups: int = 1, column: bool = False
) -> Function:
    """One of vLLM's norms that make scales, with a residual or without."""

    def function(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Any:
        q = torch.empty_like(x, dtype=dtype)
        s = torch.empty(groups, x.shape[0]).T if column else torch.empty(x.shape[0], groups)
        total = None if residual is None else residual.clone()
        op(name)(q, x, w, s, 1e-6, None, total, *rest)
        return [q, s] if total is None else [q, s, total]

    return function


def added(name: str, *, out_first: bool = True, rest: tuple[Any, ...] = (1e-6,)) -> Function:
    def function(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        q, total = torch.empty_like(x, dtype=FP8), r.clone()
        op(name)(q, x, total, w, s, *rest)
        return q, total

    return function


def into(name: str, mutates: int) -> Function:
    def function(*tensors: Tensor) -> Any:
        given = [t.clone() for t in tensors[:mutates]] if mutates == 2 else [torch.empty_like(tensors[0])]
        op(name)(*given, *(tensors[mutates:] if mutates == 2 else tensors), 1e-6)
        return given

    return function


_PER_TOKEN, _PER_BLOCK = "_C::rms_norm_dynamic_per_token_quant", "_C::rms_norm_per_block_quant"
CALLS: dict[str, tuple[Function, tuple[Tensor, ...], list[Any]]] = {
    "lowering::static_quant": (
        op("lowering::static_quant"),
        (X, SCALE),
        [static_quantization()],
    ),
    "_C::rms_norm_weightless": (into("_C::rms_norm_weightless", 1), (X,), [Norm(1e-6)]),
    "_C::fused_add_rms_norm_weightless": (
        into("_C::fused_add_rms_norm_weightless", 2),
        (X, RESIDUAL),
        [Norm(1e-6, residual="exact")],
    ),
    "_C::dynamic_per_token_scaled_fp8_quant": (
        quantized("_C::dynamic_per_token_scaled_fp8_quant", None, scale=True),
        (X,),
        [ROW_FP8],
    ),
    "_C::static_scaled_fp8_quant": (quantized("_C::static_scaled_fp8_quant"), (X, SCALE), [STATIC]),
    "_C::static_scaled_fp8_quant of a tensor": (
        quantized("_C::static_scaled_fp8_quant", [-1, -1]),
        (X, SCALE),
        [STATIC],
    ),
    "_C::dynamic_scaled_int8_quant": (
        quantized("_C::dynamic_scaled_int8_quant", None, dtype=INT8, scale=True),
        (X,),
        [Quantization(None, "int8", amax_floor=0.0, quotient="inverse")],
    ),
    "_C::static_scaled_int8_quant": (
        quantized("_C::static_scaled_int8_quant", None, dtype=INT8),
        (X, SCALE),
        [LEAST],
    ),
    "_C::rms_norm_static_fp8_quant": (
        quantized("_C::rms_norm_static_fp8_quant", 1e-6),
        (X, WEIGHT, SCALE),
        [TWICE, STATIC],
    ),
    "_C::fused_add_rms_norm_static_fp8_quant": (
        added("_C::fused_add_rms_norm_static_fp8_quant"),
        (X, RESIDUAL, WEIGHT, SCALE),
        [ADDED, STATIC],
    ),
    _PER_TOKEN: (normed(_PER_TOKEN), (X, WEIGHT), [TWICE, ROW_FP8]),
    f"{_PER_TOKEN} int8": (normed(_PER_TOKEN, dtype=INT8), (X, WEIGHT), [TWICE, ROW_INT8]),
    f"{_PER_TOKEN} add": (normed(_PER_TOKEN), (X, WEIGHT, RESIDUAL), [ADDED, ROW_FP8]),
    _PER_BLOCK: (normed(_PER_BLOCK, 128, False, groups=2), (X, WEIGHT), [TWICE, GROUPS]),
    f"{_PER_BLOCK} add": (
        normed(_PER_BLOCK, 128, True, groups=2, column=True),
        (X, WEIGHT, RESIDUAL),
        [ADDED, replace(GROUPS, layout="column")],
    ),
    "_C::silu_and_mul_quant": (quantized("_C::silu_and_mul_quant"), (GATE_UP, SCALE), [SILU, STATIC]),
    "_C::silu_and_mul_per_block_quant": (
        quantized("_C::silu_and_mul_per_block_quant", 128, None, False, scale=True, groups=2),
        (GATE_UP,),
        [SILU, GROUPS],
    ),
    "flashinfer::rmsnorm_quant": (
        quantized("flashinfer::rmsnorm_quant", 1e-6, None),
        (X, WEIGHT, SCALE),
        [NONE, STATIC],
    ),
    "flashinfer::fused_add_rmsnorm_quant": (
        added("flashinfer::fused_add_rmsnorm_quant", rest=(1e-6, None)),
        (X, RESIDUAL, WEIGHT, SCALE),
        [NONE_ADDED, STATIC],
    ),
    "sgl_kernel::sgl_per_token_quant_fp8": (
        sglang("sgl_kernel::sgl_per_token_quant_fp8", scale=True),
        (X,),
        [Quantization(None, amax_floor=1e-35, quotient="reciprocal")],
    ),
    "sgl_kernel::sgl_per_tensor_quant_fp8": (
        sglang("sgl_kernel::sgl_per_tensor_quant_fp8", True),
        (X, SCALE),
        [STATIC],
    ),
    "aiter::rms_norm": (aiter("aiter::rms_norm"), (X, WEIGHT), [ONCE]),
    "aiter::rmsnorm2d_fwd": (aiter("aiter::rmsnorm2d_fwd"), (X, WEIGHT), [ONCE]),
    "aiter::rms_norm_cu": (aiter("aiter::rms_norm_cu", out=True), (X, WEIGHT), [ONCE]),
    "aiter::rmsnorm": (aiter("aiter::rmsnorm", out=True), (X, WEIGHT), [ONCE]),
    "aiter::rmsnorm gemma": (
        aiter("aiter::rmsnorm", True, out=True),
        (X, WEIGHT),
        [replace(ONCE, weight_offset=1.0)],
    ),
    "aiter::add_rmsnorm": (aiter("aiter::add_rmsnorm", out=True), (X, WEIGHT, RESIDUAL), [ONCE_ADDED]),
    "aiter::rmsnorm2d_fwd_with_add": (
        aiter("aiter::rmsnorm2d_fwd_with_add", False, 0, out=True),
        (X, WEIGHT, RESIDUAL),
        [ONCE_ADDED],
    ),
    "aiter::rmsnorm_quant": (aiter("aiter::rmsnorm_quant", 128, groups=2), (X, WEIGHT), [NONE, AITER_GROUPS]),
    "aiter::add_rmsnorm_quant": (
        aiter("aiter::add_rmsnorm_quant", groups=1),
        (X, WEIGHT, RESIDUAL),
        [NONE_ADDED, replace(AITER_GROUPS, group=None)],
    ),
    "aiter::rmsnorm2d_fwd_with_dynamicquant": (
        aiter("aiter::rmsnorm2d_fwd_with_dynamicquant", groups=1),
        (X, WEIGHT),
        [NONE, replace(AITER_GROUPS, group=None)],
    ),
    "aiter::rmsnorm2d_fwd_with_add_dynamicquant": (
        aiter("aiter::rmsnorm2d_fwd_with_add_dynamicquant", 0, 128, groups=2),
        (X, WEIGHT, RESIDUAL),
        [NONE_ADDED, AITER_GROUPS],
    ),
}

REFUSED: dict[str, tuple[Function, str]] = {
    "sgl_kernel::sgl_per_token_group_quant_int8": (
        sglang(
            "sgl_kernel::sgl_per_token_group_quant_int8", 128, 1e-10, -128.0, 127.0, dtype=INT8, scale=True
        ),
        "its codes are cut off behind the point",
    ),
    "sgl_kernel::sgl_per_tensor_quant_fp8, dynamic": (
        lambda x: sglang("sgl_kernel::sgl_per_tensor_quant_fp8", False)(x, SCALE),
        "is_static is False, not True",
    ),
    "aiter::rmsnorm2d_fwd_with_smoothquant": (
        lambda x: aiter("aiter::rmsnorm2d_fwd_with_smoothquant", groups=1)(x, x[0], smooth=x[0].float()),
        "it multiplies columns by smoothing scales",
    ),
    "aiter::rmsnorm2d_fwd_with_add_smoothquant": (
        lambda x: aiter("aiter::rmsnorm2d_fwd_with_add_smoothquant", groups=1)(
            x, x[0], x, smooth=x[0].float()
        ),
        "it multiplies columns by smoothing scales",
    ),
    "aiter::rmsnorm_quant, shuffled": (
        lambda x: aiter("aiter::rmsnorm_quant", 128, True, groups=2)(x, x[0]),
        "shuffle_scale is True, not False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_contract_says_is_refused_by_name(name: str) -> None:
    function, reason = REFUSED[name]
    (site,) = lowering.explain(others.Calls(function), (X,)).sites
    assert (
        site.status == "unfused"
        and reason in (site.reason or "")
        and name.split(",")[0] in (site.reason or "")
    )


def test_every_row_has_a_test() -> None:
    tables = (others.NORMS, others.ADD_NORMS, others.GATES, others.QUANTS, others.FUSED, CALLS)
    tested = {name.split(" ")[0].rstrip(",") for table in (*tables, REFUSED) for name in table}
    tested |= {"aten::layer_norm", "aten::native_layer_norm"}  # tests/patterns
    assert tested == {row.name for row in named_ops.NAMED_OPS}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_raised_to_its_contracts(name: str) -> None:
    function, tensors, expected = CALLS[name]
    assert contracts(function, *tensors) == expected


def reference(contracts: list[Any], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """What the contracts say of these tensors, by the definitions."""
    x, *rest = tensors
    made: list[Tensor] = []
    for contract in contracts:
        if isinstance(contract, Norm):
            vectors = [t for t in rest if t.dim() == 1 and t.numel() == HIDDEN]
            added = [t for t in rest if t.shape == tensors[0].shape]
            x, total = lowering.ops.norm_reference(x, *(added or [None]), *(vectors or [None]), contract)  # type: ignore[arg-type]
            made = [total] if total is not None else []
        elif isinstance(contract, GatedActivation):
            x = lowering.ops.gated_activation_reference(*lowering.ops.split_gate_up(x), contract)
        elif contract.static:
            return [lowering.ops.static_quant_reference(x, rest[-1], contract), *made]
        else:
            return [*lowering.ops.group_quant_reference(x, contract), *made]
    return [x, *made]


def test_all_calls_in_one_program_compute_what_their_contracts_say() -> None:
    """Equal bit for bit; an activation may be two units off, which moves a code by one step at most."""
    calls = list(CALLS.values())

    def function(*tensors: Tensor) -> Any:
        given, out = iter(tensors), []
        for call, wanted, _ in calls:
            results = call(*(next(given) for _ in wanted))
            out += [results] if isinstance(results, Tensor) else results
        return out

    tensors = [t.clone() for _, wanted, _ in calls for t in wanted]
    exported = torch.export.export(Calls(function), tuple(tensors))
    compiled = lowering.compile(exported)
    assert compiled.report.summary() == {
        "fused": sum(len(found) for *_, found in calls),
        "unfused": 0,
        "dispatches": len(calls),
    }
    results = iter(lowering.load(compiled.vmfb)(*tensors))
    for name, (_, wanted, found) in CALLS.items():
        for expected in reference(found, wanted):
            got = next(results)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
            if "silu" in name:
                assert (got.float() - expected.float()).abs().max() <= 2**-3 * expected.float().abs().max()
            else:
                assert torch.equal(bits(got), bits(expected)), name


def test_a_row_of_zeros_is_zeros_in_int8_by_an_inverse() -> None:
    """As vLLM's kernel has it, whose inverse of a magnitude of zero is zero."""
    function, _, _ = CALLS["_C::dynamic_scaled_int8_quant"]
    x = X.clone()
    x[1] = 0
    program = lowering.load(lowering.compile(torch.export.export(Calls(function), (x,))).vmfb)
    q, scale = program(x)
    assert not q[1].any() and scale[1] == 0 and q[0].any()


@pytest.mark.parametrize(
    ("name", "rest", "reason"),
    [
        ("_C::static_scaled_fp8_quant", ([1, -1],), "group_shape is [1, -1]"),
        ("_C::static_scaled_int8_quant", (torch.zeros(1, dtype=torch.int32),), "azp is 0, not None"),
    ],
)
def test_other_arguments_are_refused_by_name(name: str, rest: Any, reason: str) -> None:
    function = quantized(name, *rest, dtype=INT8 if "int8" in name else FP8)
    with pytest.raises(CompileError) as caught:
        lowering.compile(torch.export.export(Calls(function), (X, SCALE)))
    assert f"{name} cannot be compiled: {reason}" in str(caught.value)


def test_models_may_register_what_is_not_declared() -> None:
    """Declaring the table leaves these names alone: a model's own file defines them, before or after."""
    assert UNDECLARED and all(name.startswith(("_C::", "flashinfer::")) for name in UNDECLARED)
    before = len(foreign._libraries)
    foreign.declare_ops()
    assert len(foreign._libraries) == before
