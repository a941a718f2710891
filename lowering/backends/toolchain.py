"""From a kernel instance to its object: NVRTC for NVIDIA, clang and lld for AMD, any C compiler for the CPU.

No GPU and no vendor SDK is needed: every compiler comes as a wheel, and those on PATH serve as
well.  Objects are kept on disk (``object_cache``).  What a kernel takes and how it is specialised is its
family's business, whether an object keeps to it ``abi``'s.

Environment: ``CC`` (the C compiler for CPU kernels).
"""

from __future__ import annotations

from pathlib import Path

from .. import object_cache
from ..errors import ToolchainError
from ..families.base import Family
from ..families.instance import KernelInstance
from ..families.registry import family_of
from . import cuda, hip
from .commands import Job, kernel_source_dir
from .registry import backend_of


def compile_kernel(instance: KernelInstance) -> bytes:
    """The object of ``instance``: a cubin, an AMD code object (ELF) or a relocatable CPU object.

    The same instance gives the same bytes.  Raises ToolchainError when the compiler is missing
    (naming what to install) or fails (with its message and command).
    """
    job = job_of(instance)
    if (cached := object_cache.read(job.key)) is not None:
        return cached
    data = job.compiler.run(job)
    object_cache.write(job.key, data)
    return data


def job_of(instance: KernelInstance) -> Job:
    """The compilation that gives the object of ``instance``."""
    family = family_of(instance.spec)
    names = (instance.source, *family.sources[instance.source])
    texts = tuple((name, _source(family, name).read_text(encoding="utf-8")) for name in names)
    defines = tuple(f"-D{name}={value}" for name, value in instance.defines)
    return backend_of(instance.target).job(instance, texts, defines)


def _source(family: Family, name: str) -> Path:
    """The file of that name: the family's own where it has one, else this project's."""
    shared = kernel_source_dir()
    own = family.directory or shared
    for directory in (own, shared):
        if (directory / name).is_file():
            return directory / name
    raise ToolchainError(f"The family {family.name} names {name}, which is neither in {own} nor in {shared}.")


def ptx(instance: KernelInstance) -> str:
    """The PTX of a CUDA instance, for people and tests; dispatches embed the cubin."""
    return cuda.ptx(job_of(instance))


def assembly(instance: KernelInstance) -> str:
    """The AMD assembly of a HIP instance, for people and tests."""
    return hip.assembly(job_of(instance))
