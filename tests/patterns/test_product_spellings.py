"""The block-scaled product by other libraries' names, and with a bias and a rounding written behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from iree.compiler import ir
from torch import Tensor

import lowering
from lowering.errors import CompileError
from lowering.importing import foreign
from patterns import block_scaled_matmul, canonical, torch_ir
from patterns.contracts import MatmulSpec
from tests.gfx950.test_hip_programs import run as run_emulated
from tests.importing.test_foreign import Calls, exported, op, operations, raised

foreign.declare_ops()

LOW = torch.ops.lowering
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(5, 256, generator=GENERATOR)
A, A_SCALE = LOW.group_quant(X, 128)
B = torch.randn(192, 256, generator=GENERATOR).to(torch.float8_e4m3fn)
B_SCALE = torch.rand(2, 2, generator=GENERATOR) + 0.5
BIAS = torch.randn(192, generator=GENERATOR) * 4
OPERANDS = (A, B, A_SCALE, B_SCALE)


def deep_gemm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    torch.ops.vllm.fp8_gemm_nt_op(a, a_scale, b, b_scale, out, False)
    return out


def sglang_deep_gemm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    torch.ops.sglang.deep_gemm_fp8_fp8_bf16_nt(a, a_scale, b, b_scale, out)
    return out


NAMED: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
    "lowering::block_scaled_matmul": (
        lambda a, b, s, t: LOW.block_scaled_matmul(a, b, s, t, torch.float16),
        torch.float16,
    ),
    "vllm::w8a8_triton_block_scaled_mm_func": (
        lambda a, b, s, t: op("vllm::w8a8_triton_block_scaled_mm_func")(
            a, b, s, t, [128, 128], torch.bfloat16
        ),
        torch.bfloat16,
    ),
    "vllm::rocm_aiter_gemm_a8w8_blockscale": (
        lambda a, b, s, t: op("vllm::rocm_aiter_gemm_a8w8_blockscale")(a, b, s, t, torch.bfloat16),
        torch.bfloat16,
    ),
    "vllm::rocm_aiter_triton_gemm_a8w8_blockscale": (
        op("vllm::rocm_aiter_triton_gemm_a8w8_blockscale"),
        torch.float16,
    ),
    "vllm::fp8_gemm_nt_op": (deep_gemm, torch.bfloat16),
    "sgl_kernel::fp8_blockwise_scaled_mm": (
        lambda a, b, s, t: op("sgl_kernel::fp8_blockwise_scaled_mm")(a, b.T, s, t.T, torch.float16),
        torch.float16,
    ),
    "sglang::deep_gemm_fp8_fp8_bf16_nt": (sglang_deep_gemm, torch.bfloat16),
    "aiter::gemm_a8w8_blockscale": (op("aiter::gemm_a8w8_blockscale"), torch.bfloat16),
}
SHUFFLED = "aiter::gemm_a8w8_blockscale_bpreshuffle"
OF_TOKENS = "aiter::gemm_a8w8_bpreshuffle"


def products(function: Callable[..., Any], *args: Tensor) -> list[ir.Operation]:
    """The products that ``function`` is raised to."""
    program = raised(exported(function, *args))
    found = operations(program, canonical.BLOCK_SCALED_MATMUL)
    _KEEP.append(program)  # operations live as long as their module
    return found


_KEEP: list[Any] = []


def test_every_row_has_a_test() -> None:
    assert {*NAMED, SHUFFLED, OF_TOKENS} == {row.name for row in block_scaled_matmul.NAMED_OPS}


@pytest.mark.parametrize("name", NAMED)
def test_a_product_is_known_by_its_name(name: str) -> None:
    """It is raised with its operands in our order, and what is compiled computes our operation's numbers."""
    function, dtype = NAMED[name]
    (found,) = products(function, *OPERANDS)
    assert [ir.BlockArgument(value).arg_number for value in found.operands] == [0, 1, 2, 3]
    compiled = lowering.compile(Calls(function), OPERANDS)
    assert [launch.kernel.source for launch in compiled.dispatched.launches] == ["matmul.c"]
    expected = LOW.block_scaled_matmul(*OPERANDS, dtype)
    torch.testing.assert_close(lowering.load(compiled.vmfb)(*OPERANDS), expected, rtol=2**-7, atol=2**-7)


