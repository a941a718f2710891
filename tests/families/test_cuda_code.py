"""The machine code of the CUDA kernels, read without a GPU: no spills, wide accesses, few instructions.

A budget is how many instructions a lane may execute for each element in the time its bytes need: 23.6 for 3
bytes on an H200, 13.1 on a B200 (lanes times clock over memory bandwidth).
"""

from __future__ import annotations

from collections import Counter

import pytest

from lowering.backends.toolchain import compile_kernel
from lowering.families.instance import KernelInstance
from lowering.families.row import instance
from lowering.families.row_mapping import choose_mapping
from lowering.targets import resolve

sass = pytest.importorskip("tools.gpu.sass")
families = pytest.importorskip("tools.kernel_families")

BUDGET = {"sm_90": 23.6 / 3, "sm_100": 13.1 / 3}  # of each byte of an element
OVER = {("silu*up, quant", "sm_100"): 1.15}  # exp in float32 to the last bit costs more than its bytes
REGISTERS = 65536
TARGETS = ("sm_90", "sm_100")


def bytes_per_element(kernel: KernelInstance) -> int:
    spec = kernel.spec
    inputs = 1 + bool(spec.gate) + bool(spec.norm and spec.norm.residual)
    return 2 * (inputs + spec.writes_sum + spec.writes_y) + len(spec.quantizations)


def code_of(kernel: KernelInstance) -> sass.Code:
    try:
        return sass.read(compile_kernel(kernel))
    except sass.ToolchainError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_main_path(name: str, target: str) -> None:
    kernel = sass.of_many_rows(families.FAMILIES[name](7168), resolve(target))
    code = code_of(kernel)
    names = Counter(instruction.name for instruction in code.main_path())

    def count(prefix: str) -> int:
        return sum(number for name, number in names.items() if name.startswith(prefix))

    budget = BUDGET[target] * bytes_per_element(kernel) * OVER.get((name, target), 1.0)
    assert sass.instructions_per_element(kernel, code) <= budget
    assert not count("LDG.E.U16") and not count("STG.E.U8"), "single elements on the main path"
    wide = count("LDG.E.128") + count("LDG.E.ENL2.256")
    assert wide >= choose_mapping(kernel.spec, kernel.target).many.vectors
    assert count("F2FP.SATFINITE.E4M3") >= 2, "fp8 codes are converted in pairs"
    if target == "sm_100":
        assert count("FMUL2") + count("FFMA2") >= 8, "float32 arithmetic is packed"
        assert count("LDG.E.ENL2.256") > 0, "reads are of 32 bytes"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("hidden", [1536, 7168])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_nothing_spills_and_the_wanted_workgroups_fit(name: str, hidden: int, target: str) -> None:
    kernel = instance(families.FAMILIES[name](hidden), resolve(target))
    code = code_of(kernel)
    spills = [instruction for instruction in code.instructions if instruction.name.startswith(("LDL", "STL"))]
    assert not spills
    mapping = choose_mapping(kernel.spec, kernel.target)
    # Registers are given to waves in portions of 8 a lane, on one of four schedulers each.
    portion = -(-code.registers // 8) * 8 * 32
    waves = -(-mapping.threads * mapping.resident // 32)
    assert -(-waves // 4) * portion <= REGISTERS // 4
    assert mapping.many.blocks == 0 or mapping.resident * 132 <= mapping.many.blocks


# Of a bias at 7168 on sm_100, which was not measured, 10 of 128 registers are stored for a while.
@pytest.mark.parametrize(("hidden", "target"), [(1536, "sm_90"), (7168, "sm_90"), (1536, "sm_100")])
@pytest.mark.parametrize("name", ["layer norm, by a given scale", "norm of silu*x in groups, of float32"])
def test_a_bias_and_groups_do_not_spill(name: str, hidden: int, target: str) -> None:
    code = code_of(instance(families.CHECKED[name](hidden), resolve(target)))
    assert not [i for i in code.instructions if i.name.startswith(("LDL", "STL"))]


def test_a_path_goes_around_what_is_rare() -> None:
    def line(text: str, guard: str = "", *labels: str) -> sass.Instruction:
        return sass.Instruction(guard, text, labels)

    code = sass.Code(
        (
            line("MOV R1, R2"),
            line("BRA `(.L_x_1)", "@!P0"),
            line("CALL.REL.NOINC `(.L_x_9)"),
            line("FADD R1, R2, R3", "", ".L_x_1"),
            line("BRA.DIV UR4, `(.L_x_2)"),
            line("EXIT"),
            line("LDG.E.U16 R1", "", ".L_x_2"),
            line("EXIT"),
        ),
        registers=8,
    )
    assert [i.text for i in code.main_path()] == [
        "MOV R1, R2",
        "BRA `(.L_x_1)",
        "FADD R1, R2, R3",
        "BRA.DIV UR4, `(.L_x_2)",
        "EXIT",
    ]
