"""The integer rewrite of float8 conversions gives what PyTorch's casts give, for every code and every float.

The rewritten functions run on llvm-cpu, which needs no rewrite, so nothing but the rewrite is tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import iree.compiler
import iree.runtime as rt
import numpy as np
import pytest
import torch
from iree.compiler import ir

from lowering.program import floats
from lowering.targets import resolve

FORMATS = {
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E4M3FNUZ": torch.float8_e4m3fnuz,
    "f8E5M2": torch.float8_e5m2,
}
WIDE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

# One module per format: `decode_<wide>` and `encode_<wide>` take and give the bits of the floats as integers.
FUNCTION = """
func.func @{name}(%x: tensor<?xi{from_bits}>) -> tensor<?xi{to_bits}> {{
  %c0 = arith.constant 0 : index
  %n = tensor.dim %x, %c0 : tensor<?xi{from_bits}>
  %out = tensor.empty(%n) : tensor<?xi{to_bits}>
  %y = linalg.generic
      {{indexing_maps = [affine_map<(i) -> (i)>, affine_map<(i) -> (i)>], iterator_types = ["parallel"]}}
      ins(%x : tensor<?xi{from_bits}>) outs(%out : tensor<?xi{to_bits}>) {{
  ^bb0(%a: i{from_bits}, %b: i{to_bits}):
    %float = arith.bitcast %a : i{from_bits} to {source}
    %converted = arith.{op} %float : {source} to {result}
    %bits = arith.bitcast %converted : {result} to i{to_bits}
    linalg.yield %bits : i{to_bits}
  }} -> tensor<?xi{to_bits}>
  return %y : tensor<?xi{to_bits}>
}}
"""


def width(element: str) -> int:
    return {"f64": 64, "f32": 32, "f16": 16, "bf16": 16}.get(element, 8)


def conversions(narrow: str) -> str:
    text = ""
    for wide in WIDE:
        for name, op, source, result in (
            ("decode", "extf", narrow, wide),
            ("encode", "truncf", wide, narrow),
        ):
            text += FUNCTION.format(
                name=f"{name}_{wide}",
                op=op,
                source=source,
                result=result,
                from_bits=width(source),
                to_bits=width(result),
            )
    return text


@cache
def rewritten(narrow: str) -> rt.BoundModule:
    """The conversions of ``narrow`` as a running program, rewritten as for a target that lacks them."""
    target = resolve({"f8E4M3FN": "h200", "f8E4M3FNUZ": "gfx950", "f8E5M2": "gfx942"}[narrow])
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(conversions(narrow))
        assert floats.rewrite_unsupported(module, target) == 2 * len(WIDE)
        module.operation.verify()
        text = str(module)
    assert not [line for line in text.splitlines() if narrow in line and ("extf" in line or "truncf" in line)]
    # Without the flag IREE would make the f64 functions f32.
    flags = ["--iree-llvmcpu-target-cpu=host", "--iree-input-demote-f64-to-f32=false"]
    vmfb = iree.compiler.compile_str(text, target_backends=["llvm-cpu"], extra_args=flags)
    config = rt.Config("local-sync")
    return rt.load_vm_module(rt.VmModule.copy_buffer(config.vm_instance, vmfb), config)


def call(function: Callable[..., rt.DeviceArray], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``function`` on the bits of ``x``; the result's bits as ``dtype``."""
    bits = x.view(torch.int8 if x.element_size() == 1 else INTEGERS[x.dtype])
    result = torch.from_numpy(np.array(function(bits.numpy()).to_host()))
    return result.view(dtype)


def floats_to_try(narrow: torch.dtype, wide: torch.dtype) -> torch.Tensor:
    """Every value of the narrow format, what lies half way between and just beside that, and any float."""
    values = torch.arange(256, dtype=torch.uint8).view(narrow).double()
    values = values[values.isfinite()].unique()
    beyond = torch.tensor([1.0, 1.0625, 1.125, 1.25, 2.0, 2.0**20]).double() * values.max()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, beyond, -beyond])
    exact = points.to(wide)
    beside = [torch.nextafter(exact, torch.full_like(exact, sign * float("inf"))) for sign in (1, -1)]
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan")])
    generator = torch.Generator().manual_seed(0)
    integers = INTEGERS[wide]
    if exact.element_size() == 2:  # all there are
        anything = torch.arange(-(2**15), 2**15).to(integers).view(wide)
    else:
        info = torch.iinfo(integers)
        anything = torch.randint(info.min, info.max, (300_000,), generator=generator, dtype=torch.int64)
        anything = anything.to(integers).view(wide)
    spread = torch.randn(300_000, generator=generator) * 2.0 ** torch.randint(
        -24, 20, (300_000,), generator=generator
    )
    return torch.cat([exact, *beside, special.to(wide), anything, spread.to(wide)])


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("narrow", FORMATS)
def test_every_code_decodes_as_in_torch(narrow: str, wide: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[narrow])
    expected = codes.to(WIDE[wide])
    got = call(rewritten(narrow)[f"decode_{wide}"], codes, WIDE[wide])
    assert torch.equal(got.isnan(), expected.isnan())
    assert expected.isnan().sum() == {"f8E4M3FN": 2, "f8E4M3FNUZ": 1, "f8E5M2": 6}[narrow]
    numbers, integers = ~expected.isnan(), INTEGERS[WIDE[wide]]
    assert torch.equal(got.view(integers)[numbers], expected.view(integers)[numbers])


