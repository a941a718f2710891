"""The host: a C compiler, relocatable objects, and the executable that calls one."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iree.compiler import ir
from iree.compiler.dialects import arith, flow, func, stream

from patterns import torch_ir

from ..families.instance import Binding, KernelInstance
from ..host_compiler import c_compiler
from .base import Backend
from .commands import Compiler, Job, call, directory_of, version
from .embed import dynamic_sizes, executable_target, index_constant, sizes, workgroups
from .objects import ObjectAbi, elf_of, machine_of, mismatch, section, unreadable

OPTIONS = (
    *("-O3", "-std=gnu11", "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fPIC"),
    *("-fno-asynchronous-unwind-tables", "-fno-math-errno", "-ffp-contract=off", "-w"),
)


def machine_option(arch: str) -> str:
    """The option for the instruction set: on Arm ``native`` is a CPU name, elsewhere an architecture's."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return f"-mcpu={arch}" if arm else f"-march={arch}"


@dataclass(frozen=True)
class CCompiler(Compiler):
    """Any C compiler: ``cc`` is its command."""

    cc: tuple[str, ...] = ()

    def run(self, job: Job) -> bytes:
        with directory_of(job.texts) as directory:
            call([*self.cc, *job.options, "-c", job.source, "-o", "kernel.o"], directory)
            return (directory / "kernel.o").read_bytes()


@functools.cache
def compiler_for(cc: tuple[str, ...], machine: str) -> CCompiler:
    """The compiler of the command ``cc`` for the instruction set that ``machine`` selects."""
    return CCompiler(Path(cc[0]).name if len(cc) == 1 else shlex.join(cc[1:]), features(cc, machine), cc)


def features(cc: Sequence[str], machine: str) -> str:
    """The compiler's version and, as predefined macros, the features ``machine`` means on this host."""
    with directory_of(()) as directory:
        macros = call([*cc, machine, "-O3", "-dM", "-E", "-x", "c", os.devnull], directory)
    return version(cc) + hashlib.sha256("\n".join(sorted(macros.splitlines())).encode()).hexdigest()


_C_TYPES = {"bfloat16": "u16", "float16": "u16", "float32": "float", "int8": "u8", "uint8": "u8"}


_C_TYPES |= {"int32": "i32", "int64": "i64"}


_C_TYPES |= dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"), "u8")


_CPU_ABI_SECTION = ".vmfuse.abi"


_EM_CPU = {62: "x86_64", 183: "aarch64", 243: "riscv64", 40: "arm", 3: "i386"}


def prototype(instance: KernelInstance) -> str:
    """The C declaration of a CPU instance: a pointer and an element offset each, then rows and workgroup."""
    pairs = [f"{_pointer(binding)}, i64" for binding in instance.bindings]
    return f"void {instance.entry}({', '.join([*pairs, 'i32', 'i32'])})"


def _pointer(binding: Binding) -> str:
    constant = "const " if binding.access == "read" else ""
    return f"{constant}{_C_TYPES[binding.dtype]} *"


def compare_prototypes(instance: KernelInstance, abi: ObjectAbi) -> None:
    """Raise CompileError unless the object was compiled against the declaration that is called."""
    expected = prototype(instance)
    if abi.prototype is not None and abi.prototype != expected:
        raise mismatch(instance, f"is '{abi.prototype}'", f"calls '{expected}'")


