"""The block-scaled product of NVIDIA GPUs without a GPU: the source in emulation, the machine code, the plans.

``matmul_emulation.cpp`` runs workgroups of a cluster as fibers, with either way to multiply: wgmma (sm_90) and
mma.sync (sm_100).
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_kernels import Launch, cxx_compiler, run
from test_matmul import assert_product, in_memory, operands

from lowering import toolchain
from lowering.kernel import KernelInstance
from lowering.matmul_cuda import ANY_ROWS, Plan, Plans
from lowering.matmul_kernel import instance
from lowering.targets import resolve
from patterns.contracts import MatmulSpec, ScaleLayout, stored_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

sass = pytest.importorskip("sass")

SM90, SM100 = resolve("sm_90"), resolve("sm_100")
SCALE_LAYOUTS: tuple[ScaleLayout, ...] = ("row", "column", "column_tma")


def spec(columns: int, depth: int, dtype: str = "bfloat16", **fields) -> MatmulSpec:
    codes = "float8_e4m3fn"
    return MatmulSpec(columns, depth, 128, codes, codes, dtype, b_layout="swizzled_128", **fields)


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
    (actual,) = run(kernel, launch, given, rows, shift)
    assert_product(case, actual, tensors)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[KernelInstance, bool, int], Launch]:
    """The source compiled for the host, which runs in ``clusters`` clusters."""

    def build(kernel: KernelInstance, wgmma: bool, clusters: int) -> Launch:
        library = tmp_path_factory.mktemp("emulated") / "emulated.so"
        values = {
            **dict(kernel.defines),
            "HAS_WGMMA": int(wgmma),
            "MOST_STAGES": 4,
        }  # so that the ring closes
        defines = [f"-D{name}={value}" for name, value in values.items()]
        sources = [
            f"-I{toolchain.kernel_source_dir()}",
            str(Path(__file__).with_name("matmul_emulation.cpp")),
        ]
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
        subprocess.run([cxx_compiler(), *flags, *defines, *sources, "-o", str(library)], check=True)
        entry = ctypes.CDLL(str(library)).launch
        cluster = int(dict(kernel.defines)["CLUSTER"])

        def launch(pointers, rows: int) -> None:
            array = (ctypes.c_void_p * len(pointers))(*pointers)
            entry(array, ctypes.c_int(rows), ctypes.c_int(clusters * cluster))

        return launch

    return build


# name: spec, plans, clusters, numbers of rows
CASES: dict[str, tuple[MatmulSpec, Plans, int, tuple[int, ...]]] = {
    "few_rows": (spec(200, 384), (Plan(8, 8), Plan(16, 16), Plan(ANY_ROWS, 32)), 1, (0, 1, 8, 9, 33)),
    "k_is_split": (spec(136, 2432, bias=True), (Plan(8, 8, 4), Plan(ANY_ROWS, 16, 2)), 2, (1, 7, 19)),
    "weights_are_shared": (spec(260, 256, "float16"), (Plan(ANY_ROWS, 32, share=2),), 2, (1, 33, 70)),
    "many_rows": (spec(300, 256, "float32", bias=True), (Plan(ANY_ROWS, 128),), 1, (150,)),
    "middle": (spec(3, 128, "float16", bias=True), (Plan(ANY_ROWS, 64),), 1, (65,)),
}


@pytest.mark.parametrize("wgmma", [True, False], ids=["wgmma", "mma"])
@pytest.mark.parametrize("name", CASES)
def test_emulated_kernel_is_within_the_bound(name: str, wgmma: bool, emulated) -> None:
    """Every plan, every layout of scales, operands that start anywhere but for weights."""
    case, plans, clusters, counts = CASES[name]
    layout = SCALE_LAYOUTS[len(name) % 3]
    kernel = instance(dataclasses.replace(case, a_scale_layout=layout), SM90, plans)
    launch = emulated(kernel, wgmma, clusters)
    for rows in counts:
        multiply(kernel, launch, rows)
