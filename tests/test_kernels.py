"""The row kernel against eager PyTorch, bit for bit: the CPU kernel natively, the GPU kernel in emulation.

``emulation.cpp`` runs the shared GPU source in lockstep on the host with waves of 32 and of 64 lanes,
so the GPU kernel's numerics, lane mapping and stores are tested on a machine without a GPU.  Rows are
made of small integers where bits are compared: their sum of squares is exact in every order.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import itertools
import math
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile

from lowering import abi, toolchain
from lowering.errors import CompileError, ToolchainError
from lowering.kernel import KernelInstance, instance, why_unsupported
from lowering.mapping import GridRule, Mapping, Tile, choose_mapping
from lowering.targets import Target, resolve
from patterns.contracts import GatedActivation, Quantization, RmsNorm, RowSpec

Launch = Callable[[Sequence[int], int], None]

CPU, SM90, SM100 = resolve("cpu"), resolve("sm_90"), resolve("sm_100")
GFX950, GFX942 = resolve("gfx950"), resolve("gfx942")
Q128 = Quantization(128)
GUARD = 64  # poisoned bytes on either side of every tensor
POISON = 0xA5


def spec(hidden: int, dtype: str = "bfloat16", rounding: str | None = "once", **fields) -> RowSpec:
    """A RowSpec in short: ``rounding`` None is no norm at all; ``quants`` its quantizations."""
    norm = None
    if rounding and "gate" not in fields:
        residual, offset = fields.pop("residual", None), fields.pop("offset", 0.0)
        norm = RmsNorm(fields.pop("eps", 1e-6), rounding, residual, offset)
    weight = fields.pop("weight", dtype if norm else None)
    quantizations = tuple(fields.pop("quants", ()))
    return RowSpec(hidden, dtype, norm, weight_dtype=weight, quantizations=quantizations, **fields)


CASES = {
    "once": spec(7168, quants=[Q128]),
    "none": spec(7168, rounding="none", weight="float32", quants=[Q128]),
    "add_exact_all": spec(
        1536,
        residual="exact",
        writes_sum=True,
        writes_y=True,
        quants=[Quantization(128, layout="column_tma")],
    ),
    "add_rounded_twice": spec(
        576, rounding="twice", residual="rounded", writes_sum=True, quants=[Quantization(64)]
    ),
    "twice_wide_weight": spec(
        1536, rounding="twice", weight="float32", writes_y=True, quants=[Quantization(32)]
    ),
    "add_none_f16": spec(
        2048, "float16", "none", residual="exact", weight="bfloat16", writes_y=True, quants=[Quantization(64)]
    ),
    "f16_once": spec(384, "float16", weight="float32", writes_y=True, quants=[Q128]),
    "f16_twice": spec(4096, "float16", "twice", residual="rounded", writes_sum=True, quants=[Q128]),
    "f32": spec(1536, "float32", residual="exact", writes_sum=True, writes_y=True, quants=[Q128]),
    "f32_narrow_weight": spec(512, "float32", "twice", weight="bfloat16", quants=[Quantization(32)]),
    "no_weight": spec(128, weight=None, writes_y=True, quants=[Q128]),
    "plain": spec(7168, rounding=None, quants=[Q128]),
    "plain_smallest": spec(32, "float32", None, quants=[Quantization(32, layout="column_tma")]),
    "four": spec(
        16384,
        residual="exact",
        writes_sum=True,
        writes_y=True,
        quants=[
            Q128,
            Quantization(32, layout="column_tma"),
            Quantization(64),
            Quantization(128, amax_floor=1e-4),
        ],
    ),
    "no_floor": spec(256, rounding=None, quants=[Quantization(64, amax_floor=0.0)]),
    "norm_only": spec(1000, rounding="twice", residual="rounded", writes_sum=True, writes_y=True),
    "norm_any_length": spec(131, "float16", writes_y=True),
    "norm_one": spec(1, "float32", rounding="none", writes_y=True),
}

# Schemes in fours, so that few instances cover many: e5m2, column, packed, Triton's reciprocals; ...
SCHEMES = {
    "layouts": [
        Quantization(128, "float8_e5m2"),
        Quantization(64, layout="column"),
        Quantization(128, scale="ue8m0", layout="ue8m0_packed"),
        Quantization(32, scale_division="reciprocal", quotient="reciprocal"),
    ],
    "rows": [
        Quantization(None),
        Quantization(None, "int8", scale_division="reciprocal", quotient="reciprocal", scale_floor=2**-23),
        Quantization(128, amax_floor=0.0, scale_floor=1 / (448 * 512)),
        Quantization(64, scale="ue8m0"),
    ],
    "bounds": [
        Quantization(128, "int8", layout="column_tma"),
        Quantization(32, "int8", scale="ue8m0", layout="ue8m0_packed"),
        Quantization(None, amax_ceiling=20.0, layout="column"),
        Quantization(64, limit=203.0, scale="ue8m0", layout="column_tma", scale_division="reciprocal"),
    ],
    "fnuz": [
        Quantization(128, "float8_e4m3fnuz"),
        Quantization(64, "float8_e4m3fnuz", limit=224.0, scale_division="reciprocal"),
        Quantization(128, "float8_e4m3fnuz", scale="ue8m0", layout="ue8m0_packed"),
        Quantization(32, "int8", amax_floor=0.0, quotient="reciprocal"),
    ],
}
PRODUCERS: dict[str, dict] = {
    "once": {"writes_y": True},
    "twice": {"rounding": "twice", "weight": "float32"},
    "none": {"rounding": "none", "dtype": "float16"},
    "gemma": {"offset": 1.0},
    "gemma_twice": {"offset": 1.0, "rounding": "twice", "writes_y": True},
    "add": {"residual": "rounded", "writes_sum": True, "writes_y": True},
    "plain": {"rounding": None},
    "plain_f32": {"rounding": None, "dtype": "float32"},
    "silu": {"gate": GatedActivation("silu")},
    "gelu": {"gate": GatedActivation("gelu", "twice", packed=False), "dtype": "float16", "writes_y": True},
    "gelu_tanh": {"gate": GatedActivation("gelu_tanh", "none")},
}


def scheme_case(producer: str, schemes: str, hidden: int) -> RowSpec:
    return spec(hidden, quants=SCHEMES[schemes], **PRODUCERS[producer])


# Every producer and every scheme; short rows share a wave, long ones need a barrier.
SCHEME_CASES = [
    ("once", "layouts", 384),
    ("twice", "bounds", 3200),
    ("none", "layouts", 640),
    ("gemma", "rows", 3200),
    ("gemma_twice", "bounds", 384),
    ("add", "rows", 640),
    ("plain", "rows", 128),
    ("plain_f32", "bounds", 384),
    ("silu", "layouts", 3200),
    ("gelu", "rows", 384),
    ("gelu_tanh", "bounds", 640),
]


# -- the reference ------------------------------------------------------------------------------------


def reference(spec: RowSpec, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Every output of ``spec`` for its inputs, in the dispatch's order, in eager torch."""
    given = list(tensors)
    x, dtype = given.pop(0), getattr(torch, spec.dtype)
    outputs = []
    y = x.float()
    if spec.gate:
        y = _gated(spec, x, given.pop(0) if not spec.gate.packed else None)
    if spec.norm:
        x32 = x.float()
        if spec.norm.residual:
            x32 = x32 + given.pop(0).float()
            total = x32.to(dtype)
            x32 = total.float() if spec.norm.residual == "rounded" else x32
            outputs += [total] if spec.writes_sum else []
        y = _normed(spec, x32, given.pop(0) if spec.weight_dtype else None)
    if spec.writes_y:
        outputs.append(y.to(dtype))
    for quantization in spec.quantizations:
        outputs += _quantized(y.float(), quantization)
    return outputs


