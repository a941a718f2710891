"""The ledger: every norm and quantization of a model ends fused or with a reason, none is lost.

The last tests draw small models at random: norms of every spelling, views, adds and quantizations in
any order.  What each step does to the IR is shown in tests/ir; here it is what a user is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from iree.compiler import ir
from torch import nn
from torch.export import Dim

import lowering
from lowering.families.registry import supported
from lowering.importing.importer import import_module
from lowering.passes.fuse import fuse
from lowering.passes.normalize import normalize
from lowering.passes.raise_ops import raise_function
from lowering.passes.sink_views import sink_views
from lowering.targets import resolve
from patterns import canonical, torch_ir
from patterns.sites import NOT_REACHED, Ledger

THIS = Path(__file__).name

group_quant = torch.ops.lowering.group_quant
rms_norm = torch.ops.lowering.rms_norm


@dataclass
class Fused:
    """A model after the fuse step: its ledger, and the sites its operations still name."""

    ledger: Ledger
    in_rows: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def fused(model: nn.Module, *args: torch.Tensor, target: str = "cpu", dynamic_shapes=None) -> Fused:
    context, ledger = ir.Context(), Ledger()
    program = import_module(model, args, context, dynamic_shapes=dynamic_shapes)
    with context, ir.Location.unknown():
        function = program.main()
        normalize(function)
        raise_function(function, ledger)
        sink_views(function)
        fuse(function, ledger, supported(resolve(target)))
        program.module.operation.verify()
        result = Fused(ledger)
        for op in [op.operation for op in torch_ir.block_of(function).operations]:
            if torch_ir.op_name(op) == canonical.ROW:
                result.in_rows += canonical.sites_of(op)
            elif canonical.SITE in op.attributes:
                result.left.append(canonical.site_of(op))
    return result


def assert_nothing_lost(result: Fused) -> None:
    """Every site is in exactly one operation, and says where it is from and what became of it."""
    records = result.ledger.records
    assert sorted(result.in_rows + result.left) == list(range(len(records)))
    for number, record in enumerate(records):
        assert re.search(rf"{THIS}:\d+$", record.location), record
        if record.fused:
            assert record.pattern and number in result.in_rows, record
        else:
            assert record.pattern is None and record.reason and record.reason != NOT_REACHED, record


def outcomes(result: Fused) -> list[tuple[str, str]]:
    """(op, pattern or reason) of every site, in the order of the program."""
    return [(r.op, r.pattern if r.fused else f"not: {r.reason}") for r in result.ledger.records]


# --- every refusal has its sentence --------------------------------------------------------------------


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def norm_and(*quantizations: tuple[int, str]) -> Calls:
    def function(x):
        y = rms_norm(x, None, 1e-6)
        return [group_quant(y, group, scale_layout=layout) for group, layout in quantizations]

    return Calls(function)


def viewed(group: int, layout: str, *shape: int) -> Calls:
    return Calls(lambda x: group_quant(rms_norm(x, None, 1e-6).view(*shape), group, scale_layout=layout))


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "x", "target", "expected"),
    [
        pytest.param(
            norm_and((128, "row")),
            bf16(4, 256),
            "cpu",
            [("rms_norm", "norm_quant"), ("group_quant", "norm_quant")],
            id="nothing to refuse",
        ),
        pytest.param(
            norm_and((16, "row")),
            bf16(4, 256),
            "cpu",
            [
                ("rms_norm", "norm"),
                ("group_quant", "not: The row kernel quantizes groups of 32, 64 or 128 elements, not 16."),
            ],
            id="group without kernel",
        ),
        pytest.param(
            norm_and((128, "row")),
            bf16(2, 32768),
            "cpu",
            [("rms_norm", "norm_quant"), ("group_quant", "norm_quant")],
            id="long row on the cpu",
        ),
        pytest.param(
            norm_and((128, "row")),
            bf16(2, 32768),
            "h200",
            [
                (
                    "rms_norm",
                    "not: On sm_90 the row kernel takes rows of up to 16384 elements*, not 32768.",
                ),
                (
                    "group_quant",
                    "not: *On sm_90 the row kernel takes rows of up to 16384 elements*, not 32768.",
                ),
            ],
            id="long row on a gpu",
        ),
        pytest.param(
            norm_and(*[(group, layout) for group in (32, 64, 128) for layout in ("row", "column_tma")]),
            bf16(4, 256),
            "cpu",
            [("rms_norm", "norm_quant"), *[("group_quant", "norm_quant")] * 6],
            id="more quantizations than a kernel writes",
        ),
        pytest.param(
            viewed(64, "row", -1, 192),
            bf16(4, 96),
            "cpu",
            [
                ("rms_norm", "norm"),
                (
                    "group_quant",
                    "not: group 64 does not divide the last axis before the view between producer and "
                    "quantization, 96",
                ),
            ],
            id="view across groups",
        ),
        pytest.param(
            viewed(64, "column_tma", -1, 64),
            bf16(4, 256),
            "cpu",
            [
                ("rms_norm", "norm"),
                (
                    "group_quant",
                    "not: the view between producer and quantization makes rows of 64 out of rows of 256, "
                    "which a column_tma scale layout cannot follow",
                ),
            ],
            id="view splits column scales",
        ),
        pytest.param(
            Calls(lambda x: torch.nn.functional.rms_norm(x, (64,), None, 1e-6)),
            torch.zeros(4, 64, dtype=torch.float64),
            "cpu",
            [("rms_norm", "not: float64 rows have no kernel; bfloat16, float16, float32 have")],
            id="dtype",
        ),
        pytest.param(
            Calls(lambda x: group_quant(x, 16)),
            bf16(4, 256),
            "cpu",
            [("group_quant", "not: The row kernel quantizes groups of 32, 64 or 128 elements, not 16.")],
            id="plain quantization",
        ),
    ],
)
def test_what_a_user_is_told(model, x, target, expected) -> None:
    result = fused(model, x, target=target)
    assert_nothing_lost(result)
    got = outcomes(result)
    assert [op for op, _ in got] == [op for op, _ in expected]
    for (_, outcome), (_, pattern) in zip(got, expected, strict=True):
        assert fnmatchcase(outcome, pattern), outcome


def test_gfx942_refuses_each_quantization_and_keeps_the_norm() -> None:
    result = fused(norm_and((128, "row"), (64, "row")), bf16(4, 256), target="gfx942")
    assert_nothing_lost(result)
    (norm, *quants) = outcomes(result)
    assert norm == ("rms_norm", "norm")
    assert len(quants) == 2 and quants[0] == quants[1]
    assert re.match(r"not: gfx942 .*float8_e4m3fnuz.*float8_e4m3fn\b", quants[0][1])


def test_a_row_size_known_only_at_run_time_is_refused() -> None:
    model = Calls(lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], None, 1e-6))
    result = fused(model, bf16(4, 64), dynamic_shapes=(({1: Dim("hidden", min=2)},),))
    assert_nothing_lost(result)
    reason = "the size of the last axis is unknown until run time; a kernel is made for one size"
    assert outcomes(result) == [("rms_norm", f"not: aten::rms_norm: {reason}")]


def test_one_refused_quantization_does_not_keep_the_others_out() -> None:
    result = fused(norm_and((16, "row"), (128, "row"), (128, "row")), bf16(4, 256))
    assert_nothing_lost(result)
    assert [pattern for _, pattern in outcomes(result)][::2] == ["norm_quant", "norm_quant"]
    assert outcomes(result)[1][1].startswith("not: ")
    assert sorted(result.in_rows) == [0, 2, 3] and result.left == [1]


def test_scales_that_are_quantized_in_turn_are_rows_of_their_own() -> None:
    quantize = torch.ops.lowering.group_quant
    result = fused(Calls(lambda x: quantize(quantize(x, 32)[1], 0)), bf16(4, 1024))
    assert_nothing_lost(result)
    assert [pattern for _, pattern in outcomes(result)] == ["quant", "quant"]


def test_a_model_without_sites_has_an_empty_ledger() -> None:
    result = fused(Calls(torch.relu), bf16(4, 256))
    assert result == Fused(Ledger())


# --- models drawn at random -------------------------------------------------------------------------------


def hugging_face_norm(x, weight, eps):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def torch_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


NORMS = (rms_norm, torch_norm, hugging_face_norm)
SIZES = (64, 128, 256, 512, 768, 1536)
Step = tuple[str, int, int]


class Drawn(nn.Module):
    """Runs steps over a growing list of tensors; returns what no later step has read.

    A step is (what, which tensor, which variant): the newest tensor is 0, the one before it 1; both numbers
    are counted modulo what there is.
    """

    def __init__(self, steps: list[Step]):
        super().__init__()
        self.steps = steps
        generator = torch.Generator().manual_seed(0)
        weights = {f"w{size}": torch.rand(size, generator=generator) + 0.5 for size in SIZES}
        self.weights = nn.ParameterDict({name: nn.Parameter(w.bfloat16()) for name, w in weights.items()})

    def forward(self, x):
        pool, read, quantized = [x], set(), []
        for what, which, variant in self.steps:
            which = len(pool) - 1 - which % min(len(pool), 3)
            read.add(which)
            if what == "quant":
                quantized += self.quant(pool[which], variant)
            else:
                pool.append(getattr(self, what)(pool[which], variant, pool))
        return (*quantized, *[tensor for index, tensor in enumerate(pool) if index not in read])

    def quant(self, x, variant):
        group = (128, 64, 32, 16)[variant % 4]
        return group_quant(x, min(group, 32) if x.shape[-1] % group else group)

    def norm(self, x, variant, pool):
        return NORMS[variant % 3](x, self.weights[f"w{x.shape[-1]}"], (1e-6, 1e-5)[variant // 3 % 2])

    def add(self, x, variant, pool):
        partners = [tensor for tensor in pool if tensor.shape == x.shape]
        return torch.add(x, partners[variant % len(partners)], alpha=2 if variant % 5 == 4 else 1)

    def relu(self, x, variant, pool):
        return torch.relu(x)

    def view(self, x, variant, pool):
        kind, half = variant % 6, x.shape[-1] // 2
        if kind == 0 and x.dim() < 4:
            return x.unsqueeze(0)
        if kind == 1:
            return x.reshape(-1, x.shape[-1])
        if kind == 2 and half in SIZES and x.dim() < 4:
            return x.unflatten(-1, (2, -1))
        if kind == 3 and x.dim() > 2 and x.shape[-2] * x.shape[-1] in SIZES:
            return x.flatten(-2)
        if kind == 4 and half in SIZES:
            return x[..., half:]
        if kind == 5 and x.dim() > 2:
            return x[..., x.shape[-2] - 1, :]
        return x.view(x.shape)


def steps_of(what: str, *, most: int) -> st.SearchStrategy[list[Step]]:
    """Up to ``most`` steps of one kind, mostly on the newest tensor."""
    step = st.tuples(st.just(what), st.sampled_from([0, 0, 0, 1, 2]), st.integers(0, 19))
    return st.lists(step, max_size=most)


# Blocks as models have them, each of which may lack any of its parts.
BLOCK = st.tuples(
    steps_of("relu", most=1),
    steps_of("add", most=1),
    steps_of("norm", most=2),
    steps_of("view", most=2),
    steps_of("quant", most=3),
)
STEPS = st.lists(BLOCK, min_size=1, max_size=3).map(
    lambda blocks: [step for block in blocks for part in block for step in part]
)
SHAPES = st.sampled_from([(3, 256), (2, 3, 256)])


def random_input(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(1)).bfloat16() / 4


def test_every_site_of_a_random_model_is_fused_or_has_a_reason() -> None:
    seen = Counter()

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(STEPS, SHAPES, st.sampled_from(["cpu", "cpu", "h200", "gfx942"]))
    def check(steps, shape, target) -> None:
        result = fused(Drawn(steps), random_input(shape), target=target)
        ops = [record.op for record in result.ledger.records]
        kinds = [what for what, _, _ in steps]
        assert (ops.count("rms_norm"), ops.count("group_quant")) == (
            kinds.count("norm"),
            kinds.count("quant"),
        )
        assert_nothing_lost(result)
        seen.update(outcome.partition(":")[0] for _, outcome in outcomes(result))

    check()
    # The models are worth checking: everything a site can become is among them.
    assert set(seen) == {"norm", "norm_quant", "add_norm", "add_norm_quant", "quant", "not"}, seen


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate],  # every example is a compilation: a failing one is small enough as it is
)
@given(STEPS.filter(lambda steps: len(steps) > 5), SHAPES)
def test_a_random_model_computes_what_eager_computes(steps, shape) -> None:
    """To the accuracy of bfloat16, or one fp8 code.

    IREE does not round between the bfloat16 operations it generates itself, so two adds in a row that no
    kernel takes differ from eager by a last place.  That kernels are exact is shown in test_compile.
    """
    model, x = Drawn(steps), random_input(shape)
    compiled = lowering.compile(model, (x,))
    assert len(compiled.report.sites) == sum(what in ("norm", "quant") for what, _, _ in steps)
    for got, expected in zip(lowering.load(compiled.vmfb)(x), model(x), strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        one_step = 2.0**-3 if expected.dtype == torch.float8_e4m3fn else 2.0**-6
        got, expected = got.float(), expected.float()
        assert torch.allclose(got, expected, rtol=one_step, atol=2.0**-7 * float(expected.abs().max()))
