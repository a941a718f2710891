"""Every HIP kernel of this repository, executed: machine code for gfx950 and gfx942 against eager PyTorch.

The executor (tools/gfx950) runs the bytes that would run on the GPU, and watches for accesses out of
bounds, reads of what is undefined, LDS races and missing waits while it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch

from lowering.families.instance import KernelInstance
from lowering.families.row import instance
from lowering.families.row_support import why_unsupported
from lowering.targets import Target
from tests.families import test_row_activations as activations
from tests.families import test_row_kernel as row_kernel
from tests.families import test_row_quantizations as quantizations
from tests.families import test_topk
from tests.families.host_kernels import Launch, assert_same, run
from tests.families.row_cases import (
    CASES,
    GFX942,
    GFX950,
    PRODUCERS,
    SCHEME_CASES,
    SCHEMES,
    integer_inputs,
    scheme_case,
    scheme_lengths,
)
from tests.families.row_reference import check, reference
from tests.gfx950 import gfx950_kernels


@pytest.fixture(scope="module")
def launcher() -> Callable[[KernelInstance], Launch]:
    """Builds each instance once."""
    return cache(gfx950_kernels.launcher)


SUPPORTED = [
    (name, target)
    for name, target in itertools.product(CASES, (GFX950, GFX942))
    if why_unsupported(CASES[name], target) is None
]


@pytest.mark.parametrize(("name", "target"), SUPPORTED, ids=lambda value: getattr(value, "name", value))
def test_equals_eager_torch(name: str, target: Target, launcher) -> None:
    check(CASES[name], target, launcher, [(0, 0), (1, 0), (3, 1), (17, 0), (5, 5)])


SCHEME_TARGETS = [
    *((case, GFX950) for case in SCHEME_CASES),
    *(((producer, "fnuz", 640), GFX942) for producer in PRODUCERS),
]


@pytest.mark.parametrize(
    ("case", "target"),
    SCHEME_TARGETS,
    ids=lambda value: getattr(value, "name", None) or "-".join(map(str, value)),
)
def test_schemes(case: tuple[str, str, int], target: Target, launcher) -> None:
    check(scheme_case(*case), target, launcher)


# Those that use approximate instructions: reciprocals of a scale, of a root, and the root itself.
APPROXIMATING = ["once", "add_exact_all", "f32", "no_floor", "f16_twice"]


@pytest.mark.parametrize("ulp", [1, -1])
@pytest.mark.parametrize("name", APPROXIMATING)
def test_no_result_hangs_on_an_approximation(name: str, ulp: int) -> None:
    """Bit for bit the same when v_rcp_f32 and v_sqrt_f32 are off by one in the last place, as they may be."""
    kernel = instance(CASES[name], GFX950)
    inputs = integer_inputs(CASES[name], 5, seed=1)
    actual = run(kernel, gfx950_kernels.launcher(kernel, ulp=ulp), inputs, 5)
    assert_same(actual, reference(CASES[name], inputs), (name, ulp))


SPECIAL_SCHEMES = ("layouts", "rows", "bounds", "inverse")
# Tests of the row kernel for this machine: the test, and its arguments before target and launcher.
AS_ELSEWHERE = [
    *((activations.test_activations, activation) for activation in ("silu", "gelu", "gelu_tanh")),
    *((activations.test_special_gates, activation) for activation in ("silu", "gelu", "gelu_tanh")),
    *((quantizations.test_special_values_of_schemes, schemes) for schemes in SPECIAL_SCHEMES),
    *((row_kernel.test_special_values, name) for name in ("plain", "none", "f32", "f16_once", "no_floor")),
    *((row_kernel.test_random_rows, name) for name in ("once", "add_exact_all", "none")),
    *((quantizations.test_every_16_bit_amax, dtype) for dtype in ("bfloat16", "float16")),
    (quantizations.test_quotients_of_float32,),
    (quantizations.test_packed_scales,),
    (quantizations.test_given_scales_of_every_magnitude,),
    (activations.test_quantizations_of_a_random_gate,),
    (row_kernel.test_rows_of_any_length_where_nothing_depends_on_all,),
]


@pytest.mark.parametrize("what", AS_ELSEWHERE, ids=lambda what: "-".join([what[0].__name__, *what[1:]]))
def test_as_elsewhere(what: tuple, launcher) -> None:
    test, *arguments = what
    test(*arguments, GFX950, launcher)


# Tests of routing likewise.
ROUTING = [
    *((test_topk.test_kernel_equals_reference, name) for name in test_topk.CASES),
    *((test_topk.test_any_sizes, groups) for groups in (1, 3, 8)),
    *((test_topk.test_scores_are_the_nearest_float32, scores) for scores in test_topk.EXACT),
]


@pytest.mark.parametrize("target", [GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("what", ROUTING, ids=lambda what: "-".join(map(str, (what[0].__name__, *what[1:]))))
def test_routing(what: tuple, target: Target, launcher) -> None:
    test, *arguments = what
    test(*arguments, target, launcher)


@pytest.mark.parametrize("ulp", [1, -1])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_keep_their_bounds(activation: str, ulp: int) -> None:
    """Whatever the last place of v_rcp_f32."""
    activations.test_activations(activation, GFX950, partial(gfx950_kernels.launcher, ulp=ulp))


@pytest.mark.parametrize("name", ["once", "none", "f32_narrow_weight"])
def test_results_do_not_depend_on_the_optimiser(name: str, launcher) -> None:
    """The same bytes from code compiled at -O1 and at -O3."""
    case = CASES[name]
    kernel = instance(case, GFX950)
    generator = torch.Generator().manual_seed(6)
    inputs = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in integer_inputs(case, 5)]
    slow = gfx950_kernels.launcher(kernel, optimisation="-O1")
    assert_same(run(kernel, slow, inputs, 5), run(kernel, launcher(kernel), inputs, 5), name)


@pytest.mark.slow
@pytest.mark.parametrize("target", [GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_scheme_of_every_producer(producer: str, schemes: str, target: Target, launcher) -> None:
    for hidden in scheme_lengths(producer, schemes, target):
        case = scheme_case(producer, schemes, hidden)
        if why_unsupported(case, target) is None:
            check(case, target, launcher, [(5, 0), (2, 3), (17, 1)])
