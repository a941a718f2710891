"""Matrix instructions: against products in NumPy, and inside the matmuls that IREE compiles.

Where elements lie is written here once more, from IREE's and AMD's descriptions; IREE's own kernels,
which rely on the real thing, check both.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from iree.compiler import compile_str

from tests.gfx950.gfx950_kernels import Assembly, assemble
from tools import gfx950

LANES = 64
BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
E4M3Z, E5M2Z = ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz


@dataclass(frozen=True)
class Product:
    """blocks x [n, depth] times [depth, n], in the assembler's spelling."""

    name: str
    n: int
    depth: int
    blocks: int
    a: type
    b: type
    arch: str = "gfx950"
    modifiers: str = ""

    @property
    def result(self) -> type:
        return np.float64 if self.a is np.float64 else np.int32 if self.a is np.int8 else np.float32

    @property
    def run(self) -> int:
        """Consecutive k's in a lane."""
        return self.depth * self.n * self.blocks // LANES


def _fp8(suffix: str, n: int, depth: int, types: dict[str, type], arch: str) -> list[Product]:
    return [
        Product(f"f32_{n}x{n}x{depth}_{x}_{y}{suffix}", n, depth, 1, types[x], types[y], arch)
        for x in types
        for y in types
    ]


PRODUCTS = [
    *(
        Product(f"f32_{n}x{n}x{k}{b}_f32", n, k, blocks, np.float32, np.float32)
        for n, k, b, blocks in (
            (32, 1, "_2b", 2),
            (16, 1, "_4b", 4),
            (4, 1, "_16b", 16),
            (32, 2, "", 1),
            (16, 4, "", 1),
        )
    ),
    Product("f64_16x16x4_f64", 16, 4, 1, np.float64, np.float64),
    *(
        Product(f"f32_{n}x{n}x{k}{b}_{kind}", n, k, blocks, dtype, dtype)
        for kind, dtype in (("f16", np.float16), ("bf16", BF16))
        for n, k, b, blocks in (
            (32, 4, "_2b", 2),
            (16, 4, "_4b", 4),
            (4, 4, "_16b", 16),
            (32, 8, "", 1),
            (16, 16, "", 1),
            (16, 32, "", 1),
            (32, 16, "", 1),
        )
    ),
    *(
        Product(f"i32_{n}x{n}x{k}{b}_i8", n, k, blocks, np.int8, np.int8)
        for n, k, b, blocks in (
            (32, 4, "_2b", 2),
            (16, 4, "_4b", 4),
            (4, 4, "_16b", 16),
            (32, 16, "", 1),
            (16, 32, "", 1),
            (16, 64, "", 1),
            (32, 32, "", 1),
        )
    ),
    *_fp8("", 16, 32, {"fp8": E4M3, "bf8": E5M2}, "gfx950"),
    *_fp8("", 32, 16, {"fp8": E4M3, "bf8": E5M2}, "gfx950"),
    *_fp8("", 16, 32, {"fp8": E4M3Z, "bf8": E5M2Z}, "gfx942"),
    *_fp8("", 32, 16, {"fp8": E4M3Z, "bf8": E5M2Z}, "gfx942"),
    *(
        Product(f"f32_{n}x{n}x{k}_f8f6f4", n, k, 1, a, b, "gfx950", f" cbsz:{x} blgp:{y}")
        for n, k in ((16, 128), (32, 64))
        for x, a in ((0, E4M3), (1, E5M2))
        for y, b in ((0, E4M3), (1, E5M2))
    ),
]

_BODY = """
  s_load_dwordx8 s[4:11], s[0:1], 0x0
  v_lshlrev_b32 v1, {input_shift}, v0
  v_lshlrev_b32 v2, {result_shift}, v0
  s_waitcnt lgkmcnt(0)
{loads}
  s_waitcnt vmcnt(0)
  s_nop 7
  {instruction}
  s_nop 7
  s_nop 7
  s_nop 7
{stores}
"""


def per_lane(p: Product) -> int:
    """Registers of D in a lane."""
    return p.n * p.n * p.blocks // LANES * np.dtype(p.result).itemsize // 4