def _normed(spec: RowSpec, x32: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    assert spec.norm
    dtype = getattr(torch, spec.dtype)
    if weight is not None and spec.norm.weight_offset:
        weight = weight.float() + spec.norm.weight_offset
    value = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + spec.norm.eps)
    if spec.norm.rounding == "twice":
        value = value.to(dtype)
        return value if weight is None else value * weight
    value = value if weight is None else value * weight.float()
    return value.to(dtype) if spec.norm.rounding == "once" else value


def _gated(spec: RowSpec, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert spec.gate
    if up is None:
        gate, up = gate.chunk(2, -1)
    dtype = gate.dtype
    value = ACTIVATIONS[spec.gate.activation](gate.float())
    if spec.gate.rounding == "twice":
        return value.to(dtype) * up
    value = value * up.float()
    return value.to(dtype) if spec.gate.rounding == "once" else value


ACTIVATIONS = {
    "silu": lambda g: g / (1 + torch.exp(-g)),
    "gelu": lambda g: g / 2 * (1 + torch.erf(g * math.sqrt(0.5))),
    "gelu_tanh": lambda g: g / (1 + torch.exp(-math.sqrt(8 / math.pi) * (g + 0.044715 * g**3))),
}


def _quantized(y: torch.Tensor, quantization: Quantization) -> list[torch.Tensor]:
    rows, hidden = y.shape
    groups = y.unflatten(-1, (quantization.groups(hidden), hidden // quantization.groups(hidden)))
    scale = _scale(groups.abs().amax(-1), quantization)
    divisor = scale.unsqueeze(-1)
    q = groups / divisor if quantization.quotient == "true" else groups * (1.0 / divisor)
    q = q.clamp(-quantization.qmax, quantization.qmax).reshape(rows, hidden)
    if quantization.dtype == "int8":
        q = q.nan_to_num(0.0).round()
    return [q.to(getattr(torch, quantization.dtype)), _laid_out(scale, quantization.layout)]


def _scale(amax: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    amax = amax.clamp(min=quantization.amax_floor, max=quantization.amax_ceiling)
    qmax = torch.tensor(quantization.qmax, dtype=torch.float32)
    scale = amax / qmax if quantization.scale_division == "true" else amax * (1.0 / qmax)
    scale = scale.clamp(min=quantization.scale_floor)
    if quantization.scale == "ue8m0":
        fraction, exponent = torch.frexp(scale)
        exponent = (exponent - (fraction == 0.5).int()).clamp(-126, 127)
        exponent = torch.where(scale > 1e38, 127, torch.where(scale < 2.0**-126, -126, exponent))
        scale = torch.where(scale.isnan(), scale, torch.exp2(exponent.double()).float())
    return scale


def _laid_out(scale: torch.Tensor, layout: str) -> torch.Tensor:
    rows, groups = scale.shape
    padded = (rows + 3) // 4 * 4
    if layout == "ue8m0_packed":
        codes = torch.zeros((groups + 3) // 4, padded, 4, dtype=torch.uint8)
        for g in range(groups):
            codes[g // 4, :rows, g % 4] = (scale[:, g].contiguous().view(torch.int32) >> 23).to(torch.uint8)
        return codes.view(torch.int32).squeeze(-1)
    if layout == "column_tma":
        return torch.nn.functional.pad(scale.T, (0, padded - rows))
    return scale.T.contiguous() if layout == "column" else scale


# -- running an instance ------------------------------------------------------------------------------


def cpu_launcher(kernel: KernelInstance, directory: Path) -> Launch:
    """The CPU object linked into a library and called the way IREE calls it, workgroup by workgroup."""
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    (directory / "kernel.o").write_bytes(data)
    library = directory / "kernel.so"
    subprocess.run(
        [c_compiler(), "-shared", "-nostdlib", "kernel.o", "-o", library], cwd=directory, check=True
    )
    entry = getattr(ctypes.CDLL(str(library)), kernel.entry)
    entry.restype = None

    def launch(pointers: Sequence[int], rows: int) -> None:
        # A base pointer and an element offset.
        pairs = []
        for pointer, binding in zip(pointers, kernel.bindings, strict=True):
            size = getattr(torch, binding.dtype).itemsize
            pairs += [ctypes.c_void_p(pointer - 3 * size), ctypes.c_int64(3)]
        for workgroup in range(kernel.grid(rows)[0]):
            entry(*pairs, ctypes.c_int32(rows), ctypes.c_int32(workgroup))

    return launch


def emulation_launcher(kernel: KernelInstance, directory: Path) -> Launch:
    """The GPU source compiled for the host, with fibers for lanes."""
    library = directory / "emulation.so"
    defines = [f"-D{name}={value}" for name, value in kernel.defines]
    sources = [f"-I{toolchain.kernel_source_dir()}", str(Path(__file__).with_name("emulation.cpp"))]
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", f"-DWAVE={kernel.target.wave}"]
    subprocess.run([cxx_compiler(), *flags, *defines, *sources, "-o", str(library)], check=True)
    entry = ctypes.CDLL(str(library)).launch

    def launch(pointers: Sequence[int], rows: int) -> None:
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        entry(array, ctypes.c_int(rows), ctypes.c_int(kernel.grid(rows)[0]))

    return launch


def c_compiler() -> str:
    return next(found for name in ("cc", "gcc", "clang") if (found := shutil.which(name)))


def cxx_compiler() -> str:
    return next(found for name in ("c++", "g++", "clang++") if (found := shutil.which(name)))


def run(
    kernel: KernelInstance,
    launch: Launch,
    inputs: Sequence[torch.Tensor],
    rows: int,
    shift: int = 0,
    aligned: Sequence[str] = (),
) -> list[torch.Tensor]:
    """The outputs for ``inputs``; every tensor starts ``shift`` elements off a 64-byte boundary.

    Those named in ``aligned`` do not.  Outputs start poisoned, and what surrounds a tensor must be untouched
    afterwards.
    """
    given = iter(inputs)
    buffers, tensors = [], []
    for binding in kernel.bindings:
        dtype = getattr(torch, binding.dtype)
        shape = kernel.shape(binding, rows)
        size = dtype.itemsize * torch.Size(shape).numel()
        buffer = torch.full((size + 64 + 2 * GUARD + 16 * dtype.itemsize,), POISON, dtype=torch.uint8)
        off = 0 if binding.name in aligned else shift * dtype.itemsize
        start = GUARD + -(buffer.data_ptr() + GUARD) % 64 + off
        tensor = buffer[start : start + size]
        if binding.access == "read":
            tensor.copy_(next(given).reshape(-1).view(torch.uint8))
        buffers.append((buffer, start, size))
        tensors.append((binding, tensor, dtype, shape))
    launch([buffer.data_ptr() + start for buffer, start, _ in buffers], rows)
    for buffer, start, size in buffers:
        assert (buffer[:start] == POISON).all() and (buffer[start + size :] == POISON).all(), (
            "wrote outside a tensor"
        )
    return [t.clone().view(dtype).reshape(shape) for b, t, dtype, shape in tensors if b.access == "write"]


def integer_inputs(spec: RowSpec, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """x and residual of small integers times a power of two per row, and a weight with every bit in use."""
    generator = torch.Generator().manual_seed(seed)

    def integers() -> torch.Tensor:
        values = torch.randint(-9, 10, (rows, spec.hidden), generator=generator).float()
        # A few groups of zeros, and rows of very different magnitude.
        values[:, : spec.hidden // 4] *= torch.randint(0, 2, (rows, 1), generator=generator)
        return values

    power = torch.exp2(torch.randint(-6, 4, (rows, 1), generator=generator).float())
    dtype = getattr(torch, spec.dtype)
    inputs = [(integers() * power).to(dtype)]
    if spec.gate:
        # Where the activation is exact: silu(g) is g, 0 and -0 here, and so are the others.
        exact = torch.tensor([-512.0, 0.0, 32.0, 40.0, 56.0, 112.0])
        gate = exact[torch.randint(len(exact), (rows, spec.hidden), generator=generator)].to(dtype)
        inputs = [torch.cat([gate, inputs[0]], -1)] if spec.gate.packed else [gate, inputs[0]]
    if spec.norm and spec.norm.residual:
        inputs.append((integers() * power).to(dtype))
    if spec.weight_dtype:
        weight = torch.randn(spec.hidden, generator=generator) * 3
        inputs.append(weight.to(getattr(torch, spec.weight_dtype)))
    return inputs


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: object = "") -> None:
    """Equal bit for bit, except that any NaN is as good as another."""
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
        equal = a.contiguous().view(bits) == e.contiguous().view(bits)
        both_nan = a.float().isnan() & e.float().isnan()
        wrong = ~(equal | both_nan)
        where = wrong.nonzero()[:3].tolist()
        assert not wrong.any(), (
            f"{what} output {index}: {int(wrong.sum())} of {wrong.numel()} differ, first at {where}"
        )


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[KernelInstance], Launch]:
    """Builds each instance once."""
    built: dict[str, Launch] = {}

    def build(kernel: KernelInstance) -> Launch:
        key = f"{kernel.target.name}-{kernel.target.arch}-{kernel.entry}"
        if key not in built:
            make = cpu_launcher if kernel.target.backend == "cpu" else emulation_launcher
            built[key] = make(kernel, tmp_path_factory.mktemp("kernel"))
        return built[key]

    return build


# -- numerics -----------------------------------------------------------------------------------------


# What may depend on the wave: several rows in one, idle lanes, the packed maximum, pointers of any alignment.
WAVE64_CASES = [
    "once",
    "add_exact_all",
    "add_rounded_twice",
    "f16_once",
    "f32",
    "no_weight",
    "four",
    "norm_only",
]
EVERY_CASE = [
    *itertools.product(CASES, [CPU, SM90]),
    *itertools.product(WAVE64_CASES, [GFX950]),
]


@pytest.mark.parametrize(("name", "target"), EVERY_CASE, ids=lambda value: getattr(value, "name", value))
def test_equals_eager_torch(name: str, target: Target, launcher) -> None:
    case = CASES[name]
    kernel = instance(case, target)
    launch = launcher(kernel)
    many = 17 if target is CPU or case.hidden < 2048 else 6  # fibers take their time
    for rows, shift in [(0, 0), (1, 0), (3, 1), (many, 0), (5, 5)]:
        inputs = integer_inputs(case, rows, seed=rows)
        assert_same(run(kernel, launch, inputs, rows, shift), reference(case, inputs), (name, rows, shift))


def check_schemes(case: RowSpec, target: Target, launcher) -> None:
    kernel = instance(case, target)
    for rows, shift in [(5, 0), (2, 3), (0, 0)]:
        inputs = integer_inputs(case, rows, seed=rows)
        assert_same(run(kernel, launcher(kernel), inputs, rows, shift), reference(case, inputs), kernel.entry)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        *itertools.product(SCHEME_CASES, [CPU, SM90]),
        *((case, GFX950) for case in SCHEME_CASES if case[0] in ("twice", "gemma", "add", "silu", "gelu")),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(map(str, value)),
)
def test_schemes(case: tuple[str, str, int], target: Target, launcher) -> None:
    check_schemes(scheme_case(*case), target, launcher)


@pytest.mark.parametrize("target", [CPU, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("producer", ["add", "plain_f32", "silu"])
def test_fnuz_schemes(producer: str, target: Target, launcher) -> None:
    check_schemes(scheme_case(producer, "fnuz", 640), target, launcher)


@pytest.mark.slow
@pytest.mark.parametrize("target", [CPU, SM90, GFX950, GFX942], ids=lambda t: t.name)
@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_scheme_of_every_producer(producer: str, schemes: str, target: Target, launcher) -> None:
    for hidden in (384, 3200):
        case = scheme_case(producer, schemes, hidden)
        if why_unsupported(case, target) is None:
            check_schemes(case, target, launcher)


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
def test_packed_scales(target: Target, launcher) -> None:
    """Any number of rows and of groups, from the tiniest to the largest values: pads are zero."""
    packed = Quantization(32, scale="ue8m0", layout="ue8m0_packed")
    for hidden, dtype in [(32, "bfloat16"), (96, "float32"), (160, "bfloat16")]:
        case = spec(hidden, dtype, None, quants=[packed])
        kernel = instance(case, target)
        generator = torch.Generator().manual_seed(hidden)
        for rows in (*range(1, 10), 18, 31):
            powers = torch.exp2(torch.randint(-149, 128, (rows, hidden // 32), generator=generator).double())
            x = torch.rand(rows, hidden, generator=generator, dtype=torch.float64).add(-0.5).mul(1.99)
            x = (x * powers.repeat_interleave(32, -1)).to(getattr(torch, dtype))
            x[0, :3] = torch.tensor([448.0, 0.0, -448.0]).to(x.dtype)  # a power of two is not rounded up
            assert_same(run(kernel, launcher(kernel), [x], rows), reference(case, [x]), (hidden, rows))


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation: str, target: Target, launcher) -> None:
    """Against float64, within the bounds that contracts.py and activation.h state."""
    case = RowSpec(512, "float32", gate=GatedActivation(activation, packed=False), writes_y=True)
    kernel = instance(case, target)
    rows = 1024 if target is CPU else 64
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 1.0, 6.0, 88.0]).repeat(rows // 4)
    g = (torch.rand(rows, 512, generator=generator) * 2 - 1) * spread.unsqueeze(1)
    (y,) = run(kernel, launcher(kernel), [g, torch.ones_like(g)], rows)
    exact = _exact_activation(activation, g.double())
    error = (y.double() - exact).abs()
    size = exact.abs().float().clamp(min=2.0**-126)
    last_place = (torch.nextafter(size, torch.tensor(torch.inf)) - size).double()
    within = error <= (2.1 if activation == "gelu_tanh" else 2.0) * last_place
    cancels = (g < 0) & (activation != "silu")
    assert torch.where(cancels, error <= g.abs() * 2.0**-23, within).all()


def _exact_activation(activation: str, g: torch.Tensor) -> torch.Tensor:
    if activation == "gelu":
        return g * torch.special.erfc(g * -math.sqrt(0.5)) / 2
    return ACTIVATIONS[activation](g)


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_special_gates(activation: str, target: Target, launcher) -> None:
    case = RowSpec(512, "float32", gate=GatedActivation(activation, packed=False), writes_y=True)
    kernel = instance(case, target)
    finite = [0.0, -0.0, 1e-40, -1e-40, -89.0, 1e20, -1e20, 3e38, -3e38]
    g = torch.tensor([torch.nan, torch.inf, -torch.inf, *finite])
    g = torch.nn.functional.pad(g, (0, 512 - len(g))).unsqueeze(0)
    (y,) = run(kernel, launcher(kernel), [g, torch.ones_like(g)], 1)
    assert_same([y], [ACTIVATIONS[activation](g)])


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
def test_quantizations_of_a_random_gate(target: Target, launcher) -> None:
    """Whatever the activation's last bit, what is quantized is the y that is written."""
    case = spec(384, quants=SCHEMES["layouts"], gate=GatedActivation("silu"), writes_y=True)
    kernel = instance(case, target)
    x = torch.randn(7, 768, generator=torch.Generator().manual_seed(4)).bfloat16() * 4
    y, *rest = run(kernel, launcher(kernel), [x], 7)
    torch.testing.assert_close(y, reference(case, [x])[0], rtol=2**-8, atol=0)
    plain = dataclasses.replace(case, gate=None, writes_y=False)
    assert_same(rest, reference(plain, [y]))


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
def test_rows_of_any_length_where_nothing_depends_on_all(target: Target, launcher) -> None:
    for case in (
        spec(18432, gate=GatedActivation("silu"), quants=[Q128]),
        spec(20480, rounding=None, quants=[Q128]),
        spec(1003, gate=GatedActivation("silu"), writes_y=True),
    ):
        kernel = instance(case, target)
        inputs = integer_inputs(case, 2)
        assert_same(run(kernel, launcher(kernel), inputs, 2), reference(case, inputs), kernel.entry)


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
@pytest.mark.parametrize("schemes", ["layouts", "rows", "bounds"])
def test_special_values_of_schemes(schemes: str, target: Target, launcher) -> None:
    case = scheme_case("plain", schemes, 128)
    finfo = torch.finfo(torch.bfloat16)
    finite = [0.0, -0.0, finfo.smallest_normal / 4, finfo.max, -finfo.tiny]
    specials = [torch.nan, torch.inf, -torch.inf, *finite]
    x = torch.randn(2 * len(specials), 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    for row, value in enumerate(specials):
        x[row, 7] = value
        x[len(specials) + row] = value
    kernel = instance(case, target)
    assert_same(run(kernel, launcher(kernel), [x], len(x)), reference(case, [x]), schemes)


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_amax(dtype: str, target: Target, launcher) -> None:
    """A group for each positive 16-bit float as its amax, inf and NaN among them."""
    others = [Quantization(32, "float8_e5m2"), Quantization(32, "int8", quotient="reciprocal")]
    power = Quantization(32, scale="ue8m0", scale_division="reciprocal")
    case = spec(32, dtype, None, quants=[Quantization(32), *others, power])
    kernel = instance(case, target)
    amax = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    fractions = torch.linspace(-1, 1, 32).to(amax.dtype)
    x = amax.unsqueeze(1) * fractions
    x[:, 0] = -amax
    assert_same(run(kernel, launcher(kernel), [x], len(x)), reference(case, [x]), dtype)


@pytest.mark.parametrize("target", [CPU, GFX950], ids=lambda t: t.name)
def test_quotients_of_float32(target: Target, launcher) -> None:
    """Quotients are correctly rounded whatever the scale: ties and near ties of fp8 come out as divided."""
    case = spec(32, "float32", None, quants=[Quantization(32)])
    kernel = instance(case, target)
    generator = torch.Generator().manual_seed(1)
    rows = 4096
    amax = torch.exp2(torch.rand(rows, 1, generator=generator) * 150 - 30)
    # Quotients next to the middle of two fp8 values, an ulp or two either side.
    middles = (torch.randint(16, 32, (rows, 32), generator=generator) + 0.5) * torch.exp2(
        torch.randint(-13, 4, (rows, 32), generator=generator).float()
    )
    x = middles * (amax / 448.0)
    x = torch.nextafter(x, torch.randint(-1, 2, x.shape, generator=generator) * torch.inf)
    x[:, :1] = amax
    assert_same(run(kernel, launcher(kernel), [x], rows), reference(case, [x]))


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["plain", "none", "f32", "f16_once", "no_floor"])
def test_special_values(name: str, target: Target, launcher) -> None:
    """NaN, infinity, zeros of both signs, subnormals and the largest values, each in a row of its own."""
    case = CASES[name]
    dtype = getattr(torch, case.dtype)
    finfo = torch.finfo(dtype)
    specials = [
        torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        finfo.smallest_normal / 4,
        finfo.max,
        -finfo.tiny,
    ]
    inputs = integer_inputs(case, 2 * len(specials) + 2)
    x = inputs[0]
    for row, value in enumerate(specials):
        x[row, 7] = value
        x[len(specials) + row] = value
    x[-1] = torch.tensor([-0.0, 0.0]).repeat(case.hidden // 2)
    x[-2] = finfo.smallest_normal / 4
    kernel = instance(case, target)
    # A row of the largest value has no exact sum of squares where that does not overflow.
    keep = [
        r for r in range(len(x)) if not (case.norm and case.dtype == "float16" and x[r].abs().max() > 60000)
    ]
    actual = run(kernel, launcher(kernel), inputs, len(x))
    expected = reference(case, inputs)
    assert_same([a[keep] for a in actual], [e[keep] for e in expected], name)


def test_flushed_subnormals_do_not_leak_in(launcher) -> None:
    """IREE's workers flush subnormals to zero; the kernel does not, and leaves the mode as it was."""
    case = CASES["no_floor"]
    kernel = instance(case, CPU)
    x = torch.full((3, case.hidden), torch.finfo(torch.bfloat16).smallest_normal / 8, dtype=torch.bfloat16)
    expected = reference(case, [x])
    launch = launcher(kernel)
    torch.set_flush_denormal(True)
    try:
        actual = run(kernel, launch, [x], 3)
        still_flushed = float(torch.tensor(1e-38) * 0.01) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)
    assert still_flushed


@pytest.mark.parametrize("target", [CPU, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["once", "add_exact_all", "none"])
def test_random_rows(name: str, target: Target, launcher) -> None:
    """Where the order of the sum can show, it moves few values by one step."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in integer_inputs(case, 16)]
    kernel = instance(case, target)
    actual, expected = run(kernel, launcher(kernel), inputs, 16), reference(case, inputs)
    for a, e in zip(actual, expected, strict=True):
        if a.dtype == torch.float8_e4m3fn:
            steps = (a.view(torch.int8).int() - e.view(torch.int8).int()).abs()
            assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
        elif a.dtype == torch.float32:
            torch.testing.assert_close(
                a, e, rtol=2**-8 if case.norm and case.norm.rounding == "once" else 2**-20, atol=0
            )
        else:
            assert (a != e).float().mean() < 1e-3


@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_other_vector_widths(arch: str, launcher) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these are x86-64 levels")
    if arch == "x86-64-v4" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this host has no AVX-512")
    target = dataclasses.replace(CPU, arch=arch)
    for name in ("add_exact_all", "f16_twice", "f32", "plain", "norm_any_length"):
        inputs = integer_inputs(CASES[name], 5)
        kernel = instance(CASES[name], target)
        assert_same(run(kernel, launcher(kernel), inputs, 5, 1), reference(CASES[name], inputs), (name, arch))


def test_other_tiles(launcher) -> None:
    """A mapping is only a choice: idle lanes, many vectors a lane, several rows a block: the same bits."""
    case = CASES["add_exact_all"]  # 96 vectors of 16
    inputs = integer_inputs(case, 5)
    for lanes, vectors, rows in [(64, 2, 1), (96, 1, 1), (32, 4, 2), (16, 6, 8), (128, 1, 1)]:
        kernel = instance(case, SM90, Mapping(Tile(lanes, vectors, 16, rows)))
        assert_same(run(kernel, launcher(kernel), inputs, 5), reference(case, inputs), (lanes, vectors, rows))


# -- what is refused ----------------------------------------------------------------------------------


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
        (RowSpec(128, "float32", RmsNorm(1.0), GatedActivation("silu"), writes_y=True), CPU, "not both"),
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


# -- objects ------------------------------------------------------------------------------------------

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
        for kind, p in abi._nv_attributes(elf.get_section_by_name(".nv.info").data())
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


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
def test_objects_are_reproducible(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = instance(CASES["add_exact_all"], target)
    objects = set()
    for turn in range(2):
        monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / str(turn)))
        objects.add(toolchain.compile_kernel(kernel))
    assert len(objects) == 1


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call compiles nothing, a damaged entry is a miss, a cache that cannot be written no error."""
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / "cache"))
    kernel = instance(CASES["plain_smallest"], CPU)
    data = toolchain.compile_kernel(kernel)
    (entry,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(toolchain._Cpu, "run", lambda *_: pytest.fail("compiled again"))
        assert toolchain.compile_kernel(kernel) == data
    entry.write_bytes(entry.read_bytes()[:-1])
    assert toolchain.compile_kernel(kernel) == data
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / "file"))
    assert toolchain.compile_kernel(kernel) == data


def test_a_failed_compile_shows_message_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path))
    for target, command in [
        (CPU, "row.c"),
        (SM90, "--gpu-architecture=sm_90a"),
        (GFX950, "--offload-arch=gfx950"),
    ]:
        kernel = instance(CASES["plain_smallest"], target)
        broken = dataclasses.replace(kernel, defines=(("ENTRY", "0"), *kernel.defines[1:]))
        with pytest.raises(ToolchainError, match="error") as caught:
            toolchain.compile_kernel(broken)
        assert command in str(caught.value)


def test_a_missing_compiler_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (toolchain._hip, toolchain._nvrtc):
        cached.cache_clear()
    monkeypatch.setattr(toolchain, "_ziglang", lambda: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    try:
        for target, extra in [(CPU, r"vmfuse\[hip\]"), (GFX950, r"vmfuse\[hip\]"), (SM90, r"vmfuse\[cuda\]")]:
            with pytest.raises(ToolchainError, match=extra):
                toolchain.compile_kernel(instance(CASES["plain_smallest"], target))
    finally:
        for cached in (toolchain._hip, toolchain._nvrtc):
            cached.cache_clear()


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


# -- mappings -----------------------------------------------------------------------------------------

# Workgroups that loop over rows, slices of one row, vectors of 8, several rows a workgroup; few and many.
MAPPINGS = {
    "looped": (
        spec(1536, quants=[Q128]),
        Mapping(Tile(96, 1, 16, blocks=3), Tile(96, 2, 8, slices=2), 3, 4),
        [0, 1, 2, 3, 4, 9, 17],
    ),
    "waves_looped": (
        spec(1536, residual="exact", writes_sum=True, offset=1.0, quants=[Q128]),
        Mapping(Tile(32, 3, 16, rows=4, blocks=2), Tile(128, 1, 16, slices=2), 3, 4),
        [1, 3, 5, 9, 31],
    ),
    "sliced": (
        spec(7168, residual="exact", writes_sum=True, writes_y=True, quants=[Q128, Quantization(None)]),
        Mapping(Tile(224, 2, 16), Tile(224, 4, 8, slices=4), 4, 8),
        [1, 2, 3, 4, 5],
    ),
    "idle_lanes": (
        spec(3200, quants=[Q128, Quantization(32, layout="column_tma")]),
        Mapping(Tile(224, 1, 16, blocks=2), Tile(224, 2, 8, slices=2), 2, 2),
        [1, 2, 3, 5],
    ),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_changes_no_bit(name: str, launcher) -> None:
    case, mapping, sizes = MAPPINGS[name]
    kernel = instance(case, SM90, mapping)
    for rows, shift in itertools.product(sizes, (0, 3)):
        inputs = integer_inputs(case, rows, seed=rows)
        assert_same(
            run(kernel, launcher(kernel), inputs, rows, shift), reference(case, inputs), (rows, shift)
        )


def test_grid_rule() -> None:
    rule = Mapping(Tile(64, 2, 16, rows=2, blocks=10), Tile(128, 1, 16, slices=4), 6, 16).grid_rule
    grids = {0: 1, 1: 4, 4: 16, 5: 10, 6: 12, 6 + 1: 4, 19: 10, 1000: 10}
    assert {rows: rule.workgroups(rows) for rows in grids} == grids


def test_grid_rule_of_columns() -> None:
    rule = GridRule(128, columns=22)
    grids = {0: 22, 1: 22, 128: 22, 129: 44, 257: 66}
    assert {rows: rule.workgroups(rows) for rows in grids} == grids


@pytest.mark.parametrize("target", [SM90, SM100], ids=lambda target: target.name)
@pytest.mark.parametrize("hidden", [1024, 1536, 2880, 4096, 7168, 16384])
def test_chosen_mappings_cover_their_rows(hidden: int, target: Target) -> None:
    wholes = [Quantization(None)]
    for residual, writes_y in itertools.product((None, "exact"), (False, True)):
        case = spec(hidden, residual=residual, writes_sum=bool(residual), writes_y=writes_y, quants=wholes)
        mapping = choose_mapping(case, target)
        for tile in filter(None, (mapping.many, mapping.few)):
            assert tile.threads == mapping.threads <= 1024
            assert tile.lanes * tile.vectors * tile.vector * tile.batches >= hidden
            assert tile.slices == 1 or (tile.vectors * tile.lanes // 32 >= tile.slices and tile.rows == 1)


def test_twofold_quotients_are_correctly_rounded() -> None:
    """Every 8-bit y by the scale of every 8-bit amax, the machine's reciprocal off by a unit either way."""
    y = torch.arange(128, 256, dtype=torch.float64)
    dtypes = {448.0: "float8_e4m3fn", 57344.0: "float8_e5m2", 127.0: "int8", 224.0: "float8_e4m3fn"}
    for (limit, dtype), division in itertools.product(dtypes.items(), ("true", "reciprocal")):
        quantization = Quantization(128, dtype, limit=limit, scale_division=division)
        assert ("QUOTIENT0", "2") in instance(spec(128, quants=[quantization]), SM90).defines
        inverse = division == "reciprocal"
        amax = torch.arange(128, 256, dtype=torch.float32)
        scale = amax * torch.tensor(1.0 / limit) if inverse else amax / torch.tensor(limit)
        exact = (y / scale.double().unsqueeze(1)).float()
        for off in (-1, 0, 1):
            near = ((1.0 / scale).view(torch.int32) + off - 2).view(torch.float32).double()
            error = (1.0 - scale.double() * near).float().double()
            rest = ((error + error * error).float().double() * near).float().double().unsqueeze(1)
            quotient = (y * near.unsqueeze(1) + (y * rest).float().double()).float()
            assert torch.equal(quotient, exact), (limit, inverse, off)
