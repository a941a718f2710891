"""Operations of vLLM, AITER, SGLang and FlashInfer by name: declared, exported, raised, compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from iree.compiler import ir
from torch import nn

import lowering
from lowering import ops
from lowering.errors import CompileError
from lowering.importing import foreign, importer
from lowering.passes import raise_ops as raising
from lowering.passes.normalize import normalize
from patterns import canonical, named_ops, torch_ir
from patterns.contracts import GatedActivation, Norm, Quantization
from patterns.sites import Ledger

foreign.declare_ops()

HIDDEN = 256
FP8 = torch.float8_e4m3fn
RECOGNISERS = raising.recognisers()


class Calls(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def op(name: str) -> Any:
    namespace, _, function = name.partition("::")
    return getattr(getattr(torch.ops, namespace), function)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, WEIGHT, RESIDUAL = randn(5, HIDDEN), randn(HIDDEN, seed=1), randn(5, HIDDEN, seed=2)


def exported(function: Callable[..., Any], *args: torch.Tensor, **options: Any) -> Any:
    program = torch.export.export(Calls(function), args, **options)
    return foreign.functionalize(program, importer._decompositions())


def raised(program: Any) -> importer.Program:
    """What ``program`` is raised to."""
    imported = importer.import_module(program, (), ir.Context())
    with imported.context, ir.Location.unknown():
        normalize(imported.main())
        raising.raise_function(imported.main(), Ledger(), RECOGNISERS)
    return imported


def operations(program: importer.Program, *names: str) -> list[ir.Operation]:
    """The operations of these names in it, or all."""
    found = [op.operation for op in torch_ir.block_of(program.main()).operations]
    return [op for op in found if not names or torch_ir.op_name(op) in names]


READERS = {
    canonical.NORM: canonical.norm_contract,
    canonical.GATED_ACTIVATION: canonical.gate_contract,
    canonical.GROUP_QUANT: canonical.quantization,
}


def contracts(function: Callable[..., Any], *args: torch.Tensor) -> list[Any]:
    """The contracts of the canonical operations, in order; nothing else may be left."""
    program, found = raised(exported(function, *args)), []
    for operation in operations(program):
        name = torch_ir.op_name(operation)
        if name in READERS:
            found.append(READERS[name](operation))
        else:
            assert "vmfuse_functional" not in name and "vllm" not in name, name
    return found


def run(program: Any, *args: torch.Tensor, dispatches: int | None = None) -> Any:
    compiled = lowering.compile(program)
    if dispatches is not None:
        assert compiled.report.to_dict()["summary"]["dispatches"] == dispatches
    return lowering.load(compiled.vmfb)(*args)


def same(results: Any, expected: Any) -> None:
    """Equal but for the row statistic, whose summation order is free."""
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        if got.dtype == torch.float32:
            assert torch.allclose(got, want, rtol=3e-7, atol=0)
        else:
            different = (got.float() != want.float()).float().mean().item()
            assert different < 0.005, different
            assert torch.allclose(got.float(), want.float(), rtol=0.13, atol=1e-6)


# --- every row ---------------------------------------------------------------------------------------


def norm_into(name: str, *rest: Any) -> Callable[..., Any]:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        op(name)(y, x, weight, 1e-6, *rest)
        return y

    return function


def add_norm_into(name: str, *rest: Any) -> Callable[..., Any]:
    def function(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> Any:
        x, residual = x.clone(), residual.clone()
        op(name)(x, residual, weight, 1e-6, *rest)
        return x, residual

    return function


def gate_into(name: str, *rest: Any) -> Callable[..., Any]:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        op(name)(y, x, *rest)
        return y

    return function


def scales(x: torch.Tensor, layout: str = "row") -> torch.Tensor:
    """What the serving stacks allocate for the scales of 128 elements each."""
    rows, groups = x.shape[0], x.shape[1] // 128
    if layout == "row":
        return x.new_empty(rows, groups, dtype=torch.float32)
    if layout == "column":
        return x.new_empty(groups, rows, dtype=torch.float32).permute(-1, -2)
    padded = (rows + 3) // 4 * 4
    if layout == "column_tma":
        return torch.empty_strided((rows, groups), (1, padded), dtype=torch.float32)
    return torch.empty_strided((rows, (groups + 3) // 4), (1, padded), dtype=torch.int32)


def quant_into(name: str, *rest: Any, layout: str = "row", limit: float = 448.0) -> Callable[..., Any]:
    def function(x: torch.Tensor) -> Any:
        q, s = torch.empty_like(x, dtype=FP8), scales(x, layout)
        op(name)(x, q, s, 128, 1e-10, -limit, limit, *rest)
        return q, s

    return function


TWICE = Norm(1e-6, "twice")
ONCE = Norm(1e-6, "once")
GEMMA = Norm(1e-6, "once", weight_offset=1.0)
UE8M0 = Quantization(128, scale="ue8m0", scale_floor=1e-10)
PACKED = Quantization(128, scale="ue8m0", scale_floor=1e-10, layout="ue8m0_packed")
AITER = Quantization(128, scale_division="reciprocal", quotient="reciprocal")


def added(norm: Norm) -> Norm:
    return Norm(norm.eps, norm.rounding, "exact", norm.weight_offset)


NORMS = {
    "vllm_ir::rms_norm": (lambda x, w: op("vllm_ir::rms_norm")(x, w, 1e-6), TWICE),
    "vllm::rocm_aiter_rms_norm": (lambda x, w: op("vllm::rocm_aiter_rms_norm")(x, w, 1e-6), ONCE),
    "lowering::rms_norm": (lambda x, w: op("lowering::rms_norm")(x, w, 1e-6), ONCE),
    "aten::rms_norm": (lambda x, w: op("aten::rms_norm")(x, [HIDDEN], w, 1e-6), ONCE),
    "_C::rms_norm": (norm_into("_C::rms_norm"), TWICE),
    "sgl_kernel::rmsnorm": (norm_into("sgl_kernel::rmsnorm", False), ONCE),
    "sgl_kernel::gemma_rmsnorm": (norm_into("sgl_kernel::gemma_rmsnorm", True), GEMMA),
    "flashinfer::rmsnorm": (norm_into("flashinfer::rmsnorm", None), ONCE),
    "flashinfer::gemma_rmsnorm": (norm_into("flashinfer::gemma_rmsnorm", None), GEMMA),
}

ADD_NORMS = {
    "vllm_ir::fused_add_rms_norm": (
        lambda x, w, r: op("vllm_ir::fused_add_rms_norm")(x, r, w, 1e-6),
        added(TWICE),
    ),
    "vllm::rocm_aiter_rmsnorm2d_fwd_with_add": (
        lambda x, w, r: op("vllm::rocm_aiter_rmsnorm2d_fwd_with_add")(x, r, w, 1e-6),
        added(ONCE),
    ),
    "lowering::add_rms_norm": (lambda x, w, r: op("lowering::add_rms_norm")(x, r, w, 1e-6), added(ONCE)),
    "_C::fused_add_rms_norm": (add_norm_into("_C::fused_add_rms_norm"), added(TWICE)),
    "sgl_kernel::fused_add_rmsnorm": (add_norm_into("sgl_kernel::fused_add_rmsnorm", False), added(ONCE)),
    "sgl_kernel::gemma_fused_add_rmsnorm": (
        add_norm_into("sgl_kernel::gemma_fused_add_rmsnorm", False),
        added(GEMMA),
    ),
    "flashinfer::fused_add_rmsnorm": (add_norm_into("flashinfer::fused_add_rmsnorm", None), added(ONCE)),
    "flashinfer::gemma_fused_add_rmsnorm": (
        add_norm_into("flashinfer::gemma_fused_add_rmsnorm", None),
        added(GEMMA),
    ),
}

GATES = {
    "lowering::silu_mul": (op("lowering::silu_mul"), GatedActivation("silu")),
    **{
        f"{library}::{name}_and_mul": (
            gate_into(f"{library}::{name}_and_mul"),
            GatedActivation(name, rounding),  # type: ignore[arg-type]
        )
        for library, rounding in (("_C", "twice"), ("sgl_kernel", "once"), ("flashinfer", "once"))
        for name in ("silu", "gelu", "gelu_tanh")
    },
}

_PER_TOKEN = "_C::per_token_group_fp8_quant"
_DUMMIES = (False, False)

QUANTS = {
    _PER_TOKEN: (quant_into(_PER_TOKEN, False, *_DUMMIES), Quantization(128)),
    f"{_PER_TOKEN} column": (
        quant_into(_PER_TOKEN, False, True, False, layout="column"),
        Quantization(128, layout="column"),
    ),
    f"{_PER_TOKEN} tma": (
        quant_into(_PER_TOKEN, False, True, True, layout="column_tma"),
        Quantization(128, layout="column_tma"),
    ),
    f"{_PER_TOKEN} ue8m0": (quant_into(_PER_TOKEN, True, *_DUMMIES), UE8M0),
    f"{_PER_TOKEN} limit": (
        quant_into(_PER_TOKEN, False, *_DUMMIES, limit=224.0),
        Quantization(128, limit=224.0),
    ),
    f"{_PER_TOKEN}_packed": (quant_into(f"{_PER_TOKEN}_packed", layout="ue8m0_packed"), PACKED),
    "vllm::triton_per_token_group_quant_fp8": (
        lambda x: op("vllm::triton_per_token_group_quant_fp8")(x, 128),
        Quantization(128, scale_division="reciprocal"),
    ),
    "vllm::rocm_aiter_group_fp8_quant": (lambda x: op("vllm::rocm_aiter_group_fp8_quant")(x, 128), AITER),
    "lowering::group_quant": (lambda x: op("lowering::group_quant")(x, 128), Quantization(128)),
    "lowering::group_quant packed": (
        lambda x: op("lowering::group_quant")(
            x, 128, scale="ue8m0", scale_floor=1e-10, scale_layout="ue8m0_packed"
        ),
        PACKED,
    ),
    "sgl_kernel::sgl_per_token_group_quant_fp8": (
        quant_into("sgl_kernel::sgl_per_token_group_quant_fp8", False),
        Quantization(128),
    ),
    "sgl_kernel::sgl_per_token_group_quant_8bit": (
        quant_into("sgl_kernel::sgl_per_token_group_quant_8bit", True, layout="ue8m0_packed"),
        PACKED,
    ),
}

_WITH_ADD = "vllm::rocm_aiter_rmsnorm_with_add_fp8_group_quant"
UNROUNDED = Norm(1e-6, "none")

FUSED = {
    "vllm::rocm_aiter_rmsnorm_fp8_group_quant": (
        lambda x, w, r: op("vllm::rocm_aiter_rmsnorm_fp8_group_quant")(x, w, 1e-6, 128),
        [UNROUNDED, AITER],
    ),
    _WITH_ADD: (lambda x, w, r: op(_WITH_ADD)(x, r, w, 1e-6, 128)[::2], [added(UNROUNDED), AITER]),
    "vllm::rocm_aiter_act_mul_and_fp8_group_quant": (
        lambda x, w, r: op("vllm::rocm_aiter_act_mul_and_fp8_group_quant")(x, 128),
        [GatedActivation("silu", "none"), AITER],
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_raised_to_its_contract(name: str) -> None:
    function, contract = NORMS[name]
    assert contracts(function, X, WEIGHT) == [contract]


@pytest.mark.parametrize("name", ADD_NORMS)
def test_a_norm_with_its_residual_is_raised_to_its_contract(name: str) -> None:
    function, contract = ADD_NORMS[name]
    program = raised(exported(function, X, WEIGHT, RESIDUAL))
    norm, returned = operations(program, canonical.NORM, "func.return")
    assert canonical.norm_contract(norm) == contract
    x, weight, residual = torch_ir.block_of(program.main()).arguments
    assert [_through_clones(v) for v in norm.operands] == [x, residual, weight]
    assert [_through_clones(v) for v in returned.operands] == list(norm.results)


def _through_clones(value: ir.Value) -> ir.Value:
    producer = torch_ir.producer(value)
    return value if producer is None or producer.name != "torch.aten.clone" else producer.operands[0]


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_raised_to_its_contract(name: str) -> None:
    function, contract = GATES[name]
    assert contracts(function, randn(5, 2 * HIDDEN)) == [contract]


@pytest.mark.parametrize("name", QUANTS)
def test_a_quantization_is_raised_to_its_contract(name: str) -> None:
    function, contract = QUANTS[name]
    assert contracts(function, X) == [contract]


@pytest.mark.parametrize("name", FUSED)
def test_two_in_one_are_raised_to_both(name: str) -> None:
    function, expected = FUSED[name]
    assert contracts(function, X, WEIGHT, RESIDUAL) == expected


@pytest.mark.parametrize("order", [("q", "sum", "scale"), ("q", "scale", "sum")])
def test_three_results_in_either_order(monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]) -> None:
    """vLLM has returned them in both; the types tell which is which."""
    rows = [row for row in named_ops.NAMED_OPS if row.name == _WITH_ADD]
    fake = foreign._fake(next(row for row in rows if row.results == order))
    library = torch.library.Library("vmfuse_test_foreign", "FRAGMENT")
    name = f"with_add_{'_'.join(order)}"
    library.define(name + rows[0].schema)
    torch.library.register_fake(f"vmfuse_test_foreign::{name}", fake, lib=library)
    named = op(f"vmfuse_test_foreign::{name}")
    # The same rows under the test's name: the real one can be declared once only.
    table = tuple(replace(row, name=f"vmfuse_test_foreign::{name}") for row in rows)
    monkeypatch.setattr(__name__ + ".RECOGNISERS", table)

    program = raised(exported(lambda x, w, r: named(x, r, w, 1e-6, 128), X, WEIGHT, RESIDUAL))
    norm, quant, returned = operations(program, canonical.NORM, canonical.GROUP_QUANT, "func.return")
    assert quant.operands[0] == norm.results[0]
    made = {"q": quant.results[0], "scale": quant.results[1], "sum": norm.results[1]}
    assert list(returned.operands) == [made[role] for role in order]
    library._destroy()


# --- contracts that depend on the tensors --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "weight", "rounding"),
    [
        ("vllm_ir::rms_norm", torch.bfloat16, torch.float32, "once"),
        ("vllm_ir::rms_norm", torch.float32, torch.float32, "once"),
        ("vllm_ir::rms_norm", torch.float16, torch.float16, "twice"),
        ("_C::rms_norm", torch.bfloat16, torch.float32, "once"),
    ],
)
def test_two_roundings_are_one_where_the_dtypes_say_so(
    name: str, dtype: torch.dtype, weight: torch.dtype, rounding: str
) -> None:
    function, _ = NORMS[name]
    (norm,) = contracts(function, X.to(dtype), WEIGHT.to(weight))
    assert norm.rounding == rounding


def test_a_norm_without_weight() -> None:
    function = lambda x: torch.ops.vllm_ir.rms_norm(x, None, 1e-6)  # noqa: E731
    assert contracts(function, X) == [ONCE]


def test_vllm_bounds_fnuz_at_224_and_aiter_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_fp8", torch.float8_e4m3fnuz)
    (vllm,) = contracts(QUANTS["vllm::triton_per_token_group_quant_fp8"][0], X)
    (aiter,) = contracts(QUANTS["vllm::rocm_aiter_group_fp8_quant"][0], X)
    assert (vllm.dtype, vllm.qmax) == ("float8_e4m3fnuz", 224.0)
    assert (aiter.dtype, aiter.qmax) == ("float8_e4m3fnuz", 240.0)


@pytest.mark.parametrize("layout", ["row", "column", "column_tma"])
def test_the_layout_of_scales_of_any_number_of_rows(layout: str) -> None:
    function = quant_into(_PER_TOKEN, False, *_DUMMIES, layout=layout)
    program = exported(function, X, dynamic_shapes=(({0: torch.export.Dim("rows")},),))
    imported = raised(program)
    (quant,) = operations(imported, canonical.GROUP_QUANT)
    assert canonical.quantization(quant).layout == layout


def test_what_the_table_does_not_cover_is_left_alone() -> None:
    """A statistic over part of the row, bounds that are not symmetric: other computations."""
    assert unraised(lambda x, w: torch.ops.vllm_ir.rms_norm(x, w, 1e-6, 64))

    def asymmetric(x: torch.Tensor, w: torch.Tensor) -> Any:
        q, s = torch.empty_like(x, dtype=FP8), scales(x)
        torch.ops._C.per_token_group_fp8_quant(x, q, s, 128, 1e-10, -100.0, 448.0, False, False, False)
        return q, s

    assert unraised(asymmetric)


def unraised(function: Callable[..., Any]) -> bool:
    program = raised(exported(function, X, WEIGHT))
    return not operations(program, *READERS)


# --- declaring -----------------------------------------------------------------------------------------


def test_declaring_twice_declares_once() -> None:
    before = len(foreign._libraries)
    foreign.declare_ops()
    assert len(foreign._libraries) == before


def test_a_registered_operation_is_never_declared_over() -> None:
    assert "lowering::rms_norm" not in {library.ns for library in foreign._libraries}
    torch.ops.lowering.rms_norm(X, WEIGHT, 1e-6)  # still runs


# --- mutation ------------------------------------------------------------------------------------------


def test_the_callers_program_stays_as_it_is() -> None:
    program = torch.export.export(Calls(NORMS["_C::rms_norm"][0]), (X, WEIGHT))
    before = str(program.graph)
    foreign.functionalize(program)
    assert str(program.graph) == before


def test_a_program_without_such_operations_is_only_decomposed() -> None:
    program = torch.export.export(Calls(lambda x: x + 1), (X,))
    assert str(foreign.functionalize(program).graph) == str(program.run_decompositions().graph)


@pytest.mark.parametrize("name", ["_C::rms_norm", "_C::fused_add_rms_norm"])
def test_a_program_that_is_functional_already(name: str) -> None:
    function, contract = {**NORMS, **ADD_NORMS}[name]
    args = (X, WEIGHT, RESIDUAL)[: 2 if name in NORMS else 3]
    program = torch.export.export(Calls(function), args).run_decompositions(importer._decompositions())
    assert "auto_functionalized" in str(program.graph)
    imported = raised(foreign.functionalize(program, importer._decompositions()))
    norms = operations(imported, canonical.NORM)
    assert [canonical.norm_contract(norm) for norm in norms] == [contract]


@pytest.mark.parametrize("layout", ["row", "column"])
def test_scales_of_a_program_that_is_functional_already(layout: str) -> None:
    function = quant_into(_PER_TOKEN, False, *_DUMMIES, layout=layout)
    program = torch.export.export(Calls(function), (X,)).run_decompositions(importer._decompositions())
    imported = raised(foreign.functionalize(program, importer._decompositions()))
    (quant,) = operations(imported, canonical.GROUP_QUANT)
    assert canonical.quantization(quant).layout == layout


@torch.library.custom_op("test_foreign::scribble", mutates_args=("out",))
def scribble(out: torch.Tensor, x: torch.Tensor) -> None:
    out.copy_(x)


@scribble.register_fake
def _(out: torch.Tensor, x: torch.Tensor) -> None: ...


@pytest.mark.parametrize("decomposed", [False, True])
def test_another_operation_that_writes_is_named_with_its_line(decomposed: bool) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        scribble(out, x)
        return out

    program = torch.export.export(Calls(function), (X,))
    program = program.run_decompositions() if decomposed else program
    with pytest.raises(CompileError, match=r"test_foreign\.scribble\S* writes.*\n  .*test_foreign\.py:\d+: "):
        foreign.functionalize(program)


# --- compiled ------------------------------------------------------------------------------------------


def test_what_it_writes_of_the_program_s_arguments_is_written_in_the_caller_s_tensors() -> None:
    def function(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
        return x

    x, residual = (torch.randint(-8, 9, X.shape).to(X.dtype) for _ in range(2))  # squares add up exactly
    total = x + residual
    scale = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + 1e-6)
    expected = (total.float() * scale).to(X.dtype) * WEIGHT
    compiled = lowering.compile(Calls(function), (X, RESIDUAL, WEIGHT))
    assert not compiled.report.unfused
    result = lowering.load(compiled.vmfb)(x, residual, WEIGHT)
    assert torch.equal(residual, total) and torch.equal(x, expected) and torch.equal(result, expected)


def test_one_norm_and_two_quantizations_of_it() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> Any:
        y = torch.empty_like(x)
        torch.ops._C.rms_norm(y, x, weight, 1e-6)
        outputs = []
        for layout in ("row", "column"):
            q, s = torch.empty_like(y, dtype=FP8), scales(y, layout)
            torch.ops._C.per_token_group_fp8_quant(y, q, s, 128, 1e-10, -448.0, 448.0, False, False, False)
            outputs += [q, s]
        return tuple(outputs)

    results = run(exported(function, X, WEIGHT), X, WEIGHT, dispatches=1)
    y = ops.norm_reference(X, None, WEIGHT, TWICE)[0]
    expected = [ops.group_quant_reference(y, Quantization(128, layout=at)) for at in ("row", "column")]
    same(results, [tensor for pair in expected for tensor in pair])
    assert results[3].stride() == (1, 5)


def test_a_residual_that_is_read_later() -> None:
    def function(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        x, residual = x * 2, residual * 2
        torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
        first = x * 1
        torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
        return first, x, residual

    y, total = ops.norm_reference(X * 2, RESIDUAL * 2, WEIGHT, added(TWICE))
    z, last = ops.norm_reference(y, total, WEIGHT, added(TWICE))
    same(run(exported(function, X, RESIDUAL, WEIGHT), X, RESIDUAL, WEIGHT), [y, z, last])


def test_aiters_norm_and_quantization_are_one_dispatch() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return torch.ops.vllm.rocm_aiter_rmsnorm_fp8_group_quant(x, weight, 1e-6, 128)

    results = run(exported(function, X, WEIGHT), X, WEIGHT, dispatches=1)
    y = ops.norm_reference(X, None, WEIGHT, UNROUNDED)[0]
    same(results, ops.group_quant_reference(y, AITER))


def test_aiters_add_norm_and_quantization_are_one_dispatch() -> None:
    def function(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        q, _, scale = op(_WITH_ADD)(x, residual, weight, 1e-6, 128)
        return q, scale

    y, _ = ops.norm_reference(X, RESIDUAL, WEIGHT, added(UNROUNDED))
    results = run(exported(function, X, RESIDUAL, WEIGHT), X, RESIDUAL, WEIGHT, dispatches=1)
    same(results, ops.group_quant_reference(y, AITER))


@pytest.mark.parametrize("layout", ["row", "column_tma"])
def test_any_number_of_rows(layout: str) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> Any:
        y = torch.empty_like(x)
        torch.ops._C.rms_norm(y, x, weight, 1e-6)
        q, s = quant_into(_PER_TOKEN, False, *_DUMMIES, layout=layout)(y)
        return q, s, *torch.ops.vllm.rocm_aiter_rmsnorm_fp8_group_quant(x, weight, 1e-6, 128)

    rows = {0: torch.export.Dim("rows")}
    program = lowering.load(
        lowering.compile(exported(function, X, WEIGHT, dynamic_shapes=((rows, None),))).vmfb
    )
    for count in (1, 5, 8):
        x = randn(count, HIDDEN, seed=count)
        y = ops.norm_reference(x, None, WEIGHT, TWICE)[0]
        unrounded = ops.norm_reference(x, None, WEIGHT, UNROUNDED)[0]
        same(
            program(x, WEIGHT),
            [
                *ops.group_quant_reference(y, Quantization(128, layout=layout)),  # type: ignore[arg-type]
                *ops.group_quant_reference(unrounded, AITER),
            ],
        )


def test_silu_and_mul_into_packed_scales() -> None:
    gate_up = randn(5, 2 * 512)

    def function(x: torch.Tensor) -> Any:
        return quant_into(f"{_PER_TOKEN}_packed", layout="ue8m0_packed")(gate_into("_C::silu_and_mul")(x))

    y = ops.gated_activation_reference(*ops.split_gate_up(gate_up), GatedActivation("silu", "twice"))
    q, scale = run(exported(function, gate_up), gate_up)
    expected_q, expected_scale = ops.group_quant_reference(y, PACKED)
    same([q], [expected_q])
    assert torch.equal(scale, expected_scale)


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "op_name", "reason"),
    [
        (
            lambda x, w: op("vllm_ir::rms_norm")(x, w, 1e-6, 64),
            "rms_norm",
            "vllm_ir::rms_norm: variance_size is 64, not None",
        ),
        (
            lambda x, w: op("aten::rms_norm")(x, [5, HIDDEN], None, 1e-6),
            "rms_norm",
            "aten::rms_norm: normalized_shape is [5, 256]; a kernel norms the last axis alone",
        ),
        (
            lambda x, w: op("vllm_ir::rms_norm")(x, w[:, None].expand(-1, HIDDEN)[0:1], 1e-6),
            "rms_norm",
            "weight is bfloat16[1, 256], not a vector over the last axis of bfloat16[5, 256]",
        ),
    ],
)
def test_a_refused_call_says_which_argument(function: Callable[..., Any], op_name: str, reason: str) -> None:
    imported = importer.import_module(exported(function, X, WEIGHT), (), ir.Context())
    ledger = Ledger()
    with imported.context, ir.Location.unknown():
        normalize(imported.main())
        raising.raise_function(imported.main(), ledger, RECOGNISERS)
    (record,) = ledger.records
    assert record.op == op_name and reason in (record.reason or ""), record.reason


def test_bounds_that_are_not_opposite_are_refused_with_both() -> None:
    def asymmetric(x: torch.Tensor) -> Any:
        q, s = torch.empty_like(x, dtype=FP8), scales(x)
        torch.ops._C.per_token_group_fp8_quant(x, q, s, 128, 1e-10, -100.0, 448.0, True, False, False)
        return q, s

    imported = importer.import_module(exported(asymmetric, X), (), ir.Context())
    ledger = Ledger()
    with imported.context, ir.Location.unknown():
        normalize(imported.main())
        raising.raise_function(imported.main(), ledger, RECOGNISERS)
    (record,) = ledger.records
    assert record.op == "group_quant"
    assert "fp8_min is -100.0 and the upper bound 448.0: they must be opposite" in (record.reason or "")
