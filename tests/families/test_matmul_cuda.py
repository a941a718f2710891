"""The product of NVIDIA GPUs without a GPU: the source in emulation, the machine code, and the plans.

``matmul_emulation.cpp`` runs the workgroups of a cluster as fibers, with either way to multiply: wgmma
(sm_90) and mma.sync (sm_100).
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from lowering.backends import abi, commands, toolchain
from lowering.families.instance import KernelInstance
from lowering.families.matmul.cuda import (
    ANY_ROWS,
    MOST_SPLIT,
    TOKENS,
    Plan,
    Plans,
    choose_plans,
    default_plans,
)
from lowering.families.matmul.family import instance, why_unsupported
from lowering.ops import block_scaled_matmul_reference
from lowering.targets import Target, resolve
from patterns.contracts import MatmulSpec, ScaleLayout, stored_rows
from tests.families.host_kernels import Launch, build_emulation, run
from tests.families.residual_cases import assert_adds
from tests.families.test_matmul import assert_product, in_memory, operands

sass = pytest.importorskip("tools.gpu.sass")

SM90, SM100 = resolve("sm_90"), resolve("sm_100")
SCALE_LAYOUTS: tuple[ScaleLayout, ...] = ("row", "column", "column_tma")


def spec(columns: int, depth: int, dtype: str = "bfloat16", **fields) -> MatmulSpec:
    codes, group = fields.pop("codes", "float8_e4m3fn"), fields.pop("group", 128)
    return MatmulSpec(columns, depth, group, codes, codes, dtype, b_layout="swizzled_128", **fields)


def per_channel(columns: int, depth: int, dtype: str = "bfloat16", **fields) -> MatmulSpec:
    return spec(columns, depth, dtype, **{"group": depth, "b_scales": "rows", **fields})


def swizzled(b: torch.Tensor) -> torch.Tensor:
    """The bytes of b in the layout ``swizzled_128``, byte by byte."""
    rows, depth = stored_rows(len(b), "swizzled_128"), b.shape[1]
    n, k = torch.meshgrid(torch.arange(len(b)), torch.arange(depth), indexing="ij")
    chunk = (k % 128 // 16) ^ (n % 8)
    place = n // 128 * 128 * depth + k // 128 * 16384 + n % 128 * 128 + chunk * 16 + k % 16
    bytes_ = torch.zeros(rows * depth, dtype=torch.uint8)
    bytes_[place] = b.view(torch.uint8)
    return bytes_.view(b.dtype).reshape(rows, depth)


def multiply(kernel: KernelInstance, launch: Launch, rows: int, shift: int = 0) -> None:
    """Run the kernel and compare what it wrote with float64."""
    case = kernel.spec
    assert isinstance(case, MatmulSpec)
    tensors = operands(case, rows, seed=rows)
    given = in_memory(case, tensors)
    given[1] = swizzled(given[1])
    (actual,) = run(kernel, launch, given, rows, shift, aligned=["b"])
    assert_product(case, actual, tensors)


@pytest.fixture(scope="session")
def emulated(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[KernelInstance, bool], Callable[[int], Launch]]:
    """The source compiled for the host: what launches it, for any number of clusters."""

    def build(kernel: KernelInstance, wgmma: bool) -> Callable[[int], Launch]:
        library = tmp_path_factory.mktemp("emulated") / "emulated.so"
        values = {
            **dict(kernel.defines),
            "HAS_WGMMA": int(wgmma),
            "MOST_STAGES": 4,
        }  # so that the ring closes
        source = Path(__file__).with_name("matmul_emulation.cpp")
        build_emulation(source, library, values, commands.kernel_source_dir(), "-O2")
        entry = ctypes.CDLL(str(library)).launch
        cluster = int(dict(kernel.defines)["CLUSTER"])

        def launch(clusters: int, pointers: Sequence[int], rows: int) -> None:
            array = (ctypes.c_void_p * len(pointers))(*pointers)
            entry(array, ctypes.c_int(rows), ctypes.c_int(clusters * cluster))

        return lambda clusters: partial(launch, clusters)

    return build


# -- the source, in emulation ---------------------------------------------------------------------------

# name: spec, plans, clusters, numbers of rows
CASES: dict[str, tuple[MatmulSpec, Plans, int, tuple[int, ...]]] = {
    "few_rows": (spec(200, 384), (Plan(8, 8), Plan(16, 16), Plan(ANY_ROWS, 32)), 1, (0, 1, 8, 9, 33)),
    "k_is_split": (spec(136, 2432, bias=True), (Plan(8, 8, 4), Plan(ANY_ROWS, 16, 3)), 2, (1, 7, 19)),
    "weights_are_shared": (spec(260, 256, "float16"), (Plan(ANY_ROWS, 32, share=2),), 2, (1, 33, 70)),
    "many_rows": (spec(300, 256, "float32", bias=True), (Plan(ANY_ROWS, 128),), 1, (150,)),
    "many_rows_and_split": (spec(200, 512), (Plan(ANY_ROWS, 128, split=2),), 1, (140,)),
    "middle": (spec(3, 128, "float16", bias=True), (Plan(ANY_ROWS, 64),), 1, (65,)),
    "per_token_and_channel": (
        per_channel(204, 384, bias=True),
        (Plan(8, 8, 2), Plan(ANY_ROWS, 32)),
        1,
        (5, 33),
    ),
    "integers": (
        per_channel(204, 640, bias=True, codes="int8", bias_rounding="twice"),
        (Plan(8, 8, 2), Plan(16, 16, 5), Plan(ANY_ROWS, 32, share=2)),
        1,
        (5, 9, 33),
    ),
    "many_integers": (
        per_channel(140, 256, "float16", codes="int8", a_scales="one"),
        (Plan(ANY_ROWS, 128),),
        1,
        (140,),
    ),
    "many_per_channel": (per_channel(300, 256, "float16"), (Plan(ANY_ROWS, 128),), 1, (140,)),
    "per_tensor": (
        per_channel(131, 256, "float32", a_scales="one", b_scales="one"),
        (Plan(ANY_ROWS, 16),),
        1,
        (19,),
    ),
}


# Results are stored the same with either way to multiply: scales of channels and tensors are tried with one.
WAYS = [
    (name, wgmma)
    for name, (case, *_) in CASES.items()
    for wgmma in (True, False)
    if wgmma or case.b_scales == "blocks" or name == "integers"
]


@pytest.mark.parametrize(("name", "wgmma"), WAYS, ids=[f"{name}-{'wg' * wgmma}mma" for name, wgmma in WAYS])
def test_emulated_kernel_is_within_the_bound(name: str, wgmma: bool, emulated) -> None:
    """Few and many tokens in a unit, teams that split K or share weights, every layout of scales."""
    case, plans, clusters, counts = CASES[name]
    layout = SCALE_LAYOUTS[len(name) % 3] if case.a_scales == "rows" else "row"
    kernel = instance(dataclasses.replace(case, a_scale_layout=layout), SM90, plans)
    launch = emulated(kernel, wgmma)(clusters)
    for rows in counts:
        multiply(kernel, launch, rows)


@pytest.mark.parametrize("name", ["k_is_split", "integers", "many_per_channel", "per_tensor"])
def test_a_residual_is_added(name: str, emulated) -> None:
    """To every dtype of results, from any place."""
    case, plans, clusters, counts = CASES[name]
    adding = dataclasses.replace(case, residual=True)
    plain, kernel = (instance(each, SM90, plans) for each in (case, adding))
    built = {each: emulated(each, True)(clusters) for each in (plain, kernel)}
    for shift, rows in enumerate(counts[:2]):
        tensors = in_memory(case, operands(case, rows, seed=rows))
        tensors[1] = swizzled(tensors[1])
        assert_adds(plain, kernel, built.__getitem__, tensors, rows, 8 * shift)


def test_operands_may_start_anywhere_but_for_weights(emulated) -> None:
    kernel = instance(spec(200, 256, bias=True), SM90, (Plan(ANY_ROWS, 16, split=2),))
    launch = emulated(kernel, True)(1)
    for shift in (1, 3, 8):
        multiply(kernel, launch, 19, shift)


def test_any_number_of_clusters_gives_the_same(emulated) -> None:
    kernel = instance(spec(700, 256, "float32"), SM90, (Plan(ANY_ROWS, 8, split=2),))
    case = kernel.spec
    assert isinstance(case, MatmulSpec)
    tensors = operands(case, 20)
    given = in_memory(case, tensors)
    given[1] = swizzled(given[1])
    launcher = emulated(kernel, True)
    results = [run(kernel, launcher(clusters), given, 20)[0] for clusters in (1, 2, 5, 20)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("wgmma", [True, False], ids=["wgmma", "mma"])
def test_special_scales(wgmma: bool, emulated) -> None:
    """Zero, infinite and NaN scales, of either operand: finite exactly where the reference is."""
    kernel = instance(spec(40, 256, "float32"), SM90, (Plan(ANY_ROWS, 8),))
    case, launch = kernel.spec, emulated(kernel, wgmma)(1)
    assert isinstance(case, MatmulSpec)
    a, b, a_scale, b_scale = operands(case, 6)
    a, b = (torch.where(t.view(torch.uint8) % 128 == 0, 1, t.view(torch.uint8)).view(t.dtype) for t in (a, b))
    for value in (0.0, torch.inf, torch.nan, 2.0**-149):
        for which in (2, 3):
            tensors = [a, b, a_scale.clone(), b_scale.clone()]
            tensors[which][0, 1] = value
            (found,) = run(kernel, launch, [a, swizzled(b), *tensors[2:]], 6)
            expected = block_scaled_matmul_reference(a, b, tensors[2], tensors[3], torch.float32)
            assert torch.equal(found.isfinite(), expected.isfinite()), value
            finite = found.isfinite()
            torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-2)


# -- the machine code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda target: target.name)
@pytest.mark.parametrize(("columns", "depth"), [(2048, 7168), (36864, 7168), (576, 1536)])
def test_machine_code(columns: int, depth: int, target: Target) -> None:
    """Nothing spills, what a workgroup needs is there, and the instructions are those that were meant."""
    kernel = instance(spec(columns, depth, bias=True, a_scale_layout="column_tma"), target)
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    try:
        code = sass.read(data)
    except sass.ToolchainError as error:
        pytest.skip(str(error))
    names = Counter(instruction.name.split(".")[0] for instruction in code.instructions)
    assert not names["LDL"] and not names["STL"]
    assert code.registers * kernel.block[0] <= 65536 and kernel.dynamic_shared <= 227 << 10
    assert names["UBLKCP"] and names["LDGSTS"] and names["USETMAXREG"]
    if target is SM90:
        shapes = {i.name.split(".")[1] for i in code.instructions if i.name.startswith("QGMMA")}
        tokens = {plan.tokens for plan in choose_plans(spec(columns, depth), target)}
        assert shapes == {f"64x{count}x32" for count in tokens}
        assert not names["HMMA"]
    else:
        assert names["HMMA"] and names["LDSM"] and not names["QGMMA"]


def test_products_are_not_serialised() -> None:
    """The assembler says so where it cannot keep several wgmma under way."""
    kernel = instance(spec(2048, 7168), SM90)
    text = toolchain.ptx(kernel)
    assert text.count("wgmma.mma_async") > 4 * len(
        TOKENS["sm_90"]
    )  # several blocks at once where tokens are few
    code = sass.read(toolchain.compile_kernel(kernel))
    waits = Counter(i.text.split()[-1] for i in code.instructions if i.name == "WARPGROUP.DEPBAR.LE")
    assert set(waits) >= {"0x0", "0x1", "0x2", "0x3"}


# -- plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda target: target.name)
@pytest.mark.parametrize("columns", [1, 576, 2048, 4096, 7168, 24576, 36864, 129280])
@pytest.mark.parametrize("depth", [128, 1536, 7168, 18432])
def test_plans_are_possible(columns: int, depth: int, target: Target) -> None:
    case = spec(columns, depth)
    for plans in (choose_plans(case, target), default_plans(case, target)):
        rows = [plan.rows for plan in plans]
        assert rows == sorted(set(rows)) and rows[-1] == ANY_ROWS
        for plan in plans:
            assert plan.tokens in TOKENS[target.name] and min(plan.split, plan.share) == 1
            assert plan.split <= min(MOST_SPLIT, depth // 128) and plan.share in (1, 2, 4, 8)
    kernel = instance(case, target)
    cluster = int(dict(kernel.defines)["CLUSTER"])
    grids = {kernel.grid(count) for count in (0, 1, 100, 100000)}
    assert len(grids) == 1 and grids.pop()[0] % cluster == 0


def test_what_was_measured_is_what_is_chosen() -> None:
    """The rule splits K where columns are few; on an H200 the file of plans says more."""
    assert default_plans(spec(2048, 7168), SM100)[0].split > 1
    assert default_plans(spec(36864, 7168), SM90)[0] == Plan(8, 8)
    assert choose_plans(spec(4096, 7168), SM90) != default_plans(spec(4096, 7168), SM90)
    assert choose_plans(spec(4096, 7168), SM100) == default_plans(spec(4096, 7168), SM100)


def test_tuning_keeps_a_plan_until_another_is_clearly_faster() -> None:
    tune = pytest.importorskip("tune_gemm")
    few, many = Plan(ANY_ROWS, 8, split=2), Plan(ANY_ROWS, 64)
    times = [{few: 10.0, many: 11.0}] * 3 + [{few: 10.1, many: 10.0}] * 3 + [{many: 10.0, few: 12.0}] * 4
    plans, cost = tune.choose(times)
    assert plans == [dataclasses.replace(few, rows=tune.ROWS[5]), many]
    assert cost == pytest.approx(10 * math.log(10.0))
    assert tune.best_of([([few], 2.0), ([many], 1.0)]) == [many]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            dataclasses.replace(spec(128, 128), group=64),
            "groups of 128 and rows of whole ones, not 64",
        ),
        (
            dataclasses.replace(spec(128, 128), a_dtype="float8_e4m3fnuz", b_dtype="float8_e4m3fnuz"),
            "multiplies float8_e4m3fn or int8, not float8_e4m3fnuz and float8_e4m3fnuz",
        ),
        (spec(128, 256, codes="int8"), "int8 with whole scales of up to 131071 codes"),
        (spec(128, 192), "rows of whole 128 elements, not of 192"),
        (spec(128, 128, a_scale_layout="ue8m0_packed"), "reads a_scale in"),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(case: MatmulSpec, reason: str) -> None:
    assert reason in (why_unsupported(case, SM90) or "")
