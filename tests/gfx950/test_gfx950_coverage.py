"""Every operation the gfx950 executor implements is tested against an independent definition."""

from __future__ import annotations

from tests.gfx950 import test_gfx950_approximate as approximate
from tests.gfx950 import test_gfx950_conversions as conversions
from tests.gfx950 import test_gfx950_floats as floats
from tests.gfx950 import test_gfx950_integers as integers
from tests.gfx950 import test_gfx950_matrix as matrix
from tests.gfx950 import test_gfx950_memory as memory
from tests.gfx950 import test_gfx950_scalar as scalar
from tests.gfx950.gfx950_cases import Case
from tools.gfx950 import decode, native

# The assembler's names of what the ISA's tables call otherwise.
SPELLED = {
    "V_ACCVGPR_READ_B32": "V_ACCVGPR_READ",
    "V_ACCVGPR_WRITE_B32": "V_ACCVGPR_WRITE",
    "V_FMA_MIX_F32": "V_MAD_MIX_F32",
    "V_FMA_MIXLO_F16": "V_MAD_MIXLO_F16",
    "V_FMA_MIXHI_F16": "V_MAD_MIXHI_F16",
}
# In test_gfx950_lanes.py, and in the tests of control flow, memory and division.
ELSEWHERE = (
    *(
        "v_readfirstlane_b32",
        "v_readlane_b32",
        "v_writelane_b32",
        "v_permlane16_swap_b32",
    ),
    *(
        "v_permlane32_swap_b32",
        "v_swap_b32",
        "v_accvgpr_read_b32",
        "v_accvgpr_write_b32",
    ),
    *(
        "v_accvgpr_mov_b32",
        "ds_bpermute_b32",
        "ds_permute_b32",
        "ds_swizzle_b32",
    ),
    *(
        "s_branch",
        "s_cbranch_scc0",
        "s_cbranch_scc1",
        "s_cbranch_vccz",
    ),
    *(
        "s_cbranch_vccnz",
        "s_cbranch_execz",
        "s_cbranch_execnz",
        "s_getpc_b64",
    ),
    *(
        "s_setpc_b64",
        "s_swappc_b64",
        "s_call_b64",
        "s_endpgm",
    ),
    *(
        "s_barrier",
        "s_waitcnt",
        "s_nop",
        "s_sleep",
    ),
    *(
        "s_setprio",
        "s_sethalt",
        "s_icache_inv",
        "s_dcache_inv",
    ),
    *(
        "s_dcache_wb",
        "s_setreg_b32",
        "s_setreg_imm32_b32",
        "s_getreg_b32",
    ),
    *(
        "s_memtime",
        "s_memrealtime",
        "buffer_wbl2",
        "buffer_inv",
    ),
    *(
        "v_nop",
        "v_div_scale_f32",
        "v_div_fmas_f32",
        "v_div_fixup_f32",
    ),
    *(
        "v_div_scale_f64",
        "v_div_fmas_f64",
        "v_div_fixup_f64",
        "v_div_fixup_f16",
    ),
    *(
        "ds_rsub_u32",
        "ds_rsub_rtn_u32",
        "ds_rsub_u64",
        "ds_rsub_rtn_u64",
    ),
    *(
        "ds_min_f32",
        "ds_min_rtn_f32",
        "ds_max_f32",
        "ds_max_rtn_f32",
    ),
    *(
        "ds_read_b64_tr_b16",
        "ds_read_b64_tr_b8",
        "ds_read_b64_tr_b4",
    ),
)


def vector_names() -> set[str]:
    groups = [
        *integers.GROUPS.values(),
        *floats.GROUPS.values(),
        *(cases for cases, _ in conversions.GROUPS.values()),
    ]
    cases: list[Case] = [case for group in groups for case in group]
    functions = [f"v_{name}_{kind}" for kind, names in approximate.OF_KIND.items() for name in names]
    return {case.name for case in cases} | {*functions}


def scalar_names() -> set[str]:
    cases = [*scalar.BITS, *scalar.INTEGERS, *scalar.COMPARISONS]
    saving = [f"s_{name}_saveexec_b64" for name in scalar._SAVEEXEC] + [
        f"s_{name}_wrexec_b64" for name in scalar._WREXEC
    ]
    loads = [
        f"{prefix}_dword{x}" for prefix in ("s_load", "s_buffer_load") for x in ("", "x2", "x4", "x8", "x16")
    ]
    return {case.name for case in cases} | {*saving, *loads}


def memory_names() -> set[str]:
    spaces = ("global", "flat", "buffer", "scratch")
    names = {f"{space}_load_{name}" for space in spaces for name in memory.LOADS}
    names |= {f"{space}_store_{name}" for space in spaces for name in memory.STORES}
    names |= {f"ds_read_{name}" for name in memory.LDS_LOADS} | {
        f"ds_write_{name}" for name in memory.LDS_STORES
    }
    names |= {f"ds_{op}{form}_b{n}" for op in ("read", "write") for form in ("2", "2st64") for n in (32, 64)}
    names |= {f"global_load_lds_{name}" for name in ("ubyte", "ushort", "dword", "dwordx3", "dwordx4")}
    for name in memory.INTEGER_ATOMICS:
        for bits, suffix in ((32, ""), (64, "_x2")):
            forms = memory.atomic_forms(
                name + suffix, memory.lds_name(name, bits), bits // 8, name == "cmpswap"
            )
            names |= set(forms)
    for name, (lds, size, _) in memory.float_atomics().items():
        operation = lds.replace("_f", "_rtn_f").replace("_bf16", "_rtn_bf16")
        names |= set(memory.atomic_forms(name, operation, size, False))
    return names


def covered_names() -> set[str]:
    names = {*ELSEWHERE, *vector_names(), *scalar_names(), *memory_names()}
    products = {f"v_mfma_{p.name}" for p in matrix.PRODUCTS}
    scaled = {f"v_mfma_scale_f32_{shape}_f8f6f4" for shape in ("16x16x128", "32x32x64")}
    upper = {name.upper() for name in names | products | scaled}
    return {SPELLED.get(name, name) for name in upper}


def test_every_operation_is_tested() -> None:
    # Halves of packed instructions have rows of their own in the table.
    implemented = {name for name in native.library().names[1:] if not name.endswith("_HALF")}
    assert implemented - covered_names() == set()
    assert covered_names() - implemented == set()


def test_every_operation_has_a_number() -> None:
    """A name in the native table that no encoding has could never run."""
    known = {name for names in decode.operation_names().values() for name in names.values()}
    scaled = {f"V_MFMA_SCALE_F32_{shape}_F8F6F4" for shape in ("16X16X128", "32X32X64")}
    assert {n for n in native.library().names[1:] if not n.endswith("_HALF")} <= known | scaled
