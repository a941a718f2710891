"""From a kernel instance to its object: NVRTC for NVIDIA, clang and lld for AMD, any C compiler for the CPU.

No GPU and no vendor SDK is needed: every compiler comes as a wheel, and those on PATH serve as
well.  Objects are kept on disk (``object_cache``).  What a kernel takes and how it is specialised is
``kernel``'s business, whether an object keeps to it ``abi``'s.

Environment: ``CC`` (the C compiler for CPU kernels).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import temporary
from ..errors import ToolchainError
from ..families.base import Family
from ..families.instance import KernelInstance
from ..families.registry import family_of
from . import object_cache
from .abi import prototype

_NVRTC_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_HIP_OPTIONS = (
    *("-x", "hip", "--offload-device-only", "-nogpulib", "-nogpuinc", "--no-gpu-bundle-output"),
    *("-fuse-cuid=none", "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-w"),
)
_CPU_OPTIONS = (
    *("-O3", "-std=gnu11", "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fPIC"),
    *("-fno-asynchronous-unwind-tables", "-fno-math-errno", "-ffp-contract=off", "-w"),
)


def compile_kernel(instance: KernelInstance) -> bytes:
    """The object of ``instance``: a cubin, an AMD code object (ELF) or a relocatable CPU object.

    The same instance gives the same bytes.  Raises ToolchainError when the compiler is missing
    (naming what to install) or fails (with its message and command).
    """
    job = _job(instance)
    if (cached := object_cache.read(job.key)) is not None:
        return cached
    data = job.compiler.run(job)
    object_cache.write(job.key, data)
    return data


def kernel_source_dir() -> Path:
    """The directory of the device sources: beside this package in a checkout, inside it in a wheel.

    Raises ToolchainError when the installation has neither.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / "kernels", package / "_kernels"):
        if (candidate / "row.h").is_file():
            return candidate
    raise ToolchainError(f"The kernel sources are missing beside {package}: reinstall vmfuse.")


# -- what is compiled, and with what ---------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One compilation: everything the object depends on."""

    compiler: _Compiler
    source: str
    texts: tuple[tuple[str, str], ...]  # file name, contents: the source, then its headers
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        compiler = [type(self.compiler).__name__, self.compiler.name, self.compiler.identity]
        parts = [*compiler, self.source, self.texts, self.options]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def command(self) -> str:
        return shlex.join([self.compiler.name, *self.options, self.source])


@dataclass(frozen=True)
class _Compiler:
    """A compiler: ``identity`` changes whenever its output may."""

    name: str
    identity: str

    def run(self, job: _Job) -> bytes:
        raise NotImplementedError


def _job(instance: KernelInstance) -> _Job:
    family = family_of(instance.spec)
    names = (instance.source, *family.sources[instance.source])
    texts = tuple((name, _source(family, name).read_text(encoding="utf-8")) for name in names)
    defines = tuple(f"-D{name}={value}" for name, value in instance.defines)
    arch = instance.target.arch
    if instance.target.backend == "cuda":
        options = (*_NVRTC_OPTIONS, f"--gpu-architecture={arch}", *defines)
        return _Job(_nvrtc(), instance.source, texts, options)
    if instance.target.backend == "hip":
        options = (*_HIP_OPTIONS, f"--offload-arch={arch}", *defines)
        return _Job(_hip(), instance.source, texts, options)
    machine = _machine_option(arch)
    options = (*_CPU_OPTIONS, machine, *defines, f"-DPROTOTYPE={prototype(instance)}")
    return _Job(_cpu(_c_compiler(), machine), instance.source, texts, options)


def _source(family: Family, name: str) -> Path:
    """The file of that name: the family's own where it has one, else this project's."""
    shared = kernel_source_dir()
    own = family.directory or shared
    for directory in (own, shared):
        if (directory / name).is_file():
            return directory / name
    raise ToolchainError(f"The family {family.name} names {name}, which is neither in {own} nor in {shared}.")


def _machine_option(arch: str) -> str:
    """The option for the instruction set: on Arm ``native`` is a CPU name, elsewhere an architecture's."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return f"-mcpu={arch}" if arm else f"-march={arch}"


# -- NVIDIA ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nvrtc(_Compiler):
    def run(self, job: _Job) -> bytes:
        return _nvrtc_compile(job, "CUBIN")


@functools.cache
def _nvrtc() -> _Nvrtc:
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
    return _Nvrtc("nvrtc", f"nvrtc {major}.{minor} {library}")


def _nvrtc_module() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def _nvrtc_library() -> str:
    """Which NVRTC library is in use: the version alone does not tell two builds apart."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return _file_identity(load_nvidia_dynamic_lib("nvrtc").abs_path or "")


def _file_identity(path: str) -> str:
    """Tells two builds of one version apart."""
    try:
        status = Path(path).stat()
    except OSError:
        return path
    return f"{Path(path).name} {status.st_size} {status.st_mtime_ns}"


