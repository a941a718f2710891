"""Row kernel instances: what is refused, what names they have, and what their machine code is made of."""

from __future__ import annotations

import io
import itertools
import struct

import pytest
import torch
from elftools.elf.elffile import ELFFile

from lowering.backends import abi, cuda, toolchain
from lowering.errors import CompileError
from lowering.families.row import instance
from lowering.families.row_support import why_unsupported
from lowering.targets import Target
from patterns.contracts import GatedActivation, Norm, Quantization, RowSpec
from tests.families.row_cases import CASES, CPU, GFX942, GFX950, Q128, SM90, SM100, scheme_case, spec


def test_instances_are_stable_and_distinct() -> None:
    kernels = [
        instance(case, target)
        for case, target in itertools.product(CASES.values(), (CPU, SM90, SM100, GFX950))
    ]
    assert all(kernel.entry.isidentifier() and kernel.entry.isascii() for kernel in kernels)
    assert instance(CASES["four"], CPU) == instance(CASES["four"], CPU)
    per_target = {(kernel.target.name, kernel.entry) for kernel in kernels}
    assert len(per_target) == len(kernels)
    assert instance(CASES["four"], SM90).grid(0) == (1, 1, 1)


REFUSED_QUANTIZATIONS = [
    (Quantization(128, "float8_e5m2fnuz"), "float8_e5m2fnuz"),
    (Quantization(128, layout="ue8m0_packed"), "holds ue8m0"),
    (Quantization(128, layout="diagonal"), "diagonal"),
    (Quantization(128, scale="bfloat16"), "bfloat16"),
    (Quantization(128, quotient="none"), "none"),
    (Quantization(128, amax_ceiling=0.0), "upper bound"),
    (Quantization(128, scale_floor=-1.0), "floor on the scale"),
    (Quantization(128, amax_floor=float("inf")), "floor on amax"),
    (Quantization(128, limit=0.5), "whole numbers up to 448"),
    (Quantization(128, "float8_e4m3fnuz", limit=448.0), "whole numbers up to 240"),
]


@pytest.mark.parametrize(
    ("case", "target", "words"),
    [
        (CASES["once"], GFX942, "e4m3fnuz"),
        (spec(1536, quants=[Quantization(256)]), CPU, "32, 64 or 128"),
        (spec(96, quants=[Quantization(64)]), CPU, "do not divide"),
        (spec(32768, quants=[Q128]), SM90, "up to 16384"),
        (spec(128, "float64", quants=[Q128]), CPU, "float64"),
        (spec(128, quants=[Q128] * 5), CPU, "at most 4"),
        (spec(128), CPU, "writes nothing"),
        (spec(128, "float32", gate=GatedActivation("relu"), writes_y=True), CPU, "relu"),
        (spec(128, gate=GatedActivation("silu", "thrice"), writes_y=True), CPU, "thrice"),
        (
            RowSpec(128, "float32", Norm(1.0), GatedActivation("silu"), writes_y=True),
            CPU,
            "gate is a tensor",
        ),
        (spec(128, weight=None, offset=1.0, writes_y=True), CPU, "offset to a weight"),
        (spec(128, offset=torch.inf, writes_y=True), CPU, "finite"),
        (spec(1000, rounding=None, quants=[Quantization(None)]), CPU, "multiple of 32"),
        (spec(32768, rounding=None, quants=[Quantization(None)]), GFX950, "up to 16384"),
        (spec(128, quants=[Quantization(128, "float8_e4m3fnuz")]), GFX950, "float8_e4m3fn or float8_e5m2"),
        (spec(128, quants=[Quantization(128, "float8_e4m3fnuz")]), SM90, "float8_e4m3fn or float8_e5m2"),
        (spec(128, quants=[Quantization(128, "float8_e5m2")]), GFX942, "float8_e5m2fnuz"),
        *((spec(128, quants=[quantization]), CPU, words) for quantization, words in REFUSED_QUANTIZATIONS),
    ],
)
def test_refusals_are_sentences(case: RowSpec, target: Target, words: str) -> None:
    reason = why_unsupported(case, target)
    assert reason and words in reason and reason.endswith(".")
    with pytest.raises(CompileError, match=words):
        instance(case, target)


def test_a_norm_alone_is_fine_on_gfx942() -> None:
    assert why_unsupported(CASES["norm_only"], GFX942) is None


OBJECT_CASES = {
    **{
        name: CASES[name]
        for name in ("once", "none", "add_exact_all", "add_rounded_twice", "f32", "four", "norm_any_length")
    },
    "layouts": scheme_case("add", "layouts", 7168),
    "rows": scheme_case("gemma", "rows", 7168),
    "bounds": scheme_case("plain", "bounds", 2048),
    "silu": scheme_case("silu", "rows", 2048),
    "gelu": scheme_case("gelu", "layouts", 4096),
    "gelu_tanh": spec(28672, gate=GatedActivation("gelu_tanh"), quants=[Q128]),
}


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda t: t.name)
@pytest.mark.parametrize("name", OBJECT_CASES)
def test_cuda_object(name: str, target: Target) -> None:
    kernel = instance(OBJECT_CASES[name], target)
    ptx = toolchain.ptx(kernel)
    assert ".local" not in ptx, "the kernel keeps arrays in memory"
    for op in ("ld.global", "st.global"):
        wide = [
            line
            for line in ptx.splitlines()
            if op in line and any(wide in line for wide in (".v4", ".v8", ".b128", ".v2.b64"))
        ]
        assert wide or kernel.spec.hidden % 8, f"no {op} of 16 bytes or more"
    data = toolchain.compile_kernel(kernel)
    assert local_bytes(data, kernel.entry) == 0
    abi.check(kernel, data)


def local_bytes(cubin: bytes, entry: str) -> int:
    """Bytes of local memory, where registers spill, that a kernel needs: EIATTR_FRAME_SIZE."""
    elf = ELFFile(io.BytesIO(cubin))
    symbols = elf.get_section_by_name(".symtab")
    sizes = [
        struct.unpack("<II", p)
        for kind, p in cuda.nv_attributes(elf.get_section_by_name(".nv.info").data())
        if kind == 0x11
    ]
    return max(size for symbol, size in sizes if symbols.get_symbol(symbol).name == entry)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        *((case, GFX950) for case in OBJECT_CASES.values()),
        *((scheme_case(producer, "fnuz", 2048), GFX942) for producer in ("add", "silu")),
    ],
    ids=[*OBJECT_CASES, "add_fnuz", "silu_fnuz"],
)
def test_hip_object(case: RowSpec, target: Target) -> None:
    kernel = instance(case, target)
    text = toolchain.assembly(kernel)
    for field in (".private_segment_fixed_size:", ".vgpr_spill_count:", ".sgpr_spill_count:"):
        values = [line.split()[-1] for line in text.splitlines() if field in line]
        assert values == ["0"], (field, values)
    if case.hidden % 8 == 0:
        assert "global_load_dwordx4" in text and "global_store_dwordx4" in text
    assert "flat_load" not in text and "flat_store" not in text
    abi.check(kernel, toolchain.compile_kernel(kernel))
