"""Raise the block-scaled product, by every name it has, to ``vmfuse.block_scaled_matmul``, with its bias.

A bias is taken in with the rounding that the model gives it: once, after a float32 addition, or of the
product and of the sum, as ``lowering.nn`` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir, views
from .contracts import BlockScaledMatmul
from .named_call import Arg, NamedOp
from .operation import Operation
from .recogniser import Raised
from .well_typed import why_no_product

OPERATION = Operation(canonical.BLOCK_SCALED_MATMUL, BlockScaledMatmul, why_no_product)

_CAST = "torch.prims.convert_element_type"
_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")
_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class NamedProduct(NamedOp):
    """One row: ``name`` with its ``schema`` stands for a block-scaled product; ``x`` holds a.

    b, a_scale, b_scale, bias
        Names of the arguments that hold them; the scales are float32, or it is another operation.
    block
        The argument that lists the sizes of a block of b, which the scales' shapes give as well.
    out_dtype
        The argument that holds the result's dtype.
    b_layout
        The layout of b, as a value or as the argument that gives it.
    by_bytes
        The library reads the scales of a as if they were in columns, whatever the strides of their tensor:
        a contiguous [M, Gn] holds the bytes of [Gn, M].  A program has no strides, so that is written out
        when a model is imported (``lowering.foreign``).
    transposed
        b and its scales are given as [K, N], which must be views of [N, K]: ``weight.T`` in the model.
    """

    b: str = "b"
    a_scale: str = "a_scale"
    b_scale: str = "b_scale"
    bias: str | None = None
    block: str | None = None
    out_dtype: str | None = None
    b_layout: str | Arg = "row"
    by_bytes: bool = False
    transposed: bool = False
    results: tuple[str, ...] = field(default=("y",))  # pyright: ignore[reportIncompatibleVariableOverride]

    def shapes(self, given: Mapping[str, Any], fp8: str) -> dict[str, tuple[tuple[Any, ...], Any]]:
        shape = (*given[self.x].shape[:-1], given[self.b].shape[1 if self.transposed else 0])
        default = "bfloat16" if "bfloat16" in self.schema else "float16"  # the schema's
        return {"y": (shape, given.get(self.out_dtype or "", default))}

    def recognise(self, op: ir.Operation) -> Raised | None:
        # MLIR written by hand may leave out what the schema has a value for.
        names = self.arguments[: max(len(op.operands), self.required)]
        if len(op.operands) != len(names) or len(op.results) != 1:
            return None
        given = dict(zip(names, op.operands, strict=True))
        values = {name: torch_ir.constant(operand) for name, operand in given.items()}
        layout: Any = self.b_layout
        if isinstance(layout, Arg):
            layout = values.get(layout.name, "row")
        b, b_scale = self._in_rows(given[self.b]), self._in_rows(given[self.b_scale])
        if b is None or b_scale is None:
            return None
        operands = [given[self.x], b, given[self.a_scale], b_scale]
        if self.bias in given and values[self.bias] is not None:
            operands.append(given[self.bias])
        # An argument that is left out has its default, which is what a row requires.
        required = all(values.get(name, value) == value for name, value in self.requires.items())
        if layout is torch_ir.NOT_CONSTANT or not (required and self._fits(operands, values)):
            return None
        return Raised(canonical.BLOCK_SCALED_MATMUL, BlockScaledMatmul(layout), operands, list(op.results))

    def why_not(self, op: ir.Operation) -> str | None:
        if self.recognise(op) is not None:
            return None
        given = dict(zip(self.arguments, op.operands, strict=False))
        if any(self._in_rows(given[name]) is None for name in (self.b, self.b_scale) if name in given):
            return (
                f"its {self.b} and {self.b_scale} are no transposed views, and the product reads rows of a "
                "weight [N, K]: keep both so and pass .T of them"
            )
        for name, value in self.requires.items():
            if name in given and torch_ir.constant(given[name]) != value:
                return f"its {name} must be {value}"
        blocks = f", of the blocks that its {self.block} says" if self.block else ""
        return f"it takes 8-bit codes with float32 scales that divide their rows{blocks}; these are others"

    def _in_rows(self, b: ir.Value) -> ir.Value | None:
        """``b`` or its scales as [N, K]; None where they are no view of that."""
        return views.transposed(b) if self.transposed else b

    def _fits(self, operands: list[ir.Value], values: dict[str, object]) -> bool:
        """Tell whether the operands are a product's, and its block the one that their shapes give."""
        a, b, a_scale, b_scale = (torch_ir.tensor_type(value) for value in operands[:4])
        if a is None or b is None or a_scale is None or b_scale is None or not (a.shape and a_scale.shape):
            return False
        codes = (a.dtype in _FLOAT8 and b.dtype in _FLOAT8) or a.dtype == b.dtype == "int8"
        scales = a_scale.dtype == b_scale.dtype == "float32"
        depth, groups = a.shape[-1], a_scale.shape[-1]
        if not (codes and scales and depth and groups and depth % groups == 0):
            return False
        return self.block is None or values[self.block] == [depth // groups] * 2


def _vllm_aiter(name: str) -> NamedProduct:
    """AITER's products of weights in rows, as vLLM registers them."""
    return NamedProduct(
        name,
        "(Tensor A, Tensor B, Tensor As, Tensor Bs, ScalarType output_dtype=float16) -> Tensor",
        x="A",
        b="B",
        a_scale="As",
        b_scale="Bs",
        out_dtype="output_dtype",
    )


# How sure a row is: see patterns/named_ops.py.
NAMED_OPS = (
    NamedProduct(  # read: it is this project's own
        "lowering::block_scaled_matmul",
        "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, Tensor? bias=None, *, "
        "str b_layout='row') -> Tensor",
        x="a",
        bias="bias",
        out_dtype="out_dtype",
        b_layout=Arg("b_layout"),
    ),
    # Schemas read; arithmetic numerics.
    _vllm_aiter("vllm::rocm_aiter_gemm_a8w8_blockscale"),
    _vllm_aiter("vllm::rocm_aiter_triton_gemm_a8w8_blockscale"),
    NamedProduct(
        "aiter::gemm_a8w8_blockscale",
        "(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, ScalarType dtype=bfloat16, "
        "bool isBpreshuffled=False) -> Tensor",
        x="XQ",
        b="WQ",
        a_scale="x_scale",
        b_scale="w_scale",
        out_dtype="dtype",
        requires={"isBpreshuffled": False},
    ),
    NamedProduct(
        "aiter::gemm_a8w8_blockscale_bpreshuffle",
        "(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, ScalarType dtype=bfloat16) -> Tensor",
        x="XQ",
        b="WQ",
        a_scale="x_scale",
        b_scale="w_scale",
        out_dtype="dtype",
        b_layout="shuffled_16x16",
        by_bytes=True,
    ),
    NamedProduct(
        "vllm::w8a8_triton_block_scaled_mm_func",
        "(Tensor qx, Tensor weight, Tensor x_scale, Tensor weight_scale, SymInt[] block_size, "
        "ScalarType output_dtype) -> Tensor",
        x="qx",
        b="weight",
        a_scale="x_scale",
        b_scale="weight_scale",
        block="block_size",
        out_dtype="output_dtype",
    ),
    NamedProduct(  # scales of tokens and of channels; a bias is refused there
        "aiter::gemm_a8w8_bpreshuffle",
        "(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor? bias=None, "
        "ScalarType dtype=bfloat16, bool check=False) -> Tensor",
        x="XQ",
        b="WQ",
        a_scale="x_scale",
        b_scale="w_scale",
        out_dtype="dtype",
        b_layout="shuffled_16x16",
        requires={"bias": None},
    ),
    NamedProduct(  # as it is called: of weight.T and weight_scale.T
        "sgl_kernel::fp8_blockwise_scaled_mm",
        "(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, ScalarType out_dtype) -> Tensor",
        x="mat_a",
        b="mat_b",
        a_scale="scales_a",
        b_scale="scales_b",
        out_dtype="out_dtype",
        transposed=True,
    ),
    NamedProduct(  # with float32 scales
        "sglang::deep_gemm_fp8_fp8_bf16_nt",
        "(Tensor A, Tensor As, Tensor B, Tensor Bs, Tensor! C) -> ()",
        x="A",
        b="B",
        a_scale="As",
        b_scale="Bs",
    ),
    NamedProduct(  # with float32 scales; packed ones are another dtype
        "vllm::fp8_gemm_nt_op",
        "(Tensor q_input, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor! output, "
        "bool use_deep_gemm_e8m0) -> ()",
        x="q_input",
        b="weight",
        a_scale="input_scale",
        b_scale="weight_scale",
    ),
)

_ROWS = {root: row for row in NAMED_OPS for root in row.roots}


class RoundedProduct:
    """A float32 product, then a float32 bias, then a rounding to 16 bits: one product, rounded once.

    Either of the two may be missing.  The bias is one of the dtype that is written, widened for the sum.
    """

    roots = ("torch.aten.add.Tensor", _CAST)

    def recognise(self, op: ir.Operation) -> Raised | None:
        out = torch_ir.tensor_type(op.results[0])
        rounds = op.name == _CAST
        if out is None or out.dtype not in (_NARROW if rounds else ("float32",)):
            return None
        source = torch_ir.producer(op.operands[0]) if rounds else op
        bias = None
        if source is not None and source.name == "torch.aten.add.Tensor":
            source, bias = _biased(source, out.dtype)
            if bias is None:
                return None
        product = _ROWS[torch_ir.op_name(source)].recognise(source) if _is_product(source) else None
        if source is None or product is None or len(product.operands) != 4 or read_besides(op, source):
            return None
        operands = [*product.operands, bias] if bias is not None else product.operands
        return Raised(product.op, product.contract, operands, [op.result])


class BiasedProduct:
    """A product that is rounded to 16 bits, then a bias of that dtype: both are rounded, by one kernel."""

    roots = ("torch.aten.add.Tensor",)

    def recognise(self, op: ir.Operation) -> Raised | None:
        out = torch_ir.tensor_type(op.results[0])
        if out is None or out.dtype not in _NARROW or torch_ir.constant(op.operands[2]) != 1:
            return None
        for first, second in ((0, 1), (1, 0)):
            source, bias = torch_ir.producer(op.operands[first]), op.operands[second]
            if source is None or torch_ir.tensor_type(bias) != torch_ir.TensorType(out.shape[-1:], out.dtype):
                continue
            if torch_ir.op_name(source) not in _ROWS or torch_ir.tensor_type(source.results[0]) != out:
                continue
            product = _ROWS[torch_ir.op_name(source)].recognise(source)
            if product is None or len(product.operands) != 4 or read_besides(op, source):
                continue
            assert isinstance(product.contract, BlockScaledMatmul)
            contract = replace(product.contract, bias_rounding="twice")
            return Raised(product.op, contract, [*product.operands, bias], [op.result])
        return None


def _is_product(op: ir.Operation | None) -> bool:
    return op is not None and torch_ir.op_name(op) in _ROWS and torch_ir.dtype_of(op.results[0]) == "float32"


def _biased(add: ir.Operation, dtype: str) -> tuple[ir.Operation | None, ir.Value | None]:
    """The product and the bias of ``dtype`` that ``add`` adds; (None, None) if it adds something else."""
    if torch_ir.constant(add.operands[2]) != 1 or torch_ir.dtype_of(add.result) != "float32":
        return None, None
    for first, second in ((0, 1), (1, 0)):
        source, bias = torch_ir.producer(add.operands[first]), torch_ir.widened_from(add.operands[second])
        out, vector = torch_ir.tensor_type(add.result), torch_ir.tensor_type(bias)
        if _is_product(source) and out is not None and vector is not None:
            same = torch_ir.tensor_type(add.operands[first]) == out
            if same and vector == torch_ir.TensorType(out.shape[-1:], dtype):
                return source, bias
    return None, None


def read_besides(end: ir.Operation, product: ir.Operation) -> bool:
    """Tell whether something reads a value between ``product`` and ``end``, which would be computed twice."""
    op = product
    while op != end:
        users = torch_ir.users(op.results[0])
        if len(users) != 1:
            return True
        op = users[0]
    return False


RECOGNISERS = (RoundedProduct(), BiasedProduct(), *NAMED_OPS)
