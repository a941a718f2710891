"""Machine code into records that the native executor runs.

The fields of every encoding are here, the numbers of the operations come from the tinygrad wheel (which
generates them from AMD's machine-readable ISA), and what an operation does is the native library's: its
table of names says which there are.  An instruction nobody knows becomes a record that stops whoever
executes it; code that is never reached may hold anything.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np

VGPR, LITERAL, VCC, NO_SADDR = 256, 255, 106, 0x7F
_SDWA, _DPP = 0xF9, 0xFA


class Encoding(IntEnum):
    """As ``enum Encoding`` in machine.h."""

    SOP1 = 0
    SOP2 = 1
    SOPK = 2
    SOPC = 3
    SOPP = 4
    SMEM = 5
    VOP1 = 6
    VOP2 = 7
    VOPC = 8
    VOP3 = 9
    VOP3SD = 10
    VOP3P = 11
    MFMA = 12
    DS = 13
    FLAT = 14
    GLOBAL = 15
    SCRATCH = 16
    MUBUF = 17


class Flag(IntFlag):
    """As ``enum Flags`` in machine.h."""

    SC0 = 1
    NT = 2
    SC1 = 4
    TO_LDS = 8
    OFFEN = 16
    IDXEN = 32
    SOFFSET = 64
    HAS_SADDR = 128
    IN_ACC = 256
    GDS = 1024


PLAIN, DPP, SDWA = range(3)

_RECORD = struct.Struct("<IHBB3HHHH4B4BiI2H")  # Inst of machine.h


@dataclass
class Instruction:
    """One decoded instruction; the fields are those of ``Inst`` in machine.h."""

    name: str
    encoding: Encoding
    dwords: int = 1
    src: tuple[int, int, int] = (0, 0, 0)
    dst: int = 0
    sdst: int = 0
    flags: int = 0
    neg: int = 0
    abs: int = 0
    opsel: int = 0
    opsel_hi: int = 0
    clamp: int = 0
    omod: int = 0
    variant: int = PLAIN
    acc: int = 0
    imm: int = 0
    literal: int = 0
    scale: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Code:
    """Decoded code: packed records, and for each dword the index of the record that starts there, or -1."""

    records: bytes
    count: int
    record_at: np.ndarray
    text: bytes

    def __hash__(self) -> int:
        return id(self)


# -- names of operations ---------------------------------------------------------------------------


@functools.cache
def operation_names() -> Mapping[Encoding, Mapping[int, str]]:
    """For each encoding, from operation number to name, without the suffix that tells encodings apart."""
    from tinygrad.runtime.autogen.amd.cdna import enum

    def names(*tables: object) -> dict[int, str]:
        return {op.value: _plain(op.name) for table in tables for op in table}  # type: ignore[attr-defined]

    tables = {encoding: names(getattr(enum, f"{encoding.name}Op")) for encoding in _PLAIN_TABLES}
    tables[Encoding.VOP3] = names(enum.VOP3Op, enum.VOP3SDOp)
    tables[Encoding.VOP3SD] = names(enum.VOP3SDOp)
    tables[Encoding.VOP3P] = names(enum.VOP3POp)
    return tables


_PLAIN_TABLES = [
    e for e in Encoding if e not in (Encoding.VOP3, Encoding.VOP3SD, Encoding.VOP3P, Encoding.MFMA)
]


def _plain(name: str) -> str:
    return name.removesuffix("_E32").removesuffix("_E64")


def _name(encoding: Encoding, number: int) -> str:
    return operation_names()[encoding].get(number, f"{encoding.name} operation {number}")


# -- encodings -------------------------------------------------------------------------------------


def _bits(word: int, high: int, low: int) -> int:
    return word >> low & (1 << (high - low + 1)) - 1


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _with_literal(i: Instruction, word: int) -> Instruction:
    """Take the next dword as a literal if an operand asks for it."""
    if LITERAL in i.src[: 3 if i.encoding >= Encoding.VOP1 else 2] and i.encoding is not Encoding.SOPK:
        i.dwords, i.literal = 2, word >> 32 & 0xFFFFFFFF
    return i


def _sop1(w: int) -> Instruction:
    name = _name(Encoding.SOP1, _bits(w, 15, 8))
    return _with_literal(Instruction(name, Encoding.SOP1, src=(w & 0xFF, 0, 0), dst=_bits(w, 22, 16)), w)


def _sop2(w: int) -> Instruction:
    name, dst = _name(Encoding.SOP2, _bits(w, 29, 23)), _bits(w, 22, 16)
    return _with_literal(Instruction(name, Encoding.SOP2, src=(w & 0xFF, _bits(w, 15, 8), 0), dst=dst), w)


def _sopc(w: int) -> Instruction:
    name = _name(Encoding.SOPC, _bits(w, 22, 16))
    return _with_literal(Instruction(name, Encoding.SOPC, src=(w & 0xFF, _bits(w, 15, 8), 0)), w)


def _sopk(w: int) -> Instruction:
    name, dst = _name(Encoding.SOPK, _bits(w, 27, 23)), _bits(w, 22, 16)
    src = (dst, LITERAL, 0) if name.startswith("S_CMPK") else (LITERAL, 0, 0)
    i = Instruction(name, Encoding.SOPK, src=src, dst=dst, imm=_signed(w & 0xFFFF, 16))
    if name == "S_SETREG_IMM32_B32":
        i.dwords, i.literal = 2, w >> 32 & 0xFFFFFFFF
    return i


def _sopp(w: int) -> Instruction:
    return Instruction(_name(Encoding.SOPP, _bits(w, 22, 16)), Encoding.SOPP, imm=_signed(w & 0xFFFF, 16))


def _smem(w: int) -> Instruction:
    name, scaled = _name(Encoding.SMEM, _bits(w, 25, 18)), _bits(w, 17, 17)
    i = Instruction(name, Encoding.SMEM, dwords=2, dst=_bits(w, 12, 6))
    soffset = None
    if scaled:
        i.imm = _signed(_bits(w, 52, 32), 21)
        soffset = _bits(w, 63, 57) if _bits(w, 14, 14) else None
    else:
        soffset = _bits(w, 63, 57) if _bits(w, 14, 14) else _bits(w, 38, 32)
    i.src = (_bits(w, 5, 0) * 2, soffset or 0, 0)
    i.flags = Flag.SOFFSET if soffset is not None else 0
    return i


def _vop1(w: int) -> Instruction:
    i = Instruction(
        _name(Encoding.VOP1, _bits(w, 16, 9)), Encoding.VOP1, src=(w & 0x1FF, 0, 0), dst=_bits(w, 24, 17)
    )
    return _with_variant(i, w, has_src1=False)


# Operations that also read their destination, or VCC.
_ACCUMULATING = (
    *("V_FMAC_F32", "V_FMAC_F64", "V_DOT2C_F32_F16", "V_DOT2C_F32_BF16"),
    *("V_DOT2C_I32_I16", "V_DOT4C_I32_I8", "V_DOT8C_I32_I4"),
)
_READING_VCC = ("V_CNDMASK_B32", "V_ADDC_CO_U32", "V_SUBB_CO_U32", "V_SUBBREV_CO_U32")


def _vop2(w: int) -> Instruction:
    name, dst, src1 = _name(Encoding.VOP2, _bits(w, 30, 25)), _bits(w, 24, 17), VGPR + _bits(w, 16, 9)
    src = (w & 0x1FF, src1, 0)
    if name in _ACCUMULATING:
        src = (*src[:2], VGPR + dst)
    elif name in _READING_VCC:
        src = (*src[:2], VCC)
    elif name == "V_FMAMK_F32":
        src = (src[0], LITERAL, src1)
    elif name == "V_FMAAK_F32":
        src = (src[0], src1, LITERAL)
    return _with_variant(Instruction(name, Encoding.VOP2, src=src, dst=dst, sdst=VCC), w)


def _vopc(w: int) -> Instruction:
    src = (w & 0x1FF, VGPR + _bits(w, 16, 9), 0)
    i = _with_variant(
        Instruction(_name(Encoding.VOPC, _bits(w, 24, 17)), Encoding.VOPC, src=src, sdst=VCC), w
    )
    if i.variant == SDWA and i.literal >> 15 & 1:
        i.sdst = _bits(i.literal, 14, 8)
    return i


def _with_variant(i: Instruction, w: int, has_src1: bool = True) -> Instruction:
    """DPP and SDWA put the first operand, and what is done to operands, into a second dword."""
    if i.src[0] not in (_SDWA, _DPP):
        return _with_literal(i, w)
    more = w >> 32 & 0xFFFFFFFF
    i.variant, i.dwords, i.literal = (SDWA if i.src[0] == _SDWA else DPP), 2, more
    scalar0, scalar1 = (more >> 23 & 1, more >> 31 & 1) if i.variant == SDWA else (0, 0)
    src0 = (more & 0xFF) + (0 if scalar0 else VGPR)
    src1 = i.src[1] - VGPR if scalar1 and has_src1 else i.src[1]
    i.src = (src0, src1, i.src[2])
    return i


def _vop3(w: int) -> Instruction:
    name, dst = _name(Encoding.VOP3, _bits(w, 25, 16)), w & 0xFF
    i = Instruction(name, Encoding.VOP3, dwords=2, src=_three_sources(w), dst=dst)
    i.neg, i.omod, i.clamp = _bits(w, 63, 61), _bits(w, 60, 59), _bits(w, 15, 15)
    if _bits(w, 25, 16) in operation_names()[Encoding.VOP3SD]:
        i.encoding, i.sdst = Encoding.VOP3SD, _bits(w, 14, 8)
        return i
    i.abs, i.opsel = _bits(w, 10, 8), _bits(w, 14, 11)
    if name.startswith("V_CMP"):
        i.sdst = dst
    elif name in _ACCUMULATING:
        i.src = (*i.src[:2], VGPR + dst)
    elif name.startswith("V_BITOP3"):  # the modifiers are a truth table
        i.imm = i.omod << 6 | i.abs << 3 | i.neg
        i.neg = i.abs = i.omod = 0
    return i


def _three_sources(w: int) -> tuple[int, int, int]:
    return _bits(w, 40, 32), _bits(w, 49, 41), _bits(w, 58, 50)


def _vop3p(w: int) -> Instruction:
    name = _name(Encoding.VOP3P, _bits(w, 22, 16))
    if name.startswith(("V_MFMA", "V_SMFMAC")):
        return _mfma(name, w)
    i = Instruction(name, Encoding.VOP3P, dwords=2, src=_three_sources(w), dst=w & 0xFF)
    i.neg, i.abs, i.opsel = _bits(w, 63, 61), _bits(w, 10, 8), _bits(w, 13, 11)
    i.opsel_hi, i.clamp = _bits(w, 60, 59) | _bits(w, 14, 14) << 2, _bits(w, 15, 15)
    return i


def _mfma(name: str, w: int) -> Instruction:
    """In neg, abs and opsel: BLGP, CBSZ and ABID.  A first half with block scales may come before, and
    which byte of them is used takes the place of ABID."""
    scale, dwords, scale_byte, scale_byte_hi = (0, 0), 2, 0, 0
    if name == "V_MFMA_LD_SCALE_B32":
        scale, scale_byte, scale_byte_hi = (
            (_bits(w, 40, 32), _bits(w, 49, 41)),
            _bits(w, 12, 11),
            _bits(w, 60, 59),
        )
        dwords, w = 4, w >> 64
        name = _name(Encoding.VOP3P, _bits(w, 22, 16)).replace("V_MFMA_F32", "V_MFMA_SCALE_F32")
    i = Instruction(name, Encoding.MFMA, dwords=dwords, src=_three_sources(w), dst=w & 0xFF, scale=scale)
    i.neg, i.abs, i.opsel = _bits(w, 63, 61), _bits(w, 10, 8), _bits(w, 14, 11)
    if dwords == 4:
        i.opsel, i.opsel_hi = scale_byte, scale_byte_hi
    i.acc = _bits(w, 60, 59) | _bits(w, 15, 15) << 2
    return i


def _ds(w: int) -> Instruction:
    i = Instruction(
        _name(Encoding.DS, _bits(w, 24, 17)), Encoding.DS, dwords=2, dst=_bits(w, 63, 56), imm=w & 0xFFFF
    )
    i.src = (_bits(w, 39, 32), _bits(w, 47, 40), _bits(w, 55, 48))
    i.flags = (Flag.GDS if _bits(w, 16, 16) else 0) | (Flag.IN_ACC if _bits(w, 25, 25) else 0)
    return i


_SEGMENTS = (Encoding.FLAT, Encoding.SCRATCH, Encoding.GLOBAL)


def _flat(w: int) -> Instruction:
    segment = _bits(w, 15, 14)
    encoding = _SEGMENTS[segment] if segment < 3 else Encoding.FLAT
    name, saddr = _name(encoding, _bits(w, 24, 18)), _bits(w, 54, 48)
    i = Instruction(name, encoding, dwords=2, dst=_bits(w, 63, 56), sdst=saddr)
    i.src = (_bits(w, 39, 32), _bits(w, 47, 40), 0)
    i.imm = _bits(w, 11, 0) if encoding is Encoding.FLAT else _signed(_bits(w, 12, 0), 13)
    i.flags = _cache_flags(w, 16, 17, 25) | (Flag.IN_ACC if _bits(w, 55, 55) else 0)
    i.flags |= Flag.HAS_SADDR if saddr != NO_SADDR and encoding is not Encoding.FLAT else 0
    i.flags |= (Flag.OFFEN if _bits(w, 13, 13) else 0) | (Flag.TO_LDS if "_LOAD_LDS_" in name else 0)
    return i


def _cache_flags(w: int, sc0: int, nt: int, sc1: int) -> int:
    return (w >> sc0 & 1) * Flag.SC0 | (w >> nt & 1) * Flag.NT | (w >> sc1 & 1) * Flag.SC1


def _mubuf(w: int) -> Instruction:
    data = _bits(w, 47, 40)
    i = Instruction(
        _name(Encoding.MUBUF, _bits(w, 24, 18)), Encoding.MUBUF, dwords=2, dst=data, imm=w & 0xFFF
    )
    i.src, i.sdst = (_bits(w, 39, 32), data, _bits(w, 63, 56)), _bits(w, 52, 48) * 4
    i.flags = _cache_flags(w, 14, 17, 15) | (Flag.IN_ACC if _bits(w, 55, 55) else 0)
    i.flags |= (w >> 12 & 1) * Flag.OFFEN | (w >> 13 & 1) * Flag.IDXEN | (w >> 16 & 1) * Flag.TO_LDS
    return i


# By leading bits, the most specific first.
_FORMATS: tuple[tuple[int, int, Callable[[int], Instruction]], ...] = (
    (9, 0b101111101, _sop1),
    (9, 0b101111110, _sopc),
    (9, 0b101111111, _sopp),
    (9, 0b110100111, _vop3p),
    (7, 0b0111110, _vopc),
    (7, 0b0111111, _vop1),
    (6, 0b110000, _smem),
    (6, 0b110100, _vop3),
    (6, 0b110110, _ds),
    (6, 0b110111, _flat),
    (6, 0b111000, _mubuf),
    (4, 0b1011, _sopk),
    (2, 0b10, _sop2),
    (1, 0b0, _vop2),
)


@functools.lru_cache(1 << 16)
def decode_instruction(data: bytes) -> Instruction | None:
    """The instruction at the start of ``data`` (16 bytes, zero-padded), or None for no known encoding."""
    word = int.from_bytes(data, "little")
    top = word & 0xFFFFFFFF
    for bits, value, decode in _FORMATS:
        if top >> (32 - bits) == value:
            return decode(word)
    return None


# -- a whole code section --------------------------------------------------------------------------


def decode(text: bytes, numbers: Mapping[str, int]) -> Code:
    """Decode ``text``; ``numbers`` gives the native library's number of each operation it knows."""
    record_at = np.full(len(text) // 4 + 1, -1, np.int32)
    decoded: list[tuple[int, Instruction | None]] = []
    at, padded = 0, text + bytes(16)
    while at < len(text):
        record_at[at // 4] = len(decoded)
        instruction = decode_instruction(padded[at : at + 16])
        decoded.append((at, instruction))
        at += 4 * (instruction.dwords if instruction else 1)
    records = b"".join(_packed(at, i, numbers, record_at) for at, i in decoded)
    return Code(records, len(decoded), record_at, text)


def _packed(at: int, i: Instruction | None, numbers: Mapping[str, int], record_at: np.ndarray) -> bytes:
    if i is None:
        i = Instruction("", Encoding.SOPP)
    number, imm = numbers.get(i.name, 0), i.imm
    if i.encoding is Encoding.SOPP and "BRANCH" in i.name:
        target = at // 4 + 1 + imm
        inside = 0 <= target < len(record_at) and record_at[target] >= 0
        # Counts records from the next one on.  A branch into the middle of an instruction is none.
        number, imm = (number, int(record_at[target] - record_at[at // 4]) - 1) if inside else (0, 0)
    modifiers = (i.neg, i.abs, i.opsel, i.opsel_hi, i.clamp, i.omod, i.variant, i.acc)
    heads = (at, number, i.encoding, i.dwords, *i.src, i.dst, i.sdst, int(i.flags))
    return _RECORD.pack(*heads, *modifiers, imm, i.literal, *i.scale)


def disassemble(data: bytes) -> str:
    """The instruction at the start of ``data`` for people to read, and its bytes."""
    from tinygrad.renderer.amd import decode_inst

    padded = data.ljust(16, b"\0")
    try:
        instruction = decode_inst(padded, "cdna")
        text, size = repr(instruction), instruction.size()
    except (ValueError, KeyError, AssertionError, AttributeError, RuntimeError):
        text, size = "no instruction", 4
    return f"{text}  [{padded[:size].hex(' ', 4)}]"
