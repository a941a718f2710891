"""The comparison with eager: what is accepted as another order of sums, and what is a wrong program."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lowering
from lowering import nn as quantized
from lowering.cli.comparison import Comparison, compare
from lowering.cli.sensitivity import exact, nudged
from lowering.cli.verify import verify
from lowering.errors import RunError, VerificationError
from lowering.importing.sizes import exported_shapes, other_arguments


class Identity(nn.Module):
    def forward(self, *tensors):
        return tensors


def outcome(actual: Tensor, expected: Tensor, *right: Tensor) -> str | None:
    return compare(0, actual, expected, right).problem


def fp8(*values: float) -> Tensor:
    return torch.tensor(values).to(torch.float8_e4m3fn)


# One output -------------------------------------------------------------------------------------


def test_equal_outputs_hold_whatever_their_type():
    outputs = (torch.randn(3, 4), torch.arange(3), fp8(1, -2, 448), torch.tensor([True]), torch.empty(0, 4))
    comparison = verify(lambda *t: t, Identity(), outputs)
    assert comparison.ok and "5 outputs agree (5 bit for bit" in str(comparison)
    assert len(comparison.table().splitlines()) == 6


def test_another_order_of_sums_is_accepted_and_a_wrong_value_is_not():
    expected = torch.randn(64, 64)
    assert outcome(expected * (1 + 1e-6), expected) is None
    wrong = expected.clone()
    wrong[3, 5] += 0.1
    said = outcome(wrong, expected) or ""
    assert said.startswith("relative error ") and "the furthest at [3, 5]: " in said


def test_what_is_allowed_is_what_eager_itself_changes_by():
    expected = torch.randn(64, 64)
    noisy, other = (expected + 0.02 * torch.randn(64, 64) for _ in range(2))
    assert outcome(noisy, expected) is not None
    assert outcome(noisy, expected, other) is None
    assert outcome(expected.roll(32, dims=1), expected, other) is not None


def test_a_program_may_be_nearer_to_the_exact_evaluation_than_eager_is():
    right = torch.randn(64, 64)
    eager = right + 1e-3 * torch.randn(64, 64)
    assert outcome(right, eager, right) is None


def test_a_rare_step_of_fp8_is_rounding_and_a_frequent_one_is_not():
    expected = torch.ones(4096).to(torch.float8_e4m3fn)
    bits = expected.view(torch.uint8).clone()
    bits[7] += 1
    assert outcome(bits.view(torch.float8_e4m3fn), expected) is None
    bits[7] += 1
    assert "differs by up to 2 representable values, 1 allowed; the furthest at [7]" in (
        outcome(bits.view(torch.float8_e4m3fn), expected) or ""
    )
    bits = expected.view(torch.uint8).clone()
    bits[:100] += 1
    assert "2.44% of the elements differ" in (outcome(bits.view(torch.float8_e4m3fn), expected) or "")


def test_steps_of_fp8_are_counted_across_zero():
    smallest = fp8(2**-9)
    assert "up to 2 representable values" in (outcome(fp8(-(2**-9)), smallest) or "")
    assert outcome(fp8(-0.0), fp8(0.0)) is None


def test_integers_must_be_equal():
    assert outcome(torch.tensor([1, 2]), torch.tensor([1, 2])) is None
    assert "50.00%" in (outcome(torch.tensor([1, 3]), torch.tensor([1, 2])) or "")


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_strange_values_must_be_in_the_same_places(strange):
    expected = torch.tensor([1.0, strange, 2.0])
    assert outcome(expected.clone(), expected) is None
    assert "on one side only" in (outcome(torch.tensor([1.0, 1.0, 2.0]), expected) or "")


def test_infinities_of_the_other_sign_differ():
    assert outcome(torch.tensor([float("-inf")]), torch.tensor([float("inf")])) is not None


def test_nan_is_no_neighbour_of_the_largest_fp8():
    assert "on one side only" in (outcome(fp8(float("nan")), fp8(448)) or "")


def test_shape_type_and_number_of_outputs():
    assert outcome(torch.ones(2, 3), torch.ones(3, 2)) == "is float32 [2, 3], eager gives float32 [3, 2]"
    assert "is float16" in (outcome(torch.ones(2).half(), torch.ones(2)) or "")
    with pytest.raises(VerificationError, match="returns 1 tensors, the eager model 2"):
        verify(lambda a, b: (a,), Identity(), (torch.ones(1), torch.ones(1)))


def test_the_error_shows_every_output():
    with pytest.raises(VerificationError) as caught:
        verify(lambda a, b: (a, b + 1), Identity(), (torch.ones(2), torch.ones(3)))
    text = str(caught.value)
    assert "output 1: relative error 1.0e+00" in text and "[0]: 2, eager 1" in text
    assert text.count("float32") == 2 and "DIFFERS" in text and "ok" in text
    assert "what eager itself changes by when the last bits of its sums do" in text


# Models -----------------------------------------------------------------------------------------


class Rounded(nn.Module):
    """A bfloat16 product, its activation and the next product; ``fault`` names what a wrong compiler does."""

    def __init__(self, fault: str | None = None):
        super().__init__()
        self.fault = fault
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = (
            nn.Parameter(torch.randn(shape, generator=generator).bfloat16() / 8)
            for shape in [(64, 96), (96, 64)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.up
        if self.fault == "rounding":
            return (nn.functional.silu(y.float()) * y.float()).bfloat16() @ self.down
        return (nn.functional.silu(y) * y) @ self.down


class Routed(nn.Module):
    """Two quantized layers, chosen by a router; ``top`` is what chooses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        quantized.quantize(self, group_size=32, exclude="router")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.top(self.router(x).softmax(-1))
        every = torch.stack([expert(x) for expert in self.experts], 1)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, 64))
        return (picked * weights[..., None]).sum(1), chosen

    def top(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(2)


class Misrouted(Routed):
    def top(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = scores.topk(2)
        chosen = chosen.clone()
        chosen[5, 1] = (chosen[5] + 1).max() % 4 if 0 in chosen[5] else 0
        return weights, chosen


def reordered(module: nn.Module) -> Callable[..., object]:
    """A program that is right: the module with other last bits."""

    def program(*args: Tensor) -> object:
        with torch.no_grad(), nudged(1234, 0.5):
            return module(*args)

    return program


def refused(program: Callable[..., object], module: nn.Module, *args: Tensor) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(program, module, args)
    return str(caught.value)


def test_a_rounding_left_out_is_no_other_order_of_sums():
    x = torch.randn(32, 64).bfloat16()
    assert verify(reordered(Rounded()), Rounded(), (x,)).ok
    assert "of the elements differ" in refused(Rounded("rounding"), Rounded(), x)


def test_a_swapped_weight_and_a_wrong_expert_are_found():
    model, x = Routed(), torch.randn(16, 64)
    assert verify(reordered(model), model, (x,)).ok
    swapped = copy.deepcopy(model)
    weight = swapped.get_submodule("experts.2").weight
    weight[[3, 4]] = weight[[4, 3]].clone()
    assert "output 0: relative error" in refused(swapped, model, x)
    wrong = Misrouted()
    wrong.load_state_dict(model.state_dict())
    said = refused(wrong, model, x)
    assert "output 0: relative error" in said and "at [5, " in said
    assert "output 1: 3.12% of the elements differ" in said


def test_an_unsorted_choice_is_a_set():
    class Unsorted(Routed):
        def top(self, scores: Tensor) -> tuple[Tensor, Tensor]:
            return scores.topk(2, sorted=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.top(self.router(x).softmax(-1))

    model, x = Unsorted(), torch.randn(16, 64)

    def backwards(x: Tensor) -> list[Tensor]:
        return [t.flip(-1) for t in model(x)]

    def mixed(x: Tensor) -> list[Tensor]:
        weights, chosen = model(x)
        return [weights, chosen.flip(-1)]

    assert verify(backwards, model, (x,)).ok
    assert "output 0: relative error" in refused(mixed, model, x)


def test_a_model_that_writes_into_its_arguments_is_compared_fairly():
    class Adds(nn.Module):
        def forward(self, x):
            return x.add_(1)

    x = torch.zeros(3)
    assert verify(lambda x: x.add_(1), Adds(), (x,)).ok
    assert torch.equal(x, torch.zeros(3))


def test_what_a_model_writes_into_its_buffers_is_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count[1:].add_(x[1:])
            return self.count + x

    model = Counts()
    assert verify(lambda x: x + torch.tensor([0.0, 1, 1]) * x, model, (torch.ones(3),)).ok
    assert torch.equal(model.count, torch.zeros(3))


def test_a_program_that_writes_into_its_argument_or_has_a_memory_is_refused():
    class Doubles(nn.Module):
        def forward(self, x):
            return x * 2

    def writes(x: Tensor) -> Tensor:
        result = x * 2
        x.zero_()
        return result

    calls = iter((2, 3))
    x = torch.ones(3)
    assert "writes into its argument 0, and eager does not" in refused(writes, Doubles(), x)
    assert "a second call with equal arguments gives other values" in refused(
        lambda x: x * next(calls), Doubles(), x
    )


def test_float64_and_other_last_bits_of_a_model():
    """Of what is exact no bit moves; of sums the last ones do, and float64 is between."""
    x, w = torch.randn(8, 256), torch.randn(256, 8)
    for mode in (exact(), nudged(0)):
        with mode:
            moved, kept, codes = x @ w, (x * 3).view(-1)[5:], torch.ops.lowering.group_quant(x, 128)
        assert torch.equal(kept, (x * 3).view(-1)[5:])
        assert all(map(torch.equal, [codes[0].view(torch.uint8), codes[1]], _codes(x)))
        assert not torch.equal(moved, x @ w) and torch.allclose(moved, x @ w, atol=1e-4)
    with exact():
        assert torch.equal(x @ w, (x.double() @ w.double()).float())


def _codes(x: Tensor) -> list[Tensor]:
    codes, scale = torch.ops.lowering.group_quant(x, 128)
    return [codes.view(torch.uint8), scale]


# Other sizes ------------------------------------------------------------------------------------


def sizes_of(args: tuple, shapes: object) -> list[list[tuple[int, ...]]]:
    return [
        [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(a)]
        for _, a in other_arguments(args, shapes) or ()
    ]


def test_other_sizes_keep_to_what_the_model_says():
    x, y = torch.arange(24.0).view(4, 6), torch.ones(8, 6)
    t, q = Dim("t", min=2, max=5), Dim("q", max=4)
    assert other_arguments((x,), None) is None and other_arguments((x,), ({0: None},)) is None
    assert other_arguments((x,), ({0: Dim.STATIC, 1: 6},)) is None
    assert {s[0][0] for s in sizes_of((x,), {"x": {0: t}})} == {5, 3}
    # Equal dimensions stay equal, multiples multiples; a dictionary among the arguments.
    found = sizes_of((x, {"y": y}), ({0: 2 * q}, {"y": {0: 4 * q}}))
    assert found and all(a[0] * 2 == b[0] and a[0] <= 8 and a[1] == b[1] == 6 for a, b in found)
    assert all(a[0] == a[1] for (a,) in sizes_of((torch.ones(4, 4),), ((Dim.AUTO, Dim.AUTO),)))
    words, call = next(iter(other_arguments((x,), ({0: t},)) or ()))
    assert words == "5x6" and torch.equal(call.args[0], torch.cat([x, x[:1]]))
    # Keywords, which shapes may name in any order or not at all.
    named = {"y": {0: 2 * q}, "x": {0: t}, "z": None}
    for _, call in other_arguments((x,), named, {"z": x, "y": y}) or ():
        assert 2 <= len(call.args[0]) <= 5 and len(call.kwargs["z"]) == 4 and len(call.kwargs["y"]) <= 8


def test_other_sizes_of_an_exported_program():
    class Doubles(nn.Module):
        def forward(self, x, y):
            return x * 2, y

    shapes = ({0: 4 * Dim("q", max=4)}, None)
    program = torch.export.export(Doubles(), (torch.ones(8, 3), torch.ones(2)), dynamic_shapes=shapes)
    found = sizes_of((torch.ones(8, 3), torch.ones(2)), exported_shapes(program))
    assert found and all(x[0] % 4 == 0 and x[0] <= 16 and x[1] == 3 and y == (2,) for x, y in found)


def test_a_program_that_is_wrong_at_another_size_only():
    class Sums(nn.Module):
        def forward(self, x):
            return x.sum(0)

    args, shapes = (torch.ones(4, 3),), ({0: Dim("t")},)

    def first_four(x: Tensor) -> Tensor:
        return x[:4].sum(0)

    def only_four(x: Tensor) -> Tensor:
        if len(x) != 4:
            raise RunError(words)
        return x.sum(0)

    assert verify(first_four, Sums(), args).ok
    good = verify(Sums(), Sums(), args, dynamic_shapes=shapes)
    assert isinstance(good, Comparison) and "called with 7x3 too" in str(good)
    with pytest.raises(VerificationError, match=r"output 0 with 7x3: relative error 4\.3e-01"):
        verify(first_four, Sums(), args, dynamic_shapes=shapes)
    words = "main failed: INVALID_ARGUMENT"
    with pytest.raises(VerificationError, match="cannot be called with 7x3: main failed"):
        verify(only_four, Sums(), args, dynamic_shapes=shapes)
    words = "argument x: expected 4"
    assert "no other sizes" in str(verify(only_four, Sums(), args, dynamic_shapes=shapes))


class Remembers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 8))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.register_buffer("mean", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.index_copy_(0, self.count, x.softmax(-1)[None])
        self.mean.lerp_(x, 0.1)
        self.count.add_(1)
        x.mul_(2)
        return self.cache.sum(0)


def test_state_and_written_arguments_are_compared_too() -> None:
    model, x = Remembers(), torch.randn(8)
    program = lowering.load(lowering.compile(model, (x,)).vmfb)
    program(x.clone())  # whatever it remembers
    assert len(verify(program, model, (x,)).outputs) == 5
    assert int(model.count) == 0
    other = Remembers()
    other.mean += 1
    with pytest.raises(VerificationError, match="output 3, the state mean: relative error"):
        verify(program, other, (x,))