def test_a_weight_that_aiter_has_shuffled_is_not_taken_for_rows() -> None:
    assert not products(
        lambda *args: op("aiter::gemm_a8w8_blockscale")(*args, torch.bfloat16, True), *OPERANDS
    )


def test_sglang_s_product_of_what_is_no_transposed_view_is_refused() -> None:
    """A weight that is stored as [K, N], and its scales; of a square one nothing else tells which it is."""
    square = (A, B[:128, :128].contiguous(), A_SCALE, B_SCALE)
    for weight in (square, (A, B.t().contiguous(), A_SCALE, B_SCALE)):
        call = Calls(lambda *args: op("sgl_kernel::fp8_blockwise_scaled_mm")(*args, torch.float16))
        with pytest.raises(CompileError, match=r"no transposed views.*pass \.T of them"):
            lowering.compile(call, weight)


def test_aiter_s_product_of_tokens_and_channels_has_no_bias() -> None:
    call = Calls(lambda *given: op(OF_TOKENS)(*given, bias=BIAS.bfloat16()))
    with pytest.raises(CompileError, match=f"{OF_TOKENS} cannot be compiled: its bias must be None"):
        lowering.compile(call, (A, B, A_SCALE[:, :1], torch.ones(192, 1)))


@pytest.mark.parametrize("layout", ["row", "column"])
def test_aiter_s_preshuffled_product_reads_bytes(layout: str) -> None:
    """A weight in its (16, 16) layout, and scales in columns: as strides say it, or as bytes behind rows."""

    def function(a: Tensor, b: Tensor, s: Tensor, t: Tensor) -> Tensor:
        if layout == "column":
            s = LOW.group_quant(s, 128, scale_layout="column")[1]
        return op(SHUFFLED)(a, b, s, t)

    (found,) = products(function, A, B, X if layout == "column" else A_SCALE, B_SCALE)
    assert canonical.product_contract(found).b_layout == "shuffled_16x16"
    assert torch_ir.dtype_of(found.results[0]) == "bfloat16"
    made = torch_ir.producer(found.operands[2])
    assert made is not None
    assert torch_ir.op_name(made) == ("torch.aten.permute" if layout == "row" else canonical.GROUP_QUANT)


def test_aiter_s_preshuffled_products_in_the_executor(tmp_path: Path) -> None:
    """The numbers of our own products: with scales whose bytes were transposed behind the shape of rows, and
    with one scale for each row of a and of the weight."""
    row, row_scale = LOW.group_quant(X, 0)
    channels = torch.rand(192, 1, generator=GENERATOR) + 0.5

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", LOW.shuffle_weight(B, "shuffled_16x16"))
            self.register_buffer("b_scale", B_SCALE)
            self.register_buffer("channels", channels)

        def forward(self, a: Tensor, a_scale: Tensor, row: Tensor, row_scale: Tensor) -> Any:
            blocks = op(SHUFFLED)(a, self.b, a_scale, self.b_scale)
            return blocks, op(OF_TOKENS)(row, self.b, row_scale, self.channels, dtype=torch.float16)

    args = (A, A_SCALE.t().contiguous().view(A_SCALE.shape), row, row_scale)
    rows = torch.export.Dim("rows")
    shapes = tuple({0: rows} for _ in args)
    compiled = lowering.compile(
        Layer(), args, dynamic_shapes=shapes, target="gfx950", dump_phases_to=tmp_path
    )
    specs = [launch.kernel.spec for launch in compiled.dispatched.launches]
    said = [(s.b_layout, s.a_scale_layout, s.whole) for s in specs if isinstance(s, MatmulSpec)]
    assert said == [("shuffled_16x16", "column", False), ("shuffled_16x16", "row", True)]
    assert "linalg." not in (tmp_path / "9-linalg.mlir").read_text()
    compiled.save(tmp_path / "product.vmfb")
    ((blocks, tokens),) = run_emulated(tmp_path / "product.vmfb", [args])
    expected = LOW.block_scaled_matmul(*OPERANDS, torch.bfloat16)
    torch.testing.assert_close(blocks, expected, rtol=2**-7, atol=2**-7)
    expected = LOW.block_scaled_matmul(row, B, row_scale, channels, torch.float16)
    torch.testing.assert_close(tokens, expected, rtol=2**-10, atol=2**-10)


