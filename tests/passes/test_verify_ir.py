"""The IR is checked after every step, and a step that breaks it is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from iree.compiler import ir

from lowering.families.registry import families
from lowering.passes.verify import InvalidIR, verify
from lowering.steps import Step
from patterns import canonical, torch_ir
from patterns.attention import AttentionSpec
from patterns.contracts import (
    BlockScaledMatmul,
    GatedActivation,
    GroupedTopk,
    LinearSpec,
    MatmulSpec,
    Norm,
    Quantization,
    RowSpec,
    SelectionSpec,
    TopkSpec,
)
from patterns.packed_matmul import PackedMatmul, PackedSpec
from patterns.torch_ir import TensorType

X = TensorType((None, 256), "bfloat16")
CODES = TensorType((None, 256), "float8_e4m3fn")
SCALES = TensorType((None, 2), "float32")
WIDE = TensorType((None, 512), "bfloat16")
VECTOR = TensorType((256,), "bfloat16")
EXPERTS, BIAS = TensorType((None, 64), "float32"), TensorType((64,), "float32")
CHOSEN, IDS = TensorType((None, 8), "float32"), TensorType((None, 8), "int32")
WEIGHT, BLOCKS = TensorType((128, 256), "float8_e4m3fn"), TensorType((1, 2), "float32")
OUT = TensorType((None, 128), "bfloat16")
BYTES = TensorType((128, 128), "uint8")
GROUPS, ZEROS = TensorType((128, 2), "float16"), TensorType((128, 2), "uint8")
ROUTING = GroupedTopk(8, 8, 4)

# What is valid: name, what it carries, operands, results.
VALID = {
    "vmfuse.norm": (Norm(1e-6, residual="exact"), [X, X, VECTOR], [X, X]),
    "vmfuse.gated_activation": (GatedActivation("silu"), [WIDE], [X]),
    "vmfuse.group_quant": (Quantization(128), [X], [CODES, SCALES]),
    "vmfuse.block_scaled_matmul": (BlockScaledMatmul(), [CODES, WEIGHT, SCALES, BLOCKS], [OUT]),
    "vmfuse.grouped_topk": (ROUTING, [EXPERTS, BIAS], [CHOSEN, IDS]),
    "vmfuse.row": (
        RowSpec(256, "bfloat16", Norm(1e-6), weight_dtype="bfloat16", quantizations=(Quantization(128),)),
        [X, VECTOR],
        [CODES, SCALES],
    ),
    "vmfuse.topk": (TopkSpec(64, "float32", "float32", ROUTING), [EXPERTS, BIAS], [CHOSEN, IDS]),
    "vmfuse.matmul": (
        MatmulSpec(128, 256, 128, "float8_e4m3fn", "float8_e4m3fn", "bfloat16"),
        [CODES, WEIGHT, SCALES, BLOCKS],
        [OUT],
    ),
    "vmfuse.linear": (
        LinearSpec(128, 256, "bfloat16"),
        [X, TensorType((128, 256), "bfloat16")],
        [OUT],
    ),
    "vmfuse.packed_matmul": (PackedMatmul(4, zeros=True), [X, BYTES, GROUPS, ZEROS], [OUT]),
    "vmfuse.packed": (
        PackedSpec(128, 256, 128, 4, "bfloat16", "float16", zeros=True),
        [X, BYTES, TensorType((2, 128), "float16"), TensorType((2, 128), "uint8")],
        [OUT],
    ),
    "vmfuse.selection": (
        SelectionSpec(64, 8, "float32", True, True),
        [EXPERTS],
        [CHOSEN, TensorType((None, 8), "int64")],
    ),
    "vmfuse.attention": (
        AttentionSpec(1, 2, 1, 1, 128, 32, 16, "bfloat16", 0.25, mask=(1, 1, 1)),
        [
            TensorType((2, 32), "bfloat16"),
            TensorType((128, 32), "bfloat16"),
            TensorType((128, 16), "bfloat16"),
            TensorType((1, 128), "float32"),
        ],
        [TensorType((2, 2 * 18), "float32")],
    ),
}
OF_KERNELS = {
    f"vmfuse.{name}" for name in ("row", "topk", "matmul", "linear", "packed", "selection", "attention")
}

Made = tuple[object, list[TensorType], list[TensorType]]


def of_another(name: str, made: Made) -> Made:
    """What another operation carries, which this one cannot be read as."""
    other = GroupedTopk(8, 8, 4) if name != "vmfuse.grouped_topk" else Quantization(128)
    return (other, made[1], made[2])


BROKEN: dict[str, Callable[[str, Made], Made]] = {
    "a result too few": lambda name, made: (made[0], made[1], made[2][:-1]),
    "an operand too many": lambda name, made: (made[0], [*made[1], EXPERTS, EXPERTS], made[2]),
    "a result of another dtype": lambda name, made: (
        made[0],
        made[1],
        [TensorType(made[2][0].shape, "float64"), *made[2][1:]],
    ),
    "another's contract": of_another,
}


def module_of(name: str, made: Made) -> ir.Module:
    """A function that holds the operation alone."""
    value, operands, results = made
    attributes = {"spec" if name in OF_KERNELS else "contract": canonical.to_attribute(value)}
    if name in OF_KERNELS:
        attributes[canonical.SITES] = ir.ArrayAttr.get([])
    module = ir.Module.create()
    with ir.InsertionPoint(module.body):
        from iree.compiler.dialects import func

        function = func.FuncOp("main", ir.FunctionType.get([type_.torch() for type_ in operands], []))
        entry = function.add_entry_block()
    with ir.InsertionPoint(entry), ir.Location.file("model.py", 7, 1):
        canonical.create(name, list(entry.arguments), results, **attributes)
        func.ReturnOp([])
    return module


def test_every_operation_of_a_family_is_here() -> None:
    declared = {operation.name for family in families() for operation in family.patterns.operations}
    assert declared == set(VALID)


@pytest.mark.parametrize("name", VALID)
def test_what_is_valid_passes(name: str) -> None:
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        verify(module_of(name, VALID[name]), "raise")


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", VALID)
def test_each_operation_broken_once_names_the_step_and_the_line(name: str, how: str) -> None:
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        module = module_of(name, BROKEN[how](name, VALID[name]))
        with pytest.raises(InvalidIR, match=rf"the step sink left a {name} that is invalid: .*model\.py:7"):
            verify(module, "sink")


def test_a_step_that_leaves_a_layout_that_does_not_fit_is_named_by_the_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    import lowering
    from lowering import compiler

    class Quantized(torch.nn.Module):
        def forward(self, x):
            return torch.ops.lowering.group_quant(x, 128)

    def spoil(state) -> None:
        """Say that the scales are packed, and leave them as they are."""
        for op in torch_ir.block_of(state.function).operations:
            if torch_ir.op_name(op.operation) == "vmfuse.group_quant":
                packed = Quantization(128, scale="ue8m0", layout="ue8m0_packed")
                op.operation.attributes["contract"] = canonical.to_attribute(packed)

    at = [step.name for step in compiler.FUSING].index("raise") + 1
    steps = (*compiler.FUSING[:at], Step("spoil", spoil), *compiler.FUSING[at:])
    monkeypatch.setattr(compiler, "FUSING", steps)
    with pytest.raises(InvalidIR, match=rf"the step spoil left a vmfuse.group_quant .*{Path(__file__).name}"):
        lowering.compile(Quantized(), (torch.ones(2, 256),))


def test_what_mlir_rejects_names_the_step() -> None:
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse("func.func @main(%x: i32) -> i32 { return %x : i32 }")
        function = module.body.operations[0].operation
        function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get([], []))
        with pytest.raises(InvalidIR, match="the step fuse left IR that MLIR's verifier rejects"):
            verify(module, "fuse")
