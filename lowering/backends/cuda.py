"""NVIDIA: NVRTC, cubins, and the devices that IREE has no description of."""

from __future__ import annotations

import functools
import importlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iree.compiler import ir

from ..errors import ToolchainError
from ..families.instance import KernelInstance
from ..targets import Target
from .base import Backend
from .commands import Compiler, Job, failure, file_identity
from .embed import extern_dispatch
from .objects import ObjectAbi, Parameter, check_parameters, elf_of, section, unreadable

OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


@dataclass(frozen=True)
class Nvrtc(Compiler):
    """NVIDIA's run-time compiler, in this process."""

    def run(self, job: Job) -> bytes:
        return _nvrtc_compile(job, "CUBIN")


@functools.cache
def nvrtc() -> Nvrtc:
    """NVRTC as it is installed; ToolchainError, naming the extra, where it is not."""
    try:
        status, major, minor = _nvrtc_module().nvrtcVersion()
        library = _nvrtc_library()
    except (ImportError, RuntimeError, OSError) as error:
        raise ToolchainError(
            f"NVRTC, which compiles kernels for NVIDIA GPUs, is missing ({error}). "
            "Install it with: pip install 'vmfuse[cuda]'"
        ) from error
    if int(status) != 0:
        raise ToolchainError(f"NVRTC fails ({status}). Reinstall it with: pip install 'vmfuse[cuda]'")
    return Nvrtc("nvrtc", f"nvrtc {major}.{minor} {library}")


def _nvrtc_module() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def _nvrtc_library() -> str:
    """Which NVRTC library is in use: the version alone does not tell two builds apart."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return file_identity(load_nvidia_dynamic_lib("nvrtc").abs_path or "")


def ptx(job: Job) -> str:
    """The PTX of a compilation."""
    return _nvrtc_compile(job, "PTX").rstrip(b"\0").decode()


def _nvrtc_compile(job: Job, kind: str) -> bytes:
    nvrtc = _nvrtc_module()
    (_, source), *headers = job.texts
    names = [name.encode() for name, _ in headers]
    bodies = [text.encode() for _, text in headers]
    status, program = nvrtc.nvrtcCreateProgram(
        source.encode(), job.source.encode(), len(headers), bodies, names
    )
    if int(status) != 0:
        raise ToolchainError(f"NVRTC could not create a program: {status}.")
    try:
        options = [option.encode() for option in job.options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            raise ToolchainError(failure(job.command(), _nvrtc_log(nvrtc, program)))
        _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
        data = b" " * size
        getattr(nvrtc, f"nvrtcGet{kind}")(program, data)
        return data
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc_log(nvrtc: Any, program: object) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0").decode(errors="replace")


_EM_CUDA = 190
_NV_SIZED = 4  # the format whose payload follows; the others carry at most two bytes
_NV_KPARAM_INFO = 0x17
_NV_CBANK_PARAM_SIZE = 0x19


def read_cubin(instance: KernelInstance, data: bytes) -> ObjectAbi:
    """Read ``.nv.info.<entry>`` of a cubin."""
    elf = elf_of(instance, data, _EM_CUDA)
    info = section(elf, f".nv.info.{instance.entry}")
    if info is None:
        raise unreadable(instance, "it does not define the entry")
    attributes = list(nv_attributes(info))
    parameters = sorted(
        (_nv_parameter(payload) for kind, payload in attributes if kind == _NV_KPARAM_INFO),
        key=lambda parameter: parameter.offset,
    )
    total = [int.from_bytes(size, "little") for kind, size in attributes if kind == _NV_CBANK_PARAM_SIZE]
    end = max((p.offset + p.size for p in parameters), default=0)
    if total != [end]:
        raise unreadable(instance, f"its parameters end at byte {end}, their bank at {total}")
    return ObjectAbi(_nv_arch(elf), tuple(parameters))


def nv_attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) pairs of .nv.info: format and attribute bytes, then a value or a sized blob."""
    at = 0
    while at + 4 <= len(info):
        form, kind, half = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _NV_SIZED:
            yield kind, info[at : at + half]
            at += half
        else:
            yield kind, info[at - 2 : at]


def _nv_parameter(payload: bytes) -> Parameter:
    """KPARAM_INFO: u32 index, u16 ordinal, u16 offset, u32 flags with the size above bit 18."""
    _, _, offset, flags = struct.unpack("<IHHI", payload)
    return Parameter(offset, flags >> 18)


def _nv_arch(elf: Any) -> str:
    """The -arch ptxas ran with, which its note keeps; the ELF flags alone do not tell sm_90a from sm_90."""
    note = section(elf, ".note.nv.tkinfo") or b""
    if found := re.search(rb"-arch (sm_\w+)", note):
        return found[1].decode()
    flags = elf.header["e_flags"]
    newer = elf.header["e_ident"]["EI_ABIVERSION"] >= 8
    return f"sm_{flags >> 8 & 0xFF if newer else flags & 0xFF}"


# What IREE's target description says of sm_80, which newer parts include; `features` is the PTX
# version that knows the architecture.  Shared memory per workgroup stays at sm_80's 163 KiB: the
# generated kernels are tuned for it.
_PTX = {"sm_90": "+ptx80", "sm_100": "+ptx86"}


_WORKGROUP_PROCESSOR = (
    "compute = fp64|fp32|fp16|int64|int32|int16|int8, storage = b64|b32|b16|b8, "
    "subgroup = shuffle|arithmetic, dot = dp4xi8toi32, "
    "mma = [<NV_MMA_SYNC_F32_16x8x16_F16>, <NV_MMA_SYNC_F16_16x8x16_F16>, <NV_MMA_SYNC_F32_16x8x16_BF16>, "
    "<NV_WMMA_F32_16x16x16_F16>, <NV_WMMA_F16_16x16x16_F16>], "
    "subgroup_size_choices = [32], max_workgroup_sizes = [1024, 1024, 1024], "
    "max_thread_count_per_workgroup = 1024, max_workgroup_memory_bytes = 166912, "
    "max_workgroup_counts = [2147483647, 65535, 65535]"
)


def _device(target: Target) -> ir.Attribute:
    arch = f'arch = "{target.name}", features = "{_PTX[target.name]}"'
    info = f"#iree_gpu.target<{arch}, wgp = <{_WORKGROUP_PROCESSOR}>>"
    return ir.Attribute.parse(
        f"#hal.device.target<{_DEVICE}, [#hal.executable.target<{_FORMAT}, "
        f"{{iree_codegen.target_info = {info}}}>]>"
    )


def _job(instance: KernelInstance, texts: tuple[tuple[str, str], ...], defines: tuple[str, ...]) -> Job:
    options = (*OPTIONS, f"--gpu-architecture={instance.target.arch}", *defines)
    return Job(nvrtc(), instance.source, texts, options)


_DEVICE, _FORMAT = '"cuda"', '"cuda", "cuda-nvptx-fb"'

BACKEND = Backend(
    job=_job,
    check=functools.partial(check_parameters, read_cubin),
    dispatch=functools.partial(extern_dispatch, _FORMAT),
    executable_format=_FORMAT,
    device=_device,
)