def operand_registers(p: Product) -> int:
    return max(1, p.run * np.dtype(p.a).itemsize // 4)


def range_of(kind: str, first: int, count: int) -> str:
    return f"{kind}{first}" if count == 1 else f"{kind}[{first}:{first + count - 1}]"


def moves(operation: str, kind: str, first: int, count: int, address: str, base: str) -> str:
    """Loads or stores of ``count`` registers, one dword at a time."""
    lines = []
    for i in range(count):
        register = f"{kind}{first + i}"
        ordered = f"{register}, {address}" if "load" in operation else f"{address}, {register}"
        if "load" in operation:
            ordered = f"{register}, {address}"
        lines.append(f"  {operation} {ordered}, {base} offset:{4 * i}")
    return "\n".join(lines)


def body(p: Product, accumulation: str) -> str:
    """``accumulation``: whether C and D are VGPRs (v) or accumulation registers (a)."""
    inputs, results = operand_registers(p), per_lane(p)
    loads = [moves("global_load_dword", "v", 8, inputs, "v1", "s[4:5]")]
    loads.append(moves("global_load_dword", "v", 24, inputs, "v1", "s[6:7]"))
    loads.append(moves("global_load_dword", accumulation, 64, results, "v2", "s[8:9]"))
    d = range_of(accumulation, 64, results)
    text = f"v_mfma_{p.name} {d}, {range_of('v', 8, inputs)}, {range_of('v', 24, inputs)}, {d}{p.modifiers}"
    return _BODY.format(
        input_shift=int(math.log2(16 * 4)),
        result_shift=int(math.log2(64 * 4)),
        loads="\n".join(loads),
        instruction=text,
        stores=moves("global_store_dword", accumulation, 64, results, "v2", "s[10:11]"),
    )


def operand_bytes(p: Product, values: np.ndarray) -> np.ndarray:
    """[block][row or column][k] as each lane's registers, padded to 64 bytes."""
    out = np.zeros((LANES, 64), np.uint8)
    for lane in range(LANES):
        row, block, first = lane % p.n, lane // p.n % p.blocks, lane // p.n // p.blocks * p.run
        mine = np.ascontiguousarray(values[block, row, first : first + p.run]).view(np.uint8)
        out[lane, : len(mine)] = mine
    return out


def result_rows(p: Product) -> np.ndarray:
    """For each lane and result register: block, row and column."""
    rows = np.zeros((LANES, p.n * p.n * p.blocks // LANES, 3), np.int64)
    for lane in range(LANES):
        for r in range(rows.shape[1]):
            rows[lane, r] = _place(p, lane, r)
    return rows


def _place(p: Product, lane: int, r: int) -> tuple[int, int, int]:
    if p.n == 4:
        return lane // 4, r, lane % 4
    if p.a is np.float64:
        return 0, 4 * r + lane // 16, lane % 16
    if p.n == 16:
        return r // 4, 4 * (lane // 16) + r % 4, lane % 16
    return r // 16, 8 * (r % 16 // 4) + 4 * (lane // 32) + r % 4, lane % 32


@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
def test_products(arch: str) -> None:
    products = [p for p in PRODUCTS if p.arch == arch]
    kernels = [
        Assembly(f"k{i}{kind}", body(p, kind), pointers=4, vgprs=128, agprs=128)
        for i, p in enumerate(products)
        for kind in "va"
    ]
    code = assemble(kernels, arch)
    generator = np.random.default_rng(0)
    for i, p in enumerate(products):
        # Small integers: sums are exact in every order.
        a = generator.integers(-6, 7, (p.blocks, p.n, p.depth)).astype(p.a)
        b = generator.integers(-6, 7, (p.blocks, p.n, p.depth)).astype(p.b)
        c = generator.integers(-99, 100, (p.blocks, p.n, p.n)).astype(p.result)
        exact = a.astype(np.float64) @ b.astype(np.float64).transpose(0, 2, 1) + c
        places = result_rows(p)
        index = tuple(np.moveaxis(places, -1, 0))
        for kind in "va":
            held = np.zeros((LANES, 256 // np.dtype(p.result).itemsize), p.result)
            held[:, : places.shape[1]] = c[index]
            out, memory = np.zeros_like(held), gfx950.Memory()
            given = (operand_bytes(p, a), operand_bytes(p, b), held)
            pointers = [memory.add_array(x, writable=False) for x in given]
            gfx950.execute(
                code.kernel(f"k{i}{kind}"), (1,), (LANES,), [*pointers, memory.add_array(out)], memory
            )
            assert (out[:, : places.shape[1]] == exact[index]).all(), (p.name, kind)


_SCALED = """
  s_load_dwordx8 s[4:11], s[0:1], 0x0
  v_lshlrev_b32 v1, 6, v0
  v_lshlrev_b32 v2, 8, v0
  v_lshlrev_b32 v3, 2, v0
  s_waitcnt lgkmcnt(0)
{loads}
  global_load_dword v40, v3, s[8:9]
  v_mov_b32 v41, 0x7f
  s_waitcnt vmcnt(0)
  v_mfma_scale_f32_{shape}_f8f6f4 {operands}, 0, v40, v41{modifiers}
  s_nop 15
  s_nop 15
{stores}
"""
SMALL = {8: (0, E4M3), 6: (2, ml_dtypes.float6_e2m3fn), 4: (4, ml_dtypes.float4_e2m1fn)}


@pytest.mark.parametrize("bits", SMALL)
@pytest.mark.parametrize(("n", "depth"), [(16, 128), (32, 64)])
def test_block_scales(n: int, depth: int, bits: int) -> None:
    """Each lane's 32 values have a scale of their own; fp6 and fp4 are packed without gaps."""
    kind, dtype = SMALL[bits]
    p = Product("scaled", n, depth, 1, np.float32, np.float32)
    results = per_lane(p)
    text = _SCALED.format(
        loads="\n".join(
            moves("global_load_dword", "v", 8 + 16 * i, bits, "v1", f"s[{4 + 2 * i}:{5 + 2 * i}]")
            for i in (0, 1)
        ),
        shape=f"{n}x{n}x{depth}",
        operands=", ".join(range_of("v", *where) for where in ((64, results), (8, bits), (24, bits))),
        modifiers=f" op_sel:[1,0] op_sel_hi:[0,0] cbsz:{kind} blgp:{kind}",
        stores=moves("global_store_dword", "v", 64, results, "v2", "s[10:11]"),
    )
    kernel = assemble([Assembly("scaled", text, pointers=4, vgprs=128)]).kernel("scaled")
    generator = np.random.default_rng(bits)
    codes = generator.integers(0, 2**bits, (2, LANES, 32))
    if bits == 8:
        codes %= 0x50  # small and positive: sums are exact
    scales = generator.integers(124, 131, LANES).astype(np.uint32)
    given = (*(_packed(c, bits) for c in codes), scales << np.uint32(8))
    out, memory = np.zeros((LANES, 64), np.float32), gfx950.Memory()
    pointers = [memory.add_array(x, writable=False) for x in given]
    gfx950.execute(kernel, (1,), (LANES,), [*pointers, memory.add_array(out)], memory)
    a, b = (np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)[c] for c in codes)
    a = a * np.exp2(scales.astype(np.float64) - 127)[:, None]
    rows = [x.reshape(-1, n, 32).transpose(1, 0, 2).reshape(n, depth) for x in (a, b)]
    _, i, j = np.moveaxis(result_rows(p), -1, 0)
    assert (out[:, :results] == (rows[0] @ rows[1].T).astype(np.float32)[i, j]).all()


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    out = np.zeros((LANES, 64), np.uint8)
    spread = (codes[:, :, None] >> np.arange(bits) & 1).reshape(LANES, -1).astype(np.uint8)
    out[:, : 4 * bits] = np.packbits(spread, axis=1, bitorder="little")
    return out


# -- IREE's matmuls ------------------------------------------------------------------------------------

_DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": BF16,
    "i8": np.int8,
    "f8E4M3FN": E4M3,
    "f8E4M3FNUZ": E4M3Z,
}
_MATMUL = """
#a = affine_map<(m, n, k) -> (m, k)>
#b = affine_map<(m, n, k) -> ({b_map})>
#c = affine_map<(m, n, k) -> (m, n)>
func.func @matmul(%a: tensor<{m}x{k}x{t}>, %b: tensor<{b_shape}x{t}>) -> tensor<{m}x{n}x{r}> {{
  %zero = arith.constant 0{point} : {r}
  %empty = tensor.empty() : tensor<{m}x{n}x{r}>
  %start = linalg.fill ins(%zero : {r}) outs(%empty : tensor<{m}x{n}x{r}>) -> tensor<{m}x{n}x{r}>
  %out = linalg.generic
    {{indexing_maps = [#a, #b, #c], iterator_types = ["parallel", "parallel", "reduction"]}}
    ins(%a, %b : tensor<{m}x{k}x{t}>, tensor<{b_shape}x{t}>) outs(%start : tensor<{m}x{n}x{r}>) {{
  ^bb0(%x: {t}, %y: {t}, %z: {r}):
    {extend}
    %product = arith.mul{kind} %x32, %y32 : {r}
    %sum = arith.add{kind} %product, %z : {r}
    linalg.yield %sum : {r}
  }} -> tensor<{m}x{n}x{r}>
  return %out : tensor<{m}x{n}x{r}>
}}
"""


def matmul_source(m: int, n: int, k: int, t: str, transposed: bool) -> str:
    r, kind = ("i32", "i") if t == "i8" else ("f32", "f")
    extend = "arith.extsi" if t == "i8" else "arith.extf"
    lines = [f"%{x}32 = {extend} %{x} : {t} to {r}" for x in "xy"]
    body = "\n    ".join(lines)
    source = _MATMUL.format(
        m=m,
        n=n,
        k=k,
        t=t,
        r=r,
        kind=kind,
        point="" if kind == "i" else ".0",
        extend="" if t == r else body,
        b_map="n, k" if transposed else "k, n",
        b_shape=f"{n}x{k}" if transposed else f"{k}x{n}",
    )
    return source.replace("%x32", "%x").replace("%y32", "%y") if t == r else source


@pytest.mark.parametrize("transposed", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize(
    ("arch", "t"),
    [("gfx950", t) for t in ("f32", "f16", "bf16", "i8", "f8E4M3FN")]
    + [("gfx942", t) for t in ("bf16", "i8", "f8E4M3FNUZ")],
)
def test_matmuls_of_iree(arch: str, t: str, transposed: bool, tmp_path: Path) -> None:
    m, n, k = 64, 128, 256
    compile_str(
        matmul_source(m, n, k, t, transposed),
        target_backends=["rocm"],
        extra_args=[f"--iree-rocm-target={arch}", f"--iree-hal-dump-executable-files-to={tmp_path}"],
    )
    configured = next(tmp_path.glob("configured*.mlir")).read_text()
    block = [int(x) for x in re.findall(r"workgroup_size = \[([\d, ]+)\]", configured)[0].split(",")]
    tile = [int(x) for x in re.findall(r"[{ ]workgroup = \[([\d, ]+)\]", configured)[0].split(",")]
    (kernel,) = gfx950.CodeObject(next(tmp_path.glob("*.hsaco")).read_bytes()).kernels.values()
    generator = np.random.default_rng(1)
    a = generator.integers(-5, 6, (m, k)).astype(_DTYPES[t])
    b = generator.integers(-5, 6, (n, k) if transposed else (k, n)).astype(_DTYPES[t])
    out, memory = np.zeros((m, n), np.int32 if t == "i8" else np.float32), gfx950.Memory()
    pointers = [memory.add_array(x, writable=False) for x in (a, b)]
    address = memory.add_array(out, defined=False)
    grid = (math.ceil(m / tile[0]) * math.ceil(n / tile[1]),)
    statistics = gfx950.execute(kernel, grid, block, [*pointers, address], memory)
    exact = a.astype(np.float64) @ (b.T if transposed else b).astype(np.float64)
    assert (out == exact).all() and not memory.undefined_bytes(address, out.nbytes).any()
    assert statistics.by_work["matrix"] > 0