def test_a_block_of_another_size_is_not_a_product_of_these_scales() -> None:
    def function(*t: Tensor) -> Tensor:
        return op("vllm::w8a8_triton_block_scaled_mm_func")(*t, [64, 128], torch.float16)

    assert not products(function, *OPERANDS)


def test_packed_scales_are_another_operation() -> None:
    assert not products(
        deep_gemm, A, B, torch.zeros(5, 1, dtype=torch.int32), torch.zeros(192, 1, dtype=torch.int32)
    )
    with pytest.raises(CompileError, match=r"fp8_gemm_nt_op cannot be compiled: .* float32 scales"):
        packed = A, B, torch.zeros(5, 1, dtype=torch.int32), torch.zeros(192, 1, dtype=torch.int32)
        lowering.compile(Calls(deep_gemm), packed)


# -- torch._int_mm, scaled -----------------------------------------------------------------------------

INT_A, INT_W = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, 128), (48, 128)))
TOKENS, CHANNELS = torch.rand(32, 1), torch.rand(48)
INTEGERS = {
    "float32": (lambda a, w, s, c: torch._int_mm(a, w.t()) * s * c, 1),
    "bfloat16": (lambda a, w, s, c: (c.view(1, -1) * (s * torch._int_mm(a, w.t()))).bfloat16(), 1),
    "channels first": (lambda a, w, s, c: torch._int_mm(a, w.t()) * c * s, 0),
    "rounded in between": (lambda a, w, s, c: (torch._int_mm(a, w.t()) * s).half() * c, 0),
    "read too": (lambda a, w, s, c: ((y := torch._int_mm(a, w.t())) * s * c, y), 0),
    "an odd sum": (lambda a, w, s, c: torch._int_mm(a, w.t()) * s[0] * c, 0),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_a_scaled_product_of_integers(name: str) -> None:
    """Equal to eager PyTorch bit for bit, by the kernel where the order of the scales is the kernel's."""
    function, count = INTEGERS[name]
    args = (INT_A, INT_W, TOKENS, CHANNELS)
    compiled = lowering.compile(Calls(function), args)
    assert [launch.kernel.source for launch in compiled.dispatched.launches] == ["matmul.c"] * count
    found, expected = lowering.load(compiled.vmfb)(*args), function(*args)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=True):
        assert torch.equal(a, b)


# -- a bias and a rounding behind the product ---------------------------------------------------------


