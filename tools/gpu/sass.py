"""The machine code of a CUDA kernel, read without a GPU: what is executed for a row, with which registers.

    python -m tools.gpu.sass            # every family for sm_90 and sm_100, a line each

Needs ``nvdisasm`` (the wheel nvidia-cuda-nvdisasm).  The main path is what a wave executes for a row whose
tensors are aligned and whose scales are ordinary numbers: where no element is loaded by itself, nothing is
called and no rare scale is handled.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from elftools.elf.elffile import ELFFile

from lowering.errors import ToolchainError
from lowering.families.row import instance
from lowering.families.instance import KernelInstance
from lowering.families.row_mapping import Mapping as Lanes
from lowering.families.row_mapping import choose_mapping
from lowering.targets import Target, resolve
from lowering.backends.toolchain import compile_kernel
from patterns.contracts import RowSpec

_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P\d+)\s+)?(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_TARGET = re.compile(r"`\((\.L_x?_?\d+)\)")
_REGISTERS = 0x2F  # of the attributes in .nv.info
# What the main path keeps out of: single elements, slow paths of divisions, scales of 2^100 and more.
_ASIDE = re.compile(r"LDG\.E\.U16|LDG\.E\.U8|STG\.E\.U8|CALL|5\.42101\d+e-20")
_ASIDE_COST = 1000.0


@dataclass(frozen=True)
class Instruction:
    """``guard`` is its predicate, or empty."""

    guard: str
    text: str
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.text.split(" ")[0]

    @property
    def conditional(self) -> bool:
        """Tell whether a branch depends on something: a predicate, or as BRA.DIV and BRA.U do an operand."""
        return bool(self.guard) or not self.text.removeprefix(self.name).lstrip().startswith("`(")

    @property
    def target(self) -> str | None:
        """The label it branches to."""
        found = _TARGET.search(self.text)
        return found[1] if found and self.name.startswith("BRA") else None


@dataclass(frozen=True)
class Code:
    """One kernel."""

    instructions: tuple[Instruction, ...]
    registers: int

    def main_path(self) -> list[Instruction]:
        """What is executed for one row: the body of the loop over rows, or everything where there is none."""
        at = {label: i for i, instruction in enumerate(self.instructions) for label in instruction.labels}
        following = self._ways(at)
        path, there = [0], following[0]
        while there is not None and there > path[-1]:
            path.append(there)
            there = following[there]
        start = path.index(there) if there in path else 0  # where the last branch goes back to
        loop = [self.instructions[i] for i in path[start:]]
        reads = any(instruction.name.startswith("LDG") for instruction in loop)
        return loop if reads else [self.instructions[i] for i in path]

    def _ways(self, at: Mapping[str, int]) -> list[int | None]:
        """What follows each instruction on the way that has the least aside, and of those the most, in it."""
        count = len(self.instructions)
        worth = [0.0] * (count + 1)
        following: list[int | None] = [None] * count
        for here in reversed(range(count)):
            instruction = self.instructions[here]
            ends = instruction.name.startswith("EXIT") and not instruction.guard
            target = instruction.target
            choices = [here + 1] if not ends and (target is None or instruction.conditional) else []
            choices += [at[target]] if target else []
            values = {there: worth[there] if there > here else 0.0 for there in choices if there < count}
            following[here] = max(values, key=lambda there: values[there]) if values else None
            own = -_ASIDE_COST if _ASIDE.search(instruction.text) else 1.0
            worth[here] = own + max(values.values(), default=0.0)
        return following


def read(cubin: bytes) -> Code:
    """Disassemble the only kernel of ``cubin``.  Raises ToolchainError where nvdisasm is missing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True)
    return Code(tuple(_instructions(done.stdout.splitlines())), _register_count(cubin))


def _nvdisasm() -> str:
    package = find_spec("nvidia.cu13")
    for directory in package.submodule_search_locations or () if package else ():
        if (found := Path(directory) / "bin" / "nvdisasm").is_file():
            return str(found)
    raise ToolchainError("nvdisasm is missing. Install it with: pip install nvidia-cuda-nvdisasm")


def _instructions(lines: Sequence[str]) -> Iterator[Instruction]:
    labels: list[str] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _LINE.match(line):
            yield Instruction(found[1] or "", found[2], tuple(labels))
            labels = []


def _register_count(cubin: bytes) -> int:
    section = ELFFile(io.BytesIO(cubin)).get_section_by_name(".nv.info")
    data, at = section.data() if section else b"", 0
    while at < len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        size = size if kind == 4 else 0
        if attribute == _REGISTERS:
            return struct.unpack_from("<II", data, at + 4)[1]
        at += 4 + size
    raise ToolchainError("the cubin does not say how many registers its kernel has")


def of_many_rows(spec: RowSpec, target: Target) -> KernelInstance:
    """The kernel that ``spec`` gets, without its path for few rows."""
    return instance(spec, target, many_rows(spec, target))


def many_rows(spec: RowSpec, target: Target) -> Lanes:
    """The mapping of ``spec`` without its part for few rows."""
    mapping = choose_mapping(spec, target)
    return Lanes(mapping.many, resident=mapping.resident)


def instructions_per_element(kernel: KernelInstance, code: Code) -> float:
    """Executed by one lane for each element of a row."""
    assert isinstance(kernel.spec, RowSpec)
    tile = many_rows(kernel.spec, kernel.target).many
    return len(code.main_path()) * tile.batches * tile.lanes / kernel.spec.hidden


def main() -> int:
    """Print every family."""
    from tools.kernel_families import FAMILIES

    for name, family in FAMILIES.items():
        for target in ("sm_90", "sm_100"):
            kernel = of_many_rows(family(7168), resolve(target))
            code = read(compile_kernel(kernel))
            print(
                f"{name:24s} {target:7s} {instructions_per_element(kernel, code):5.1f} an element,"
                f" {code.registers} registers, {kernel.block[0]} threads"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
