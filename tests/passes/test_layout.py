"""The layout step: which kernel a product gets, how its weight and its scales lie, and what is refused.

What a target's kernel reads is a value here, ``Reads``; so each case says which layouts there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from iree.compiler import ir
from torch import Tensor, nn

import lowering
from lowering.errors import CompileError
from lowering.families import registry
from lowering.families.registry import supported
from lowering.importing.importer import Program, import_module
from lowering.passes import lay_out as step
from lowering.passes.fold import fold
from lowering.passes.fuse import fuse
from lowering.passes.normalize import normalize
from lowering.passes.raise_ops import raise_function
from lowering.passes.sink_views import sink_views
from lowering.targets import resolve
from lowering.weights.recipes import Recipe
from patterns import canonical, torch_ir, weight_layouts
from patterns.contracts import MatmulSpec, Quantization, RowSpec, Spec
from patterns.matmul_fusion import Reads
from patterns.sites import Ledger

LOW = torch.ops.lowering
THIS = Path(__file__).name
E4M3FN = torch.float8_e4m3fn


def everything(spec: Spec) -> str | None:
    return None


SWIZZLED = Reads("sm_90", ("swizzled_128",), ("column_tma", "column", "row"), everything)
SHUFFLED = Reads("gfx950", ("shuffled_16x16", "row"), ("column", "row"), everything)


def codes(rows: int, depth: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=generator).to(E4M3FN)


class Computes(nn.Module):
    """Parameters by name, and a function of the input and of them."""

    def __init__(self, function: Callable[..., Any], **tensors: Tensor):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args, **dict(self.named_buffers()))


@dataclass
class LaidOut:
    """A program after the layout step, and what was remarked and recorded."""

    program: Program
    ledger: Ledger = field(default_factory=Ledger)

    def specs(self, kind: type[Spec]) -> list[Any]:
        block = torch_ir.block_of(self.program.main())
        found = (registry.spec_of(op.operation) for op in block.operations)
        return [spec for spec in found if isinstance(spec, kind)]

    @property
    def product(self) -> MatmulSpec:
        (product,) = self.specs(MatmulSpec)
        return product

    @property
    def scales(self) -> list[str]:
        """The layout of every scale that a row kernel writes."""
        return [q.layout for row in self.specs(RowSpec) for q in row.quantizations]

    def operations(self, *names: str) -> list[ir.Operation]:
        block = torch_ir.block_of(self.program.main())
        return [op.operation for op in block.operations if torch_ir.op_name(op.operation) in names]

    def fold(self) -> dict[str, Tensor]:
        """What the archive would hold."""
        with self.program.context, ir.Location.unknown():
            fold(self.program)
            step.check(self.program.main())
        values = self.program.parameters.items()
        return {name: v.evaluate() if isinstance(v, Recipe) else v for name, v in values}

    def carried(self) -> list[str | None]:
        """The layout that the weight of each product carries."""
        return [weight_layouts.carried(op.operands[1]) for op in self.operations(canonical.MATMUL)]


def laid_out(module: nn.Module, *args: Tensor, reads: Reads = SWIZZLED, **options: Any) -> LaidOut:
    """``module`` after the layout step, where the product kernel reads what ``reads`` says."""
    context = ir.Context()
    done = LaidOut(import_module(module, args, context, **options))
    with context, ir.Location.unknown():
        function = done.program.main()
        normalize(function)
        raise_function(function, done.ledger)
        sink_views(function)
        fuse(function, done.ledger, supported(resolve("cpu")))
        step.lay_out(function, done.ledger, reads)
        done.program.module.operation.verify()
    return done


def product(x: Tensor, w: Tensor, s: Tensor, **options: Any) -> Tensor:
    q, scale = LOW.group_quant(x, 128)
    return LOW.block_scaled_matmul(q, w, scale, s, torch.bfloat16, **options)


X = torch.randn(6, 256).bfloat16()
S = torch.rand(2, 2) + 0.5


# -- weights ------------------------------------------------------------------------------------------


def test_a_weight_becomes_a_parameter_in_the_kernel_s_layout() -> None:
    w = codes(200, 256)
    done = laid_out(Computes(product, w=w, s=S), X)
    assert done.product.b_layout == "swizzled_128" and done.product.columns == 200
    assert done.carried() == ["swizzled_128"]
    stored = done.fold()
    assert sorted(stored) == ["s", "w.folded"], "the weight as it was is dropped"
    assert torch.equal(
        stored["w.folded"].view(torch.uint8), LOW.shuffle_weight(w, "swizzled_128").view(torch.uint8)
    )
    assert done.carried() == ["swizzled_128"] and not done.operations(weight_layouts.SHUFFLE)
    printed = str(done.program.module)
    assert printed.count('weight_layout = "swizzled_128"') == 2, "on the global and on its load"


def test_what_a_weight_is_made_of_is_folded_with_its_shuffle() -> None:
    """Gate and up joined, the one stored the other way round; a scale transposed."""

    def joined(x, gate, up, s):
        w = torch.cat([gate.t(), up])
        return product(x, w, s.t())

    gate, up = codes(256, 128, 1), codes(64, 256, 2)
    done = laid_out(Computes(joined, gate=gate, up=up, s=S), X, reads=SHUFFLED)
    stored = done.fold()
    assert sorted(stored) == ["gate.folded", "s.folded"] and done.carried() == ["shuffled_16x16"]
    expected = LOW.shuffle_weight(torch.cat([gate.t(), up]), "shuffled_16x16")
    assert torch.equal(stored["gate.folded"].view(torch.uint8), expected.view(torch.uint8))


def test_padding_does_not_keep_a_weight_from_being_stored() -> None:
    """A tenth more bytes, of a weight above the size up to which anything is stored, and read besides."""
    w = codes(2000, 640)

    def twice(x, w, s):
        return product(x, w, s), x.float() @ w.float().t()

    done = laid_out(Computes(twice, w=w, s=torch.rand(16, 5)), torch.randn(3, 640).bfloat16())
    stored = done.fold()
    assert stored["w.folded"].shape == (2048, 640) and "w" in stored
    assert done.carried() == ["swizzled_128"]


def test_a_kernel_that_reads_rows_gets_rows() -> None:
    done = laid_out(
        Computes(product, w=codes(200, 256), s=S), X, reads=Reads("cpu", ("row",), ("row",), everything)
    )
    assert (done.product.b_layout, done.product.a_scale_layout) == ("row", "row")
    assert not done.operations(weight_layouts.SHUFFLE)


def test_the_first_layout_that_a_kernel_computes_is_taken() -> None:

    def only_rows(spec: Spec) -> str | None:
        return "no" if isinstance(spec, MatmulSpec) and spec.b_layout != "row" else None

    done = laid_out(
        Computes(product, w=codes(200, 256), s=S),
        X,
        reads=Reads("sm_90", ("swizzled_128", "row"), ("row",), only_rows),
    )
    assert done.product.b_layout == "row" and not done.ledger.remarks


class Run(nn.Module):
    """A product whose weight is computed at run time."""

    def forward(self, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return product(x, w, s)


def test_a_weight_computed_at_run_time_is_read_in_rows() -> None:
    done = laid_out(Run(), X, codes(200, 256), S, reads=SHUFFLED)
    assert done.product.b_layout == "row" and not done.operations(weight_layouts.SHUFFLE)


def test_or_its_product_is_left_to_plain_operations_and_the_report_says_so() -> None:
    def rows_only_refused(spec: Spec) -> str | None:
        refused = isinstance(spec, MatmulSpec) and spec.b_layout == "row"
        return "The kernel reads b in swizzled_128, not row." if refused else None

    reads = Reads("sm_90", ("swizzled_128",), ("row",), rows_only_refused)
    done = laid_out(Run(), X, codes(200, 256), S, reads=reads)
    assert not done.specs(MatmulSpec)
    (remark,) = done.ledger.remarks
    assert remark.op == "block_scaled_matmul" and f"{THIS}:" in remark.location
    assert remark.text == (
        "left to IREE: The kernel reads b in swizzled_128, not row. "
        "It is no parameter, which could be shuffled when compiling."
    )


def no_products(spec: Spec) -> str | None:
    return "No." if isinstance(spec, MatmulSpec) else None


def test_where_no_layout_would_do_none_is_advised() -> None:
    done = laid_out(
        Run(), X, codes(200, 256), S, reads=Reads("sm_90", ("swizzled_128",), ("row",), no_products)
    )
    assert [remark.text for remark in done.ledger.remarks] == ["left to IREE: No."]


def test_a_product_that_no_kernel_computes_is_remarked() -> None:
    def function(x, w, s):
        q, scale = LOW.group_quant(x, 16)
        return LOW.block_scaled_matmul(q, w, scale, s, torch.float32)

    compiled = lowering.compile(
        Computes(function, w=codes(32, 64), s=torch.rand(2, 4)), (torch.randn(3, 64),)
    )
    (remark,) = compiled.report.remarks
    assert "left to IREE: The product kernel knows groups of 32, 64, 128, not 16." in remark.text
    assert remark.text in compiled.report.to_html().replace("&#x27;", "'")


# -- a weight that the model gives shuffled -----------------------------------------------------------


def given(layout: str) -> Callable[..., Tensor]:
    return lambda x, w, s: product(x, w, s, b_layout=layout)


def test_a_parameter_stored_shuffled_is_read_as_it_is() -> None:
    w = LOW.shuffle_weight(codes(256, 256), "shuffled_16x16")
    done = laid_out(Computes(given("shuffled_16x16"), w=w, s=S), X, reads=SHUFFLED)
    assert done.product.b_layout == "shuffled_16x16" and done.carried() == ["shuffled_16x16"]
    assert not done.operations(weight_layouts.SHUFFLE)
    assert sorted(done.fold()) == ["s", "w"]
    assert str(done.program.module).count('weight_layout = "shuffled_16x16"') == 2


@pytest.mark.parametrize(
    ("model", "arguments", "refusal"),
    [
        pytest.param(
            Computes(given("swizzled_128"), w=codes(256, 256), s=S),
            (X,),
            "reads its weight 'w' in layout swizzled_128, which gfx950 has not: give it in row, and the "
            "compiler lays it out for its target (shuffled_16x16 or row)",
            id="not of the target",
        ),
        pytest.param(
            Computes(
                lambda x, w, s: product(x, LOW.shuffle_weight(w, "shuffled_16x16"), s), w=codes(256, 256), s=S
            ),
            (X,),
            "reads its weight 'w' in layout row, and it is in layout shuffled_16x16: say which it is with "
            "b_layout, or change it",
            id="shuffled, read as rows",
        ),
        pytest.param(
            Computes(
                lambda x, w, s: given("shuffled_16x16")(x, torch.cat([w, w]), s), w=codes(128, 256), s=S
            ),
            (X,),
            "reads its weight 'w' in layout shuffled_16x16, and it is in layout row",
            id="said of what is computed",
        ),
        pytest.param(
            Computes(
                lambda x, w, s: product(x, torch.cat([LOW.shuffle_weight(w, "shuffled_16x16")] * 2), s),
                w=codes(128, 256),
                s=S,
            ),
            (X,),
            "which is computed from one in layout shuffled_16x16, with bytes in another order",
            id="computed from what is shuffled",
        ),
        pytest.param(
            Computes(
                lambda x, w, s: (product(x, w, s), product(x, w, s, b_layout="shuffled_16x16")),
                w=codes(256, 256),
                s=S,
            ),
            (X,),
            "reads it in layout row: a parameter has one layout",
            id="two layouts of one parameter",
        ),
    ],
)
def test_a_layout_that_is_not_the_one_read_is_refused(model, arguments, refusal: str) -> None:
    with pytest.raises(CompileError) as error:
        laid_out(model, *arguments, reads=SHUFFLED)
    assert refusal in str(error.value) and f"{THIS}:" in str(error.value)


def test_the_command_says_it_too() -> None:
    """On the cpu there is no such layout; on no target is one taken for another."""
    with pytest.raises(
        CompileError, match=r"test_layout.py:\d+: .* 'w' in layout shuffled_16x16, which cpu has not"
    ):
        lowering.compile(Computes(given("shuffled_16x16"), w=codes(256, 256), s=S), (X,))


def test_a_layout_changed_behind_the_compiler_s_back_is_found_before_dispatch() -> None:
    done = laid_out(Computes(product, w=codes(200, 256), s=S), X)
    done.fold()
    (op,) = done.operations(canonical.MATMUL)
    with done.program.context, ir.Location.unknown():
        load = weight_layouts.parameter(op.operands[1])
        assert load is not None
        weight_layouts.note(load, "shuffled_16x16")
        with pytest.raises(
            CompileError, match=r"'w.folded' in layout swizzled_128, and it is in layout shuffled"
        ):
            step.check(done.program.main())


def test_an_argument_is_in_the_layout_that_the_model_says() -> None:
    class Argument(nn.Module):
        def forward(self, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
            return given("shuffled_16x16")(x, w, s)

    done = laid_out(Argument(), X, codes(256, 256), S, reads=SHUFFLED)
    assert done.product.b_layout == "shuffled_16x16" and done.carried() == [None]


def test_without_a_kernel_a_shuffled_weight_is_folded_back() -> None:
    w = codes(256, 256)
    stored = LOW.shuffle_weight(w, "shuffled_16x16")
    reads = Reads("gfx950", ("shuffled_16x16",), ("column",), no_products)
    done = laid_out(Computes(given("shuffled_16x16"), w=stored, s=S), X, reads=reads)
    assert not done.specs(MatmulSpec) and len(done.operations(weight_layouts.UNSHUFFLE)) == 1
    folded = done.fold()
    assert torch.equal(folded["w.folded"].view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("layout", ["row", "shuffled_16x16", "swizzled_128"])
def test_a_weight_can_be_shuffled_at_run_time(layout: str) -> None:
    """There and back in a compiled program, of codes that hold every bit pattern, padding included."""

    class Moves(nn.Module):
        def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
            stored = LOW.shuffle_weight(w, layout)
            return stored, LOW.unshuffle_weight(stored, layout)

    w = torch.arange(150 * 128).to(torch.uint8).reshape(150, 128).view(torch.int8)
    found = lowering.load(lowering.compile(Moves(), (w,)).vmfb)(w)
    assert all(map(torch.equal, found, Moves()(w)))


# -- scales -------------------------------------------------------------------------------------------


def quantized(layout: str, reader: Callable[..., Any]) -> Callable[..., Any]:
    """A norm, its quantization in ``layout``, and what ``reader`` makes of codes, scales and parameters."""

    def function(x: Tensor, **tensors: Tensor) -> Any:
        y = LOW.rms_norm(x, None, 1e-6)
        q, scale = LOW.group_quant(y, 128, scale_layout=layout)
        return reader(q, scale, **tensors)

    return function


def multiplied(q: Tensor, scale: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return LOW.block_scaled_matmul(q, w, scale, s, torch.bfloat16)


def and_scale(q: Tensor, scale: Tensor, w: Tensor, s: Tensor) -> Any:
    return multiplied(q, scale, w, s), scale


def flattened(q: Tensor, scale: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return multiplied(q.reshape(-1, 256), scale.reshape(-1, 2), w, s)


def halved(q: Tensor, scale: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return multiplied(q, scale.contiguous() * 0.5, w, s)


def three_times(q: Tensor, scale: Tensor, w: Tensor, s: Tensor) -> Any:
    return multiplied(q, scale, w, s), multiplied(q, scale, w[:128], s[:1]), multiplied(q, scale, w, s * 2)


@pytest.mark.parametrize(
    ("asked", "reader", "reads", "written", "read"),
    [
        pytest.param("row", multiplied, SWIZZLED, "column_tma", "column_tma", id="the kernel's favourite"),
        pytest.param("row", multiplied, SHUFFLED, "column", "column", id="another kernel's"),
        pytest.param("column", multiplied, SWIZZLED, "column", "column", id="what the model asks for"),
        pytest.param(
            "column_tma", multiplied, SHUFFLED, "column", "column", id="what the kernel cannot read"
        ),
        pytest.param("row", flattened, SWIZZLED, "column_tma", "column_tma", id="through views"),
        pytest.param("row", three_times, SWIZZLED, "column_tma", "column_tma", id="for several products"),
        pytest.param("row", and_scale, SWIZZLED, "row", "row", id="returned as well"),
        pytest.param("column", and_scale, SWIZZLED, "column", "column", id="returned as asked"),
        pytest.param("row", halved, SWIZZLED, "row", "row", id="computed with"),
    ],
)
def test_scales_are_written_as_the_product_reads_them(
    asked, reader, reads: Reads, written: str, read: str
) -> None:
    scales_of = reads.scales

    def refuse(spec: Spec) -> str | None:
        return "no" if isinstance(spec, MatmulSpec) and spec.a_scale_layout not in scales_of else None

    reads = Reads(reads.target, reads.weights, reads.scales, refuse)
    x = torch.randn(2, 3, 256).bfloat16()
    done = laid_out(Computes(quantized(asked, reader), w=codes(256, 256), s=S), x, reads=reads)
    assert done.scales == [written]
    assert {spec.a_scale_layout for spec in done.specs(MatmulSpec)} == {read}
    (contract,) = [r.contract for r in done.ledger.records if isinstance(r.contract, Quantization)]
    assert contract.layout == written, "the report says what is written"


def test_a_layout_the_quantization_s_kernel_cannot_write_is_not_chosen() -> None:
    def refuse(spec: Spec) -> str | None:
        written = {q.layout for q in spec.quantizations} if isinstance(spec, RowSpec) else set()
        return "no" if "column_tma" in written else None

    reads = Reads("sm_90", ("swizzled_128",), ("column_tma", "column"), refuse)
    done = laid_out(Computes(quantized("row", multiplied), w=codes(256, 256), s=S), X, reads=reads)
    assert done.scales == ["column"] and done.product.a_scale_layout == "column"


@pytest.mark.parametrize("layout", ["row", "column", "column_tma"])
@pytest.mark.parametrize("reader", [multiplied, and_scale, flattened, halved, three_times])
def test_programs_are_right_whatever_the_scales_do(layout: str, reader) -> None:
    """On the cpu, whose kernel reads every layout, with any number of rows."""
    model = Computes(quantized(layout, reader), w=codes(256, 256), s=S)
    rows = {0: torch.export.Dim("rows")}
    compiled = lowering.compile(model, (torch.randn(4, 3, 256),), dynamic_shapes={"args": (rows,)})
    program = lowering.load(compiled.vmfb)
    for count in (0, 1, 5):
        x = torch.randn(count, 3, 256)
        found, expected = program(x), model(x)
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=True):
            assert a.shape == b.shape and a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-5)


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (-1.0, "-1.0")])
def test_a_scale_that_is_negative_or_no_number_is_refused(value: float, shown: str) -> None:
    """As it is stored, and as it is after folding; of a product with a kernel and of one without."""
    bad = S.clone()
    bad[1, 0] = value
    message = rf"{THIS}:\d+: the scale 's' of a product's weight is {shown} at \[1, 0\]; 1 of its 4 elements"
    with pytest.raises(CompileError, match=message):
        lowering.compile(Computes(product, w=codes(256, 256), s=bad), (X,))
    with pytest.raises(CompileError, match=rf"'s.folded' of a product's weight is {shown} at \[0, 1\]"):
        lowering.compile(Computes(lambda x, w, s: product(x, w, s.t()), w=codes(256, 256), s=bad), (X,))

    def small_groups(x, w, s):
        q, scale = LOW.group_quant(x, 16)
        return LOW.block_scaled_matmul(q, w, scale, s, torch.float32)

    bad = torch.ones(1, 2)
    bad[0, 1] = value
    with pytest.raises(CompileError, match=rf"'s' of a product's weight is {shown} at \[0, 1\]"):
        lowering.compile(Computes(small_groups, w=codes(8, 32), s=bad), (torch.randn(2, 32),))


def test_a_scale_given_at_run_time_is_the_caller_s_business() -> None:
    program = lowering.load(lowering.compile(Run(), (X, codes(256, 256), S)).vmfb)
    assert not program(X, codes(256, 256), torch.zeros(2, 2)).any()


@pytest.mark.parametrize(
    ("w", "s", "block", "message"),
    [
        pytest.param(
            codes(256, 256),
            torch.ones(2, 3),
            128,
            r"the weight's scale 's' is float32\[2, 3\], and its weight 'w', float8_e4m3fn\[256, 256\] in "
            r"blocks of 128, needs float32\[2, 2\]",
            id="scales of another shape",
        ),
        pytest.param(
            codes(256, 320),
            S,
            128,
            r"its weight 'w' is float8_e4m3fn\[256, 320\], and it multiplies rows of 256 elements",
            id="a weight of another depth",
        ),
    ],
)
def test_operands_that_do_not_fit_are_named(w: Tensor, s: Tensor, block: int, message: str) -> None:
    """By a name that no library checks; our own operation says it when it is called."""
    lowering.declare_ops()

    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        q, scale = LOW.group_quant(x, block)
        return torch.ops.vllm.w8a8_triton_block_scaled_mm_func(q, w, scale, s, [block, block], torch.bfloat16)

    with pytest.raises(CompileError, match=rf"{THIS}:\d+: the operands of a product do not fit: {message}"):
        lowering.compile(Computes(function, w=w, s=s), (X,))


def test_our_own_operation_says_where_it_is_called() -> None:
    with pytest.raises(
        CompileError, match=rf"b_scale: expected shape \[2, 2\], got \[2, 3\]\n  .*{THIS}:\d+"
    ):
        lowering.compile(Computes(product, w=codes(256, 256), s=torch.ones(2, 3)), (X,))
    with pytest.raises(CompileError, match="a_scale: 3 groups do not divide the last axis of a, 256"):
        q = Computes(
            lambda x, w, s: LOW.block_scaled_matmul(x.to(E4M3FN), w, s[:1].expand(6, 3), s, torch.bfloat16),
            w=codes(256, 256),
            s=torch.ones(2, 3),
        )
        lowering.compile(q, (X,))
