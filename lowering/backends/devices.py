"""How IREE is told about a target: compiler flags, device attributes, executable targets.

IREE's own table of CUDA targets stops before sm_90 as far as its code generation goes, so their
descriptions are written here; everything else comes from IREE's flags.
"""

from __future__ import annotations

from iree.compiler import ir

from ..targets import Target

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

_FLAGS = {
    "cpu": (
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=host",
    ),
    "cuda": (),
    "hip": ("--iree-hal-target-device=hip", "--iree-rocm-target={arch}"),
}

# What depends on weights alone has been folded.  Evaluating the rest while compiling would store a second,
# transposed copy of large weights in the program; run at load, a dispatch with several results mixes them up.
_COMMON_FLAGS = (
    "--iree-opt-const-eval=false",
    "--iree-opt-const-expr-hoisting=false",
    "--iree-input-demote-f64-to-f32=false",
)

# Where a model's file and this process's directory are is the compiling user's business, and would make every
# checkout's program another one.
_NO_SOURCE_PATHS = (
    "--iree-vm-bytecode-module-strip-source-map=true",
    "--iree-llvmcpu-debug-symbols=false",
    "--iree-hal-executable-debug-level=0",
)

_FORMATS = {
    "cpu": '"llvm-cpu", "embedded-elf-x86_64"',
    "cuda": '"cuda", "cuda-nvptx-fb"',
    "hip": '"rocm", "rocm-hsaco-fb"',
}


def flags(target: Target, *, source_paths: bool = False) -> tuple[str, ...]:
    """IREE compiler flags that select the target's device; ``source_paths``: the model's are kept."""
    named = () if source_paths else _NO_SOURCE_PATHS
    return (*_COMMON_FLAGS, *named, *(flag.format(arch=target.arch) for flag in _FLAGS[target.backend]))


def executable_target(target: Target) -> ir.Attribute:
    """The executable target an embedded object is for; general, so that it fits the device's own."""
    return ir.Attribute.parse(f"#hal.executable.target<{_FORMATS[target.backend]}>")


def declare_device(module: ir.Module, target: Target) -> None:
    """Write the device description IREE lacks onto ``module``; nothing to do where flags suffice."""
    if target.backend != "cuda":
        return
    arch = f'arch = "{target.name}", features = "{_PTX[target.name]}"'
    info = f"#iree_gpu.target<{arch}, wgp = <{_WORKGROUP_PROCESSOR}>>"
    device = (
        '#hal.device.target<"cuda", [#hal.executable.target<"cuda", "cuda-nvptx-fb", '
        f"{{iree_codegen.target_info = {info}}}>]>"
    )
    with module.context:
        module.operation.attributes["hal.device.targets"] = ir.ArrayAttr.get([ir.Attribute.parse(device)])