@pytest.mark.parametrize("wide", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("narrow", FORMATS)
def test_every_float_encodes_as_in_torch(narrow: str, wide: str) -> None:
    x = floats_to_try(FORMATS[narrow], WIDE[wide])
    expected = x.to(FORMATS[narrow])
    got = call(rewritten(narrow)[f"encode_{wide}"], x, FORMATS[narrow])
    assert torch.equal(got.float().isnan(), expected.float().isnan())
    numbers = ~x.isnan()
    wrong = numbers & (got.view(torch.uint8) != expected.view(torch.uint8))
    assert not wrong.any(), f"{wrong.sum()} of {x.numel()} differ, the first from {x[wrong][0]}"
    assert numbers.sum() > 60_000


def test_what_is_too_large_for_e4m3fn_is_nan_where_torch_makes_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    older = dataclasses.replace(floats.FORMATS["f8E4M3FN"], overflow=0x7F)
    monkeypatch.setitem(floats.FORMATS, "f8E4M3FN", older)
    x = floats_to_try(torch.float8_e4m3fn, torch.float32)
    got = call(rewritten.__wrapped__("f8E4M3FN")["encode_f32"], x, torch.float8_e4m3fn)
    fits = x.abs() <= 464  # half way to what would come next, which is odd
    assert got.float()[~fits].isnan().all() and (~fits).any()
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(got.view(torch.uint8)[fits], expected.view(torch.uint8)[fits])


@pytest.mark.parametrize("narrow", FORMATS)
def test_a_float64_is_rounded_to_float32_first_as_in_torch(narrow: str) -> None:
    x = floats_to_try(FORMATS[narrow], torch.float64)
    got = call(rewritten(narrow)["encode_f64"], x, FORMATS[narrow])
    expected = x.to(FORMATS[narrow])
    numbers = ~x.isnan()
    assert torch.equal(got.view(torch.uint8)[numbers], expected.view(torch.uint8)[numbers])


def test_a_code_survives_the_round_trip() -> None:
    """Decode and encode in one program: every number comes back as the code it was."""
    for narrow, dtype in FORMATS.items():
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        wide = call(rewritten(narrow)["decode_f32"], codes, torch.float32)
        back = call(rewritten(narrow)["encode_f32"], wide, dtype)
        numbers = ~wide.isnan()
        assert torch.equal(back.view(torch.uint8)[numbers], codes.view(torch.uint8)[numbers])


@pytest.mark.parametrize(
    ("target", "rewrites"),
    [
        ("cpu", {"f8E4M3FN", "f8E4M3FNUZ", "f8E5M2"}),
        ("h200", {"f8E4M3FN", "f8E4M3FNUZ", "f8E5M2"}),
        ("b200", {"f8E4M3FN", "f8E4M3FNUZ", "f8E5M2"}),
        ("gfx950", {"f8E4M3FNUZ"}),
        ("gfx942", {"f8E4M3FN", "f8E5M2"}),
    ],
)
def test_only_what_a_target_lacks_is_rewritten(target: str, rewrites: set[str]) -> None:
    for narrow in FORMATS:
        with ir.Context(), ir.Location.unknown():
            module = ir.Module.parse(conversions(narrow))
            before = str(module)
            count = floats.rewrite_unsupported(module, resolve(target))
            assert count == (2 * len(WIDE) if narrow in rewrites else 0)
            assert (str(module) == before) == (count == 0)


@pytest.mark.parametrize(("arch", "rounds"), [("x86_64+avx512fp16", True), ("x86_64+f16c", False)])
def test_a_float16_is_rounded_where_the_processor_computes_it(
    arch: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does, LLVM would join x * x and the sum, which PyTorch rounds apart."""
    monkeypatch.setattr(floats, "host_arch", lambda: arch)
    text = FUNCTION.format(name="narrow", op="truncf", source="f32", result="f16", from_bits=32, to_bits=16)
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        assert floats.rewrite_unsupported(module, resolve("cpu")) == 0
        assert ("to_nearest_even" in str(module)) == rounds
