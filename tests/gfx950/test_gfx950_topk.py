"""The routing kernel's machine code for gfx950 and gfx942, executed: bit for bit what eager computes."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from lowering.families.grouped_topk import instance
from lowering.ops.grouped_topk import grouped_topk_reference
from lowering.targets import Target
from tests.families import test_topk
from tests.families.host_kernels import run
from tests.families.test_topk import CASES, EXACT, GFX942, GFX950, assert_routed, expected_of, tokens
from tests.gfx950 import gfx950_kernels


@pytest.fixture(scope="module")
def launcher():
    """Builds each instance once."""
    return cache(gfx950_kernels.launcher)


@pytest.mark.parametrize(
    ("name", "target"),
    list(itertools.product(CASES, [GFX950, GFX942])),
    ids=lambda value: getattr(value, "name", value),
)
def test_kernel_equals_reference(name: str, target: Target, launcher) -> None:
    test_topk.test_kernel_equals_reference(name, target, launcher)


@pytest.mark.parametrize("ulp", [1, -1])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "gpt_oss"])
def test_no_result_hangs_on_an_approximation(name: str, ulp: int) -> None:
    """Nor when v_rcp_f32 and v_sqrt_f32 are off by one in the last place."""
    case = CASES[name]
    kernel = instance(case, GFX950)
    given = tokens(case, 37, seed=ulp)
    actual = run(kernel, gfx950_kernels.launcher(kernel, ulp=ulp), given, 37)
    assert_routed(actual, expected_of(case, GFX950, *given))


@pytest.mark.parametrize("scores", EXACT)
def test_scores_are_the_nearest_float32(scores: str, launcher) -> None:
    test_topk.test_scores_are_the_nearest_float32(scores, GFX950, launcher)


def test_a_full_batch(launcher) -> None:
    """1024 tokens of the model this is for, as random as they come."""
    case = CASES["deepseek_v3"]
    kernel = instance(case, GFX950)
    gating, bias = torch.randn(1024, 256).bfloat16(), torch.randn(256) * 0.1
    expected = grouped_topk_reference(gating, bias, case.routing)
    assert_routed(run(kernel, launcher(kernel), [gating, bias], 1024), expected)
