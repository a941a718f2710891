"""AMD: clang and lld, and code objects."""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ToolchainError
from ..families.instance import KernelInstance
from ..host_compiler import ziglang
from .base import Backend
from .commands import Compiler, Job, call, directory_of, version
from .embed import extern_dispatch
from .objects import ObjectAbi, Parameter, check_parameters, elf_of, unreadable

OPTIONS = (
    *("-x", "hip", "--offload-device-only", "-nogpulib", "-nogpuinc", "--no-gpu-bundle-output"),
    *("-fuse-cuid=none", "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-w"),
)


@dataclass(frozen=True)
class Clang(Compiler):
    """clang with the amdgcn back end, and the lld that belongs to it, as commands."""

    clang: tuple[str, ...] = ()
    lld: tuple[str, ...] = ()

    def run(self, job: Job) -> bytes:
        """Compile to assembly, assemble, link: clang's own link step wants helpers no wheel ships."""
        arch = next(option for option in job.options if option.startswith("--offload-arch=")).split("=")[1]
        with directory_of(job.texts) as directory:
            call([*self.clang, *job.options, "-S", job.source, "-o", "kernel.s"], directory)
            assemble = ("--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-x", "assembler", "-c")
            call([*self.clang, *assemble, "kernel.s", "-o", "kernel.o"], directory)
            call([*self.lld, "-shared", "kernel.o", "-o", "kernel.hsaco"], directory)
            return (directory / "kernel.hsaco").read_bytes()


def assembly(job: Job) -> str:
    """The assembly of a compilation."""
    assert isinstance(job.compiler, Clang), job
    with directory_of(job.texts) as directory:
        call([*job.compiler.clang, *job.options, "-S", job.source, "-o", "kernel.s"], directory)
        return (directory / "kernel.s").read_text()


@functools.cache
def clang_and_lld() -> Clang:
    """Those of the ziglang wheel, or on PATH; ToolchainError, naming the extra, without any."""
    if zig := ziglang():
        clang, lld = (*zig, "clang"), (*zig, "ld.lld")
        return Clang("ziglang clang", version(clang), clang, lld)
    for name in ("amdclang++", "clang++", "clang"):
        found = shutil.which(name)
        linker = _linker_beside(found) if found else None
        if found and linker and _knows_amdgcn(found):
            return Clang(name, version((found,)) + version((linker,)), (found,), (linker,))
    raise ToolchainError(
        "A clang with the amdgcn back end, which compiles kernels for AMD GPUs, is missing. "
        "Install one with: pip install 'vmfuse[hip]'"
    )


def _linker_beside(clang: str) -> str | None:
    """The ld.lld that belongs to ``clang``, else the one on PATH."""
    return shutil.which("ld.lld", path=str(Path(clang).resolve().parent)) or shutil.which("ld.lld")


def _knows_amdgcn(clang: str) -> bool:
    done = subprocess.run([clang, "--print-targets"], capture_output=True, text=True, check=False)
    return "amdgcn" in done.stdout


_EM_AMDGPU = 224
_NT_AMDGPU_METADATA = 32


def read_code_object(instance: KernelInstance, data: bytes) -> ObjectAbi:
    """Read the metadata note of a code object."""
    elf = elf_of(instance, data, _EM_AMDGPU)
    metadata = _amd_metadata(instance, elf)
    kernels = {kernel[".name"]: kernel for kernel in metadata["amdhsa.kernels"]}
    if instance.entry not in kernels:
        raise unreadable(instance, f"it defines {sorted(kernels)}, not the entry")
    # Hidden arguments are the launcher's to fill, and IREE fills none.
    arguments = kernels[instance.entry][".args"]
    arch = metadata["amdhsa.target"].split("--")[-1].split(":")[0]
    return ObjectAbi(arch, tuple(_amd_parameter(argument) for argument in arguments))


def _amd_metadata(instance: KernelInstance, elf: Any) -> dict[str, Any]:
    import msgpack

    for segment in elf.iter_segments("PT_NOTE"):
        for note in segment.iter_notes():
            if note["n_name"] == "AMDGPU" and note["n_type"] in (_NT_AMDGPU_METADATA, "NT_AMDGPU_METADATA"):
                return msgpack.unpackb(note["n_descdata"])
    raise unreadable(instance, "it has no AMDGPU metadata note")


def _amd_parameter(argument: dict[str, Any]) -> Parameter:
    kinds = {"global_buffer": "pointer", "by_value": "value"}
    kind: str = argument[".value_kind"]
    return Parameter(argument[".offset"], argument[".size"], kinds.get(kind, kind))


def _job(instance: KernelInstance, texts: tuple[tuple[str, str], ...], defines: tuple[str, ...]) -> Job:
    options = (*OPTIONS, f"--offload-arch={instance.target.arch}", *defines)
    return Job(clang_and_lld(), instance.source, texts, options)


_FORMAT = '"rocm", "rocm-hsaco-fb"'

BACKEND = Backend(
    job=_job,
    check=functools.partial(check_parameters, read_code_object),
    dispatch=functools.partial(extern_dispatch, _FORMAT),
    executable_format=_FORMAT,
    flags=("--iree-hal-target-device=hip", "--iree-rocm-target={arch}"),
)
