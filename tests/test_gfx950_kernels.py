"""Every HIP kernel of this repository, executed: machine code for gfx950 and gfx942 against eager PyTorch.

The executor (tools/gfx950) runs the bytes that would run on the GPU, and watches for accesses out of
bounds, reads of what is undefined, LDS races and missing waits while it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gfx950_kernels
import pytest
from test_kernels import (
    CASES,
    GFX942,
    GFX950,
    PRODUCERS,
    SCHEME_CASES,
    SCHEMES,
    assert_same,
    integer_inputs,
    reference,
    run,
    scheme_case,
)

from lowering.kernel import KernelInstance, instance, why_unsupported
from lowering.targets import Target
from patterns.contracts import RowSpec


@pytest.fixture(scope="module")
def launcher() -> Callable[[KernelInstance], gfx950_kernels.Launch]:
    """Builds each instance once."""
    built: dict[tuple[str, str], gfx950_kernels.Launch] = {}

    def build(kernel: KernelInstance) -> gfx950_kernels.Launch:
        key = (kernel.target.arch, kernel.entry)
        if key not in built:
            built[key] = gfx950_kernels.launcher(kernel)
        return built[key]

    return build


def check(case: RowSpec, target: Target, launcher, sizes: list[tuple[int, int]]) -> None:
    """Equal bit for bit, for (rows, elements the pointers are off their alignment)."""
    kernel = instance(case, target)
    for rows, shift in sizes:
        inputs = integer_inputs(case, rows, seed=rows)
        actual = run(kernel, launcher(kernel), inputs, rows, shift)
        assert_same(actual, reference(case, inputs), (kernel.entry, rows, shift))


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
    check(scheme_case(*case), target, launcher, [(5, 0), (2, 3), (0, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("target", [GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_scheme_of_every_producer(producer: str, schemes: str, target: Target, launcher) -> None:
    for hidden in (384, 3200):
        case = scheme_case(producer, schemes, hidden)
        if why_unsupported(case, target) is None:
            check(case, target, launcher, [(5, 0), (2, 3), (17, 1)])
