"""The comparison with eager: what is accepted as another order of sums, and what is a wrong program."""

from __future__ import annotations

import pytest
import torch

from lowering.errors import VerificationError
from lowering.verify import compare, tolerance, verify


class Identity(torch.nn.Module):
    def forward(self, *tensors):
        return tensors


def outcome(actual: torch.Tensor, expected: torch.Tensor, *, quantized: bool = False) -> str | None:
    return compare(0, actual, expected, quantized=quantized).problem


def fp8(*values: float) -> torch.Tensor:
    return torch.tensor(values).to(torch.float8_e4m3fn)


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
    assert "relative error" in (outcome(wrong, expected) or "")


def test_a_quantizing_model_gets_more_room_but_not_for_a_wrong_group():
    expected = torch.randn(64, 64)
    noisy = expected + 0.02 * torch.randn(64, 64)
    assert outcome(noisy, expected) is not None
    assert outcome(noisy, expected, quantized=True) is None
    swapped = expected.roll(32, dims=1)
    assert outcome(swapped, expected, quantized=True) is not None


def test_a_rare_step_of_fp8_is_rounding_and_a_frequent_one_is_not():
    expected = torch.ones(4096).to(torch.float8_e4m3fn)
    bits = expected.view(torch.uint8).clone()
    bits[7] += 1
    assert outcome(bits.view(torch.float8_e4m3fn), expected) is None
    bits[7] += 1
    assert (
        outcome(bits.view(torch.float8_e4m3fn), expected)
        == "differs by up to 2 representable values, 1 allowed"
    )
    bits = expected.view(torch.uint8).clone()
    bits[:100] += 1
    assert "2.44% of the elements differ" in (outcome(bits.view(torch.float8_e4m3fn), expected) or "")


def test_steps_of_fp8_are_counted_across_zero():
    smallest = fp8(2**-9)
    assert outcome(fp8(-(2**-9)), smallest) == "differs by up to 2 representable values, 1 allowed"
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
    assert "output 1: relative error 1.0e+00" in text
    assert text.count("float32") == 2 and "DIFFERS" in text and "ok" in text


def test_a_model_that_writes_into_its_arguments_is_compared_fairly():
    class Adds(torch.nn.Module):
        def forward(self, x):
            return x.add_(1)

    x = torch.zeros(3)
    assert verify(lambda x: x.add_(1), Adds(), (x,)).ok
    assert torch.equal(x, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_float_has_a_tolerance_below_that_of_a_quantizing_model(dtype):
    assert 0 < tolerance(dtype, quantized=False).error <= tolerance(dtype, quantized=True).error