def ptx(instance: KernelInstance) -> str:
    """The PTX of a CUDA instance, for people and tests; dispatches embed the cubin."""
    return _nvrtc_compile(_job(instance), "PTX").rstrip(b"\0").decode()


def _nvrtc_compile(job: _Job, kind: str) -> bytes:
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
            raise ToolchainError(_failure(job.command(), _nvrtc_log(nvrtc, program)))
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


# -- AMD -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hip(_Compiler):
    clang: tuple[str, ...] = ()
    lld: tuple[str, ...] = ()

    def run(self, job: _Job) -> bytes:
        """Compile to assembly, assemble, link: clang's own link step wants helpers no wheel ships."""
        arch = next(option for option in job.options if option.startswith("--offload-arch=")).split("=")[1]
        with _directory_of(job.texts) as directory:
            _call([*self.clang, *job.options, "-S", job.source, "-o", "kernel.s"], directory)
            assemble = ("--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-x", "assembler", "-c")
            _call([*self.clang, *assemble, "kernel.s", "-o", "kernel.o"], directory)
            _call([*self.lld, "-shared", "kernel.o", "-o", "kernel.hsaco"], directory)
            return (directory / "kernel.hsaco").read_bytes()


def assembly(instance: KernelInstance) -> str:
    """The AMD assembly of a HIP instance, for people and tests."""
    job = _job(instance)
    assert isinstance(job.compiler, _Hip), instance.target
    with _directory_of(job.texts) as directory:
        _call([*job.compiler.clang, *job.options, "-S", job.source, "-o", "kernel.s"], directory)
        return (directory / "kernel.s").read_text()


@functools.cache
def _hip() -> _Hip:
    if zig := _ziglang():
        clang, lld = (*zig, "clang"), (*zig, "ld.lld")
        return _Hip("ziglang clang", _version(clang), clang, lld)
    for name in ("amdclang++", "clang++", "clang"):
        found = shutil.which(name)
        linker = _linker_beside(found) if found else None
        if found and linker and _knows_amdgcn(found):
            return _Hip(name, _version((found,)) + _version((linker,)), (found,), (linker,))
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


# -- CPU -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cpu(_Compiler):
    cc: tuple[str, ...] = ()

    def run(self, job: _Job) -> bytes:
        with _directory_of(job.texts) as directory:
            _call([*self.cc, *job.options, "-c", job.source, "-o", "kernel.o"], directory)
            return (directory / "kernel.o").read_bytes()


@functools.cache
def _cpu(cc: tuple[str, ...], machine: str) -> _Cpu:
    return _Cpu(Path(cc[0]).name if len(cc) == 1 else shlex.join(cc[1:]), _features(cc, machine), cc)


def _c_compiler() -> tuple[str, ...]:
    if chosen := os.environ.get("CC"):
        command = tuple(shlex.split(chosen))
        if not shutil.which(command[0]):
            raise ToolchainError(f"CC names {chosen!r}, which is not on PATH.")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    if zig := _ziglang():
        return (*zig, "clang")
    raise ToolchainError(
        "A C compiler, which CPU kernels need, is missing. Install one (gcc or clang), "
        "or the one that comes with: pip install 'vmfuse[hip]'"
    )


def _features(cc: Sequence[str], machine: str) -> str:
    """The compiler's version and, as predefined macros, the features ``machine`` means on this host."""
    with _directory_of(()) as directory:
        macros = _call([*cc, machine, "-O3", "-dM", "-E", "-x", "c", os.devnull], directory)
    return _version(cc) + hashlib.sha256("\n".join(sorted(macros.splitlines())).encode()).hexdigest()


# -- running compilers -----------------------------------------------------------------------------


def _ziglang() -> tuple[str, ...] | None:
    """The command of the ``ziglang`` wheel, which carries clang and lld."""
    return (sys.executable, "-m", "ziglang") if importlib.util.find_spec("ziglang") else None


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """What a compiler says of itself, and which file it is."""
    file = _file_identity(shutil.which(command[0]) or command[0])
    return _call([*command, "--version"], Path(tempfile.gettempdir())) + file


@contextlib.contextmanager
def _directory_of(texts: Sequence[tuple[str, str]]) -> Iterator[Path]:
    """A directory holding ``texts``: compilers run in it, so no path of this machine reaches an object."""
    with temporary.directory() as directory:
        for file, text in texts:
            (directory / file).write_text(text, encoding="utf-8")
        yield directory


def _call(command: Sequence[str], directory: Path) -> str:
    """Standard output of ``command``; ToolchainError with its message if it fails."""
    environment: Mapping[str, str] = {**os.environ, "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise ToolchainError(f"Could not run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise ToolchainError(_failure(shlex.join(command), done.stderr or done.stdout))
    return done.stdout


def _failure(command: str, message: str) -> str:
    return f"A kernel did not compile.\n{message.strip()}\ncommand: {command}\nsources: {kernel_source_dir()}"