def wide(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return LOW.block_scaled_matmul(a, b, a_scale, b_scale, torch.float32)


BIAS16 = BIAS.bfloat16()
WRITTEN = {
    "bias": (lambda *t: wide(*t[:4]) + t[4], BIAS),
    "bias first": (lambda *t: t[4] + wide(*t[:4]), BIAS),
    "rounding": (lambda *t: wide(*t[:4]).bfloat16(), None),
    "bias of 16 bits, rounding": (lambda *t: (wide(*t[:4]) + t[4]).bfloat16(), BIAS16),
    "bias widened, rounding": (lambda *t: (wide(*t[:4]) + t[4].float()).bfloat16(), BIAS16),
    "rounding, bias": (lambda *t: LOW.block_scaled_matmul(*t[:4], torch.bfloat16) + t[4], BIAS16),
    "bias first, rounding to float16": (lambda *t: (t[4] + wide(*t[:4])).half(), BIAS.half()),
}
# Other roundings, or values that somebody else needs.
KEPT = {
    "rounded, a float32 bias": (
        lambda *t: LOW.block_scaled_matmul(*t[:4], torch.bfloat16) + t[4],
        BIAS,
        0,
    ),
    "a float32 bias, rounding": (lambda *t: (wide(*t[:4]) + t[4]).bfloat16(), BIAS, 1),
    "twice the bias": (lambda *t: torch.add(wide(*t[:4]), t[4], alpha=2), BIAS, 0),
    "a bias for each row": (lambda *t: wide(*t[:4]) + t[4], torch.ones(5, 192), 0),
    "one number": (lambda *t: wide(*t[:4]) + t[4], torch.ones(1), 0),
    "the product is read too": (lambda *t: ((y := wide(*t[:4])) + t[4], y), BIAS, 0),
    "the sum is read too": (lambda *t: ((y := wide(*t[:4]) + t[4]).bfloat16(), y), BIAS16, 0),
    "two biases": (lambda *t: wide(*t[:4]) + t[4] + t[4], BIAS, 1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_bias_and_its_roundings_are_one_product(name: str) -> None:
    function, bias = WRITTEN[name]
    args = OPERANDS if bias is None else (*OPERANDS, bias)
    (found,) = products(function, *args)
    assert len(found.operands) == len(args) and torch_ir.users(found.results[0])[0].name == "func.return"
    expected = function(*args)
    assert torch_ir.dtype_of(found.results[0]) == str(expected.dtype).removeprefix("torch.")
    compiled = lowering.compile(Calls(function), args)
    assert [launch.kernel.source for launch in compiled.dispatched.launches] == ["matmul.c"]
    result = lowering.load(compiled.vmfb)(*args)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[expected.dtype]
    torch.testing.assert_close(result, expected, rtol=rtol, atol=1e-3)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_stays_as_it_was_written(name: str) -> None:
    """The product has as many biases as the case says, and what cannot be taken in follows it."""
    function, bias, biased = KEPT[name]
    found = products(function, *OPERANDS, bias)
    assert len(found) == 1 and len(found[0].operands) == 4 + biased
    assert any(user.name != "func.return" for user in torch_ir.users(found[0].results[0]))
    expected = function(*OPERANDS, bias)
    compiled = lowering.load(lowering.compile(Calls(function), (*OPERANDS, bias)).vmfb)
    result = compiled(*OPERANDS, bias)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


# -- torch._scaled_mm -----------------------------------------------------------------------------------

ROW_SCALE = torch.rand(5, 1, generator=GENERATOR) * 0.01
CHANNEL_SCALE = torch.rand(192, 1, generator=GENERATOR) * 0.01
OF_TENSORS = (torch.tensor(0.01), torch.tensor(0.02))


def scaled_mm(a: Tensor, b: Tensor, *others: Any, **options: Any) -> Tensor:
    return torch._scaled_mm(a, b.t(), *others, **options)


@pytest.mark.parametrize("bias", [None, BIAS.bfloat16()], ids=["", "bias"])
@pytest.mark.parametrize("scales", [(ROW_SCALE, CHANNEL_SCALE.t()), OF_TENSORS], ids=["rows", "tensors"])
def test_scaled_mm_is_a_product(scales: tuple[Tensor, Tensor], bias: Tensor | None) -> None:
    """Of scales of rows and columns, and of whole tensors, with eager PyTorch's results."""

    def function(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *bias: Tensor) -> Tensor:
        return scaled_mm(a, b, a_scale, b_scale, *bias, out_dtype=torch.bfloat16)

    a = X.to(torch.float8_e4m3fn)
    tensors = (a, B, *scales, *([bias] if bias is not None else []))
    assert len(products(function, *tensors)) == 1
    program = lowering.load(lowering.compile(Calls(function), tensors).vmfb)
    # Both accumulate in float32; a rounding to bfloat16 may go the other way.
    torch.testing.assert_close(program(*tensors), function(*tensors), rtol=2**-7, atol=1e-4)


def test_one_row_has_a_scale_of_its_own_whatever_the_shape_says() -> None:
    a, scale = X[:1].to(torch.float8_e4m3fn), torch.tensor([[0.5]])
    rows = {0: torch.export.Dim("T")}
    model = Calls(lambda a, b, s, t: scaled_mm(a, b, s, t, out_dtype=torch.float32))
    compiled = lowering.compile(
        model,
        (X.to(a.dtype), B, ROW_SCALE, CHANNEL_SCALE.t()),
        dynamic_shapes=((rows, None, rows, None),),
    )
    found = lowering.load(compiled.vmfb)(a, B, scale, CHANNEL_SCALE.t())
    torch.testing.assert_close(found, model(a, B, scale, CHANNEL_SCALE.t()), rtol=1e-5, atol=1e-6)