def read_object(instance: KernelInstance, data: bytes) -> ObjectAbi:
    """Read a relocatable object: its symbols, and the declaration that it records."""
    if platform.system() != "Linux":  # Mach-O or COFF: the compiler's check of the prototype has to do
        return ObjectAbi(platform.machine())
    elf = elf_of(instance, data)
    arch = _EM_CPU.get(machine_of(elf), str(elf.header["e_machine"]))
    if arch != platform.machine():
        raise mismatch(instance, f"is for {arch}", f"runs on {platform.machine()}")
    symbols = [s for s in elf.get_section_by_name(".symtab").iter_symbols() if s.name]
    undefined = sorted(s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF")
    if undefined:
        raise unreadable(instance, f"it needs {', '.join(undefined)}, and nothing else is linked")
    if not any(s.name == instance.entry and s["st_info"]["bind"] == "STB_GLOBAL" for s in symbols):
        raise unreadable(instance, "it does not define the entry")
    text = section(elf, _CPU_ABI_SECTION)
    if text is None:
        raise unreadable(instance, "it does not record its parameters")
    return ObjectAbi(arch, prototype=text.rstrip(b"\0").decode())


def _executable_name(kernel: KernelInstance) -> str:
    return f"executable_{kernel.entry}"


def _workgroup_name(kernel: KernelInstance) -> str:
    return f"{kernel.entry}_workgroup"


def flow_dispatch(
    kernel: KernelInstance, data: bytes, arguments: list[ir.Value], rows: ir.Value, writes: list[ir.Type]
) -> Sequence[ir.Value]:
    """Call the workgroup function of the executable that ``define_executable`` adds."""
    symbol = ir.SymbolRefAttr.get([_executable_name(kernel), _workgroup_name(kernel)])
    return flow.DispatchOp(
        writes,
        [rows],
        ir.ArrayAttr.get([symbol]),
        [*arguments, rows],
        dynamic_sizes(kernel, rows, "read"),
        dynamic_sizes(kernel, rows, "write"),
    ).operation.results


def define_executable(kernel: KernelInstance, data: bytes, directory: Path) -> None:
    """A ``stream.executable`` whose function hands every binding and the row count to the object."""
    object_file = directory / f"{kernel.entry}.o"
    object_file.write_bytes(data)
    executable = stream.ExecutableOp(_executable_name(kernel), sym_visibility="private")
    target = executable_target(_FORMAT)
    # IREE's cpu linker takes objects from files only: embedded bytes reach it as an empty file.
    executable.operation.attributes["hal.executable.objects"] = ir.Attribute.parse(
        f'#hal.executable.objects<{{{target} = [#hal.executable.object<{{path = "{object_file}"}}>]}}>'
    )
    block = executable.operation.regions[0].blocks.append()
    with ir.InsertionPoint(block):
        export = stream.ExecutableExportOp(
            _workgroup_name(kernel), _workgroup_name(kernel), sym_visibility="public"
        )
        count = export.operation.regions[0].blocks.append(ir.IndexType.get())
        with ir.InsertionPoint(count):
            ir.Operation.create("stream.return", operands=workgroups(kernel, count.arguments[0]))
        inner = ir.Operation.create("builtin.module", regions=1)
        body = inner.regions[0].blocks.append()
        with ir.InsertionPoint(body):
            _declare_import(kernel)
            _workgroup_function(kernel)
        ir.Operation.create("stream.executable.end")


def _import_types(kernel: KernelInstance) -> list[ir.Type]:
    types: list[ir.Type] = []
    for binding in kernel.bindings:
        types += [
            ir.MemRefType.get([], torch_ir.element_type(binding.dtype)),
            ir.IntegerType.get_signless(64),
        ]
    return types + [ir.IntegerType.get_signless(32)] * 2


def _declare_import(kernel: KernelInstance) -> None:
    declared = func.FuncOp(kernel.entry, ir.FunctionType.get(_import_types(kernel), []), visibility="private")
    declared.operation.attributes["hal.import.static"] = ir.UnitAttr.get()
    declared.operation.attributes["llvm.bareptr"] = ir.BoolAttr.get(True)


def _workgroup_function(kernel: KernelInstance) -> None:
    buffer = ir.Type.parse("!stream.binding")
    # Operands come first, then results: reads, the row count, writes.
    reads = sum(b.access == "read" for b in kernel.bindings)
    types = [buffer] * reads + [ir.IndexType.get()] + [buffer] * (len(kernel.bindings) - reads)
    function = func.FuncOp(_workgroup_name(kernel), ir.FunctionType.get(types, []))
    entry = function.add_entry_block()
    with ir.InsertionPoint(entry):
        arguments = list(entry.arguments)
        rows = arguments.pop(reads)
        operands: list[ir.Value] = []
        for binding, argument in zip(kernel.bindings, arguments, strict=True):
            operands += _pointer_and_offset(binding, argument, rows)
        i32 = ir.IntegerType.get_signless(32)
        workgroup = stream.DispatchWorkgroupIDOp(0).result
        operands += [arith.IndexCastUIOp(i32, rows).result, arith.IndexCastUIOp(i32, workgroup).result]
        func.CallOp([], kernel.entry, operands)
        func.ReturnOp([])


def _pointer_and_offset(binding: Binding, argument: ir.Value, rows: ir.Value) -> list[ir.Value]:
    i64 = ir.IntegerType.get_signless(64)
    dynamic = ir.ShapedType.get_dynamic_size()
    shape = [dim if isinstance(dim, int) else dynamic for dim in binding.shape]
    view = stream.BindingSubspanOp(
        ir.MemRefType.get(shape, torch_ir.element_type(binding.dtype)),
        argument,
        index_constant(0),
        sizes(binding, rows),
    ).result
    element = torch_ir.element_type(binding.dtype)
    rank = len(shape)
    metadata = ir.Operation.create(
        "iree_codegen.extract_strided_metadata",
        results=[ir.MemRefType.get([], element)] + [ir.IndexType.get()] * (1 + 2 * rank),
        operands=[view],
    )
    return [metadata.results[0], arith.IndexCastOp(i64, metadata.results[1]).result]


def _job(instance: KernelInstance, texts: tuple[tuple[str, str], ...], defines: tuple[str, ...]) -> Job:
    machine = machine_option(instance.target.arch)
    options = (*OPTIONS, machine, *defines, f"-DPROTOTYPE={prototype(instance)}")
    return Job(compiler_for(c_compiler(), machine), instance.source, texts, options)


def _check(instance: KernelInstance, data: bytes) -> ObjectAbi:
    abi = read_object(instance, data)
    compare_prototypes(instance, abi)
    return abi


_FORMAT = '"llvm-cpu", "embedded-elf-x86_64"'

BACKEND = Backend(
    job=_job,
    check=_check,
    dispatch=flow_dispatch,
    executable_format=_FORMAT,
    flags=(
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=host",
    ),
    declare=define_executable,
)
