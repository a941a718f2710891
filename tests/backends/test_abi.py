"""The parameters an object has against those its dispatch passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from lowering.backends import abi, cpu, toolchain
from lowering.backends.objects import passed
from lowering.errors import CompileError, ToolchainError
from lowering.families.instance import Binding, KernelInstance
from lowering.families.row import instance
from lowering.targets import Target, resolve
from patterns.contracts import GatedActivation, Norm, Quantization, RowSpec

CPU, GPUS = resolve("cpu"), [resolve(name) for name in ("sm_90", "sm_100", "gfx950")]
SPEC = RowSpec(
    512,
    "bfloat16",
    Norm(1e-6, "once", "exact"),
    weight_dtype="float32",
    writes_sum=True,
    writes_y=True,
    quantizations=(Quantization(128), Quantization(64, layout="column_tma")),
)
BINDINGS = ["x", "residual", "weight", "sum", "y", "q0", "scale0", "q1", "scale1"]

named = pytest.mark.parametrize("target", [CPU, *GPUS], ids=lambda target: target.name)


@pytest.fixture(scope="module")
def objects() -> Callable[[Target], tuple[KernelInstance, bytes]]:
    def build(target: Target) -> tuple[KernelInstance, bytes]:
        kernel = instance(SPEC, target)
        return kernel, toolchain.compile_kernel(kernel)

    return build


@named
def test_a_right_object_passes(target: Target, objects) -> None:
    kernel, data = objects(target)
    assert [binding.name for binding in kernel.bindings] == BINDINGS
    found = abi.check(kernel, data)
    if target is CPU:
        assert found.prototype == cpu.prototype(kernel)
    else:
        assert found.arch == target.arch
        assert [p.size for p in found.parameters] == [8] * 9 + [4]


@named
def test_a_binding_too_few(target: Target, objects) -> None:
    kernel, data = objects(target)
    wrong = dataclasses.replace(kernel, bindings=kernel.bindings[:-1])
    with pytest.raises(CompileError) as caught:
        abi.check(wrong, data)
    assert kernel.entry in str(caught.value)
    assert "the object" in str(caught.value) and "the dispatch" in str(caught.value)


@named
def test_a_binding_too_many(target: Target, objects) -> None:
    kernel, data = objects(target)
    extra = Binding("extra", "float32", ("T",), "write")
    with pytest.raises(CompileError, match=kernel.entry):
        abi.check(dataclasses.replace(kernel, bindings=(*kernel.bindings, extra)), data)


@named
def test_another_entry(target: Target, objects) -> None:
    kernel, data = objects(target)
    with pytest.raises(CompileError, match="no_such_kernel"):
        abi.check(dataclasses.replace(kernel, entry="no_such_kernel"), data)


@named
@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"not an object at all" * 10])
def test_no_object_at_all(target: Target, data: bytes) -> None:
    with pytest.raises(CompileError, match="rms_norm"):
        abi.check(instance(SPEC, target), data)


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_another_architecture(target: Target, objects) -> None:
    """Neither another vendor's object, nor a sibling's."""
    kernel, _ = objects(target)
    for other in (*GPUS, CPU):
        if other is not target:
            data = objects(other)[1].replace(instance(SPEC, other).entry.encode(), kernel.entry.encode())
            with pytest.raises(CompileError, match=kernel.entry):
                abi.check(kernel, data)


def test_the_c_compiler_compares_the_prototype(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a dispatch that disagrees with the source does not compile: in number, type or access."""
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path))
    kernel = instance(SPEC, CPU)
    x, *rest = kernel.bindings
    wrongs = [
        kernel.bindings[:-1],
        (dataclasses.replace(x, dtype="float32"), *rest),
        (dataclasses.replace(x, access="write"), *rest),
    ]
    for bindings in wrongs:
        with pytest.raises(ToolchainError, match="conflicting types"):
            toolchain.compile_kernel(dataclasses.replace(kernel, bindings=bindings))


def test_bindings_of_a_gate() -> None:
    """Gate and up in one tensor or in two, and the physical shapes of scales."""
    packed = Quantization(32, "int8", scale="ue8m0", layout="ue8m0_packed")
    spec = RowSpec(160, "float16", gate=GatedActivation("silu"), quantizations=(packed, Quantization(None)))
    assert [(b.name, b.dtype, b.shape) for b in instance(spec, CPU).bindings] == [
        ("x", "float16", ("T", 320)),
        ("q0", "int8", ("T", 160)),
        ("scale0", "int32", (2, "T4")),
        ("q1", "float8_e4m3fn", ("T", 160)),
        ("scale1", "float32", ("T", 1)),
    ]
    two = dataclasses.replace(spec, gate=GatedActivation("silu", packed=False))
    assert [(b.name, b.shape) for b in instance(two, CPU).bindings][:2] == [
        ("x", ("T", 160)),
        ("up", ("T", 160)),
    ]
    for target in (CPU, *GPUS):
        abi.check(instance(two, target), toolchain.compile_kernel(instance(two, target)))


def test_what_is_passed() -> None:
    kernel = instance(SPEC, GPUS[0])
    assert [(p.offset, p.kind) for p in passed(kernel)][-2:] == [(64, "pointer"), (72, "value")]
