"""Running HIP kernel instances on the gfx950 executor, the way host_kernels.py runs CPU objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowering.backends import abi, commands, hip, toolchain
from lowering.families.instance import KernelInstance
from tests.families.host_kernels import Launch
from tools import gfx950


def launcher(kernel: KernelInstance, optimisation: str = "", **options: Any) -> Launch:
    """The code object of ``kernel``, checked against its bindings; inputs may only be read, and every byte
    of an output must be written.  ``optimisation`` (-O1) takes the place of the usual one."""
    data = _compiled(kernel, optimisation) if optimisation else toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    entry = gfx950.CodeObject(data).kernel(kernel.entry)

    def launch(pointers: Sequence[int], rows: int) -> None:
        memory = gfx950.Memory()
        sizes = [_bytes(kernel, i, rows) for i in range(len(pointers))]
        for binding, pointer, size in zip(kernel.bindings, pointers, sizes, strict=True):
            reads = binding.access == "read"
            if size:
                memory.add(pointer, size, writable=not reads, defined=reads)
        gfx950.execute(entry, kernel.grid(rows), kernel.block, [*pointers, rows], memory, **options)
        for binding, pointer, size in zip(kernel.bindings, pointers, sizes, strict=True):
            assert not size or not memory.undefined_bytes(pointer, size).any(), (
                f"{binding.name}: not all is written"
            )

    return launch


def _compiled(kernel: KernelInstance, optimisation: str) -> bytes:
    job = toolchain.job_of(kernel)
    return job.compiler.run(replace(job, options=(*job.options, optimisation)))


def _bytes(kernel: KernelInstance, index: int, rows: int) -> int:
    binding = kernel.bindings[index]
    return getattr(torch, binding.dtype).itemsize * torch.Size(kernel.shape(binding, rows)).numel()


# -- code objects from assembly and from HIP ----------------------------------------------------------

_ASSEMBLY = """
.text
.globl {name}
.p2align 8
.type {name},@function
{name}:
{body}
  s_endpgm
.section .rodata,"a"
.p2align 6
.amdhsa_kernel {name}
  .amdhsa_group_segment_fixed_size {lds}
  .amdhsa_private_segment_fixed_size {scratch}
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_system_sgpr_workgroup_id_x 1
  .amdhsa_system_vgpr_workitem_id 0
  .amdhsa_next_free_vgpr {registers}
  .amdhsa_next_free_sgpr 64
  .amdhsa_accum_offset {vgprs}
  .amdhsa_float_denorm_mode_32 3
  {directives}
.end_amdhsa_kernel
"""
_METADATA = """
  - .name: {name}
    .symbol: {name}.kd
    .kernarg_segment_size: {kernarg}
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: {scratch}
    .wavefront_size: 64
    .sgpr_count: 64
    .vgpr_count: {registers}
    .max_flat_workgroup_size: 1024
    .args: [{args}]"""


@dataclass(frozen=True)
class Assembly:
    """A kernel in assembly: s[0:1] is the address of its ``pointers`` arguments, s2 the workgroup."""

    name: str
    body: str
    pointers: int = 1
    lds: int = 0
    scratch: int = 0
    vgprs: int = 64
    agprs: int = 0
    directives: str = ""

    def fields(self) -> dict[str, object]:
        argument = "{{.offset: {}, .size: 8, .value_kind: global_buffer, .address_space: global}}"
        args = ", ".join(argument.format(8 * i) for i in range(self.pointers))
        derived = {"args": args, "kernarg": 8 * self.pointers, "registers": self.vgprs + self.agprs}
        return {**vars(self), **derived}


def assemble(kernels: Sequence[Assembly], arch: str = "gfx950") -> gfx950.CodeObject:
    """One code object of ``kernels``."""
    target = f"amdgcn-amd-amdhsa--{arch}"
    text = f'.amdgcn_target "{target}"\n' + "".join(_ASSEMBLY.format(**k.fields()) for k in kernels)
    metadata = "".join(_METADATA.format(**k.fields()) for k in kernels)
    text += (
        f".amdgpu_metadata\n---\namdhsa.version: [1, 2]\namdhsa.target: {target}\namdhsa.kernels:{metadata}\n"
    )
    return gfx950.CodeObject(_linked(text + "...\n.end_amdgpu_metadata\n", arch))


def compile_hip(source: str, arch: str = "gfx950", optimisation: str = "-O3") -> gfx950.CodeObject:
    """The code object of HIP ``source``, compiled as the project's kernels are."""
    options = [*hip.OPTIONS, f"--offload-arch={arch}", optimisation]
    with commands.directory_of((("kernel.hip", source),)) as directory:
        clang = hip.clang_and_lld().clang
        commands.call([*clang, *options, "-S", "kernel.hip", "-o", "kernel.s"], directory)
        return gfx950.CodeObject(_linked((directory / "kernel.s").read_text(), arch))


def _linked(assembly: str, arch: str) -> bytes:
    compiler = hip.clang_and_lld()
    with commands.directory_of((("kernel.s", assembly),)) as directory:
        options = ("--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-x", "assembler", "-c")
        commands.call([*compiler.clang, *options, "kernel.s", "-o", "kernel.o"], directory)
        commands.call([*compiler.lld, "-shared", "kernel.o", "-o", "kernel.hsaco"], directory)
        return (directory / "kernel.hsaco").read_bytes()
