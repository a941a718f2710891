"""The block-scaled product on the CPU: the kernel against float64, in every variant of it, and programs.

What a result may be off by is stated once, in ``bound``: the roundings of a float32 sum in any order, and the
one of the result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import lowering
from lowering.backends import abi, cpu, toolchain
from lowering.errors import CompileError
from lowering.families.instance import GridRule
from lowering.families.matmul.cpu import ProductTile, busiest, tile_defines
from lowering.families.matmul.family import instance, why_unsupported
from lowering.ops import block_scaled_matmul_reference, to_physical
from lowering.targets import Target, resolve
from patterns.contracts import MatmulSpec
from tests.families.host_kernels import run

LOW = torch.ops.lowering
CPU = resolve("cpu")
E4M3FN, E4M3FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def _variants() -> list[str]:
    """``-march`` values this host can run: native, and x86-64 levels, each with another width or decoding."""
    needs = {"x86-64-v2": {"sse4_2"}, "x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512bw", "avx512vl"}}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return ["native", *(name for name, wanted in needs.items() if wanted <= flags)]


VARIANTS = _variants()


def variant(arch: str) -> Target:
    return dataclasses.replace(CPU, arch=arch)


def spec(
    columns: int, depth: int, group: int, dtype: str = "float32", a="float8_e4m3fn", b="float8_e4m3fn", **more
):
    return MatmulSpec(columns, depth, group, a, b, dtype, **more)


# -- what is right ------------------------------------------------------------------------------------


def operands(case: MatmulSpec, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Codes of every magnitude, subnormal ones among them, and scales that differ from block to block."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int, dtype: str) -> torch.Tensor:
        bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        values = bits.view(getattr(torch, dtype))
        return torch.where(values.float().isnan(), torch.ones_like(bits), bits).view(values.dtype)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * torch.exp2(
            torch.randint(-9, -3, shape, generator=generator).float()
        )

    groups = case.depth // case.group
    bias = torch.randn(case.columns, generator=generator).to(getattr(torch, case.dtype))
    return [
        codes(rows, case.depth, dtype=case.a_dtype),
        codes(case.columns, case.depth, dtype=case.b_dtype),
        scales(*((rows, groups) if case.a_scales == "rows" else (1,))),
        scales(*case.b_scale_shape),
        *([bias] if case.bias else []),
    ]


def in_memory(case: MatmulSpec, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The operands as the kernel is given them."""
    a, b, a_scale, *rest = tensors
    if case.a_scales == "rows":
        a_scale = to_physical(a_scale, case.a_scale_layout).contiguous()
    return [a, b, a_scale, *rest]


def exact(case: MatmulSpec, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the sum of the magnitudes of its terms."""
    a, b, a_scale, b_scale, *bias = (tensor.double() for tensor in tensors)
    if case.b_scales == "blocks":
        b_scale = b_scale.repeat_interleave(case.group, 0)[: case.columns]
    a = a * (a_scale.repeat_interleave(case.group, -1) if case.a_scales == "rows" else a_scale)
    b = b * b_scale.repeat_interleave(case.group, -1)
    value, magnitude = a @ b.T, a.abs() @ b.abs().T
    return (value + bias[0], magnitude + bias[0].abs()) if bias else (value, magnitude)


def bound(case: MatmulSpec, value: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """How far from ``value`` a result may be.

    Products of codes are exact in float32, so a term passes through at most one addition for each element
    of its group and for each group, and five roundings for the scales, the lanes' sum and the bias; each is
    off by 2^-24 of a partial sum no larger than ``magnitude``.  Then comes one rounding to its dtype.
    """
    accumulated = (case.group + case.depth // case.group + 9) * 2.0**-24 * magnitude
    half = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[case.dtype]
    return accumulated + half * (value.abs() + accumulated) + 2.0**-25


def assert_product(case: MatmulSpec, actual: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Compare with float64 within the bound; integers with eager PyTorch, bit for bit."""
    if case.a_dtype == "int8":
        bias = tensors[4] if case.bias else None
        dtype = getattr(torch, case.dtype)
        expected = block_scaled_matmul_reference(*tensors[:4], dtype, bias, bias_rounding=case.bias_rounding)
        assert torch.equal(actual, expected), case
        return
    value, magnitude = exact(case, tensors)
    assert actual.shape == value.shape and actual.dtype == getattr(torch, case.dtype)
    assert ((actual.double() - value).abs() <= bound(case, value, magnitude)).all(), case


# -- the kernel ---------------------------------------------------------------------------------------

CASES = {
    "several_tiles": spec(200, 192, 64),
    "groups_of_128": spec(96, 384, 128, "bfloat16"),
    "groups_of_32": spec(129, 160, 32, "float16"),
    "few_columns": spec(3, 64, 32, "bfloat16"),
    "one_column": spec(1, 32, 32),
    "fnuz": spec(70, 128, 64, "float16", "float8_e4m3fnuz", "float8_e4m3fnuz"),
    "mixed": spec(33, 256, 128, "float32", "float8_e4m3fn", "float8_e4m3fnuz"),
    "bias": spec(200, 192, 64, bias=True),
    "bias_bf16_columns": spec(131, 256, 128, "bfloat16", bias=True, a_scale_layout="column"),
    "per_token_and_channel": spec(97, 320, 320, "float16", bias=True, b_scales="rows"),
    "per_tensor": spec(130, 64, 64, a_scales="one", b_scales="one"),
    "static_and_channel": spec(33, 128, 128, "bfloat16", bias=True, a_scales="one", b_scales="rows"),
    "integers": spec(97, 320, 320, "float16", "int8", "int8", bias=True, b_scales="rows"),
    "integers_bias_rounded": spec(
        33, 64, 64, "bfloat16", "int8", "int8", bias=True, b_scales="rows", bias_rounding="twice"
    ),
    "integers_bias_rounded_f16": spec(
        33, 64, 64, "float16", "int8", "int8", bias=True, b_scales="rows", bias_rounding="twice"
    ),
    "integers_per_tensor": spec(
        130, 128, 128, "float32", "int8", "int8", bias=True, a_scales="one", b_scales="one"
    ),
    "bias_f16_columns_of_fours": spec(97, 96, 32, "float16", bias=True, a_scale_layout="column_tma"),
}
ROWS = (0, 1, 2, 3, 17, 64, 129)


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_within_the_bound(name: str, arch: str, launcher) -> None:
    """Any number of rows, and pointers aligned to nothing but their element."""
    case = CASES[name]
    kernel = instance(case, variant(arch))
    for shift, rows in enumerate(ROWS):
        tensors = operands(case, rows, seed=rows)
        (actual,) = run(kernel, launcher(kernel), in_memory(case, tensors), rows, shift)
        assert_product(case, actual, tensors)


def test_the_bound_is_no_formality() -> None:
    """A block whose scale is another one's is outside of it, and so is a term left out."""
    case = CASES["several_tiles"]
    a, b, a_scale, b_scale = operands(case, 5)
    swapped = block_scaled_matmul_reference(a, b, a_scale.flip(-1), b_scale, torch.float32)
    b2 = b.clone()
    b2[:, -1] = 0
    short = block_scaled_matmul_reference(a, b2, a_scale, b_scale, torch.float32)
    assert_product(
        case, block_scaled_matmul_reference(a, b, a_scale, b_scale, torch.float32), [a, b, a_scale, b_scale]
    )
    for wrong in (swapped, short):
        with pytest.raises(AssertionError):
            assert_product(case, wrong, [a, b, a_scale, b_scale])


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("dtype", [E4M3FN, E4M3FNUZ], ids=str)
def test_every_code_of_either_operand(dtype: torch.dtype, arch: str, launcher) -> None:
    """Against a single 1: the value of each code, exactly, and NaN for those that are no number."""
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    one = torch.ones(1).to(dtype)
    for place in (0, 31, 77):
        row = torch.zeros(256, 128).to(dtype)
        row.view(torch.uint8)[:, place] = every.view(torch.uint8)
        single = torch.zeros(1, 128).to(dtype)
        single.view(torch.uint8)[:, place] = one.view(torch.uint8)
        for rows in (1, 3):
            kernel = instance(spec(256, 128, 128, a=name, b=name), variant(arch))
            tensors = [single.expand(rows, -1), row, torch.ones(rows, 1), torch.ones(2, 1)]
            (found,) = run(kernel, launcher(kernel), [t.contiguous() for t in tensors], rows)
            torch.testing.assert_close(found, every.float().expand(rows, -1), rtol=0, atol=0, equal_nan=True)
        kernel = instance(spec(1, 128, 128, a=name, b=name), variant(arch))
        tensors = [row, single, torch.ones(256, 1), torch.ones(1, 1)]
        (found,) = run(kernel, launcher(kernel), tensors, 256)
        torch.testing.assert_close(found[:, 0], every.float(), rtol=0, atol=0, equal_nan=True)
        for code in range(256):  # each row by itself, which is read another way
            tensors = [row[code : code + 1], single, torch.ones(1, 1), torch.ones(1, 1)]
            (found,) = run(kernel, launcher(kernel), tensors, 1)
            torch.testing.assert_close(
                found[0], every[code : code + 1].float(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("arch", VARIANTS)
def test_special_scales(arch: str, launcher) -> None:
    """Zero, infinite and NaN scales, of either operand: what the reference gives where no code is 0."""
    case = spec(40, 128, 64)
    kernel = instance(case, variant(arch))
    for rows in (1, 6):
        a, b, a_scale, b_scale = operands(case, rows)
        a, b = (
            torch.where(t.view(torch.uint8) % 128 == 0, 1, t.view(torch.uint8)).view(E4M3FN) for t in (a, b)
        )
        for value in (0.0, torch.inf, torch.nan, 2.0**-149):
            for scale in (a_scale, b_scale):
                tensors = [a, b, a_scale.clone(), b_scale.clone()]
                tensors[2 if scale is a_scale else 3][0, 1] = value
                (found,) = run(kernel, launcher(kernel), tensors, rows)
                expected = block_scaled_matmul_reference(*tensors, torch.float32)
                assert torch.equal(found.isfinite(), expected.isfinite()), value
                finite = found.isfinite()
                assert torch.equal(finite.all(), torch.tensor(bool(torch.tensor(value).isfinite())))
                torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_too_large_become_infinite(dtype: str, launcher) -> None:
    case = spec(17, 64, 64, dtype)
    kernel = instance(case, CPU)
    tensors = [torch.full((2, 64), 448.0).to(E4M3FN), torch.full((17, 64), -448.0).to(E4M3FN)]
    tensors += [torch.tensor([[1.0], [1e32]]), torch.full((1, 1), 1.0)]
    (found,) = run(kernel, launcher(kernel), tensors, 2)
    expected = block_scaled_matmul_reference(*tensors, getattr(torch, dtype))
    assert torch.equal(found, expected) and found[1].isinf().all()


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_subnormal_results(dtype: str, arch: str, launcher) -> None:
    """Every code, scaled to where the dtype has only subnormal numbers, between them ones that have not."""
    exponent = {"bfloat16": -66, "float16": -9}[dtype]
    every = torch.arange(256, dtype=torch.uint8).view(E4M3FN)
    b = torch.zeros(256, 32).to(E4M3FN)
    b.view(torch.uint8)[:, 5] = every.view(torch.uint8)
    scales = torch.full((8, 1), 2.0**exponent)
    scales[5] = 1.0
    kernel = instance(spec(256, 32, 32, dtype), variant(arch))
    for rows in (1, 6):
        a = torch.ones(rows, 32).to(E4M3FN)
        (found,) = run(kernel, launcher(kernel), [a, b, torch.full((rows, 1), 2.0**exponent), scales], rows)
        scale = 2.0**exponent * scales[:, 0].repeat_interleave(32)
        expected = (every.float() * scale).to(getattr(torch, dtype)).expand(rows, -1)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_any_tile_gives_the_same(launcher) -> None:
    case = spec(300, 128, 64)
    tensors = operands(case, 150)
    for tile in (ProductTile(32), ProductTile(96), ProductTile(few_rows=200)):
        kernel = instance(case, CPU, tile)
        (found,) = run(kernel, launcher(kernel), tensors, 150)
        assert_product(case, found, tensors)


# -- what the kernel is checked for, and what it does not do --------------------------------------------


def test_the_object_takes_what_is_passed() -> None:
    kernel = instance(CASES["several_tiles"], CPU)
    data = toolchain.compile_kernel(kernel)
    assert abi.check(kernel, data).prototype == cpu.prototype(kernel)
    other = instance(dataclasses.replace(CASES["several_tiles"], dtype="bfloat16"), CPU)
    with pytest.raises(CompileError, match="the dispatch calls"):
        abi.check(dataclasses.replace(kernel, bindings=other.bindings), data)


@pytest.mark.parametrize(
    ("case", "target", "reason"),
    [
        (spec(64, 64, 64), "h200", "of sm_90 reads b in swizzled_128, not row"),
        (spec(64, 64, 16), "cpu", "knows groups of 32, 64, 128, not 16"),
        (
            spec(64, 64, 64, a="float8_e5m2"),
            "cpu",
            "takes a of float8_e4m3fn or float8_e4m3fnuz, not float8_e5m2",
        ),
        (spec(64, 64, 64, "float64"), "cpu", "writes bfloat16, float16, float32, not float64"),
        (spec(0, 64, 64), "cpu", "has no columns"),
        (spec(64, 64, 64, b_layout="swizzled_128"), "cpu", "of cpu reads b in row, not swizzled_128"),
        (
            spec(64, 64, 64, a_scale_layout="ue8m0_packed"),
            "cpu",
            "reads a_scale in row or column_tma or column, not ue8m0_packed",
        ),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(case: MatmulSpec, target: str, reason: str) -> None:
    assert reason in (why_unsupported(case, resolve(target)) or "")
    with pytest.raises(CompileError, match=reason):
        instance(case, resolve(target))


# -- programs -----------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """x is quantized and multiplied with a quantized weight."""

    def __init__(self, columns: int, depth: int, group: int, dtype: torch.dtype = E4M3FN) -> None:
        super().__init__()
        self.group = group
        case = spec(columns, depth, group, b=str(dtype).removeprefix("torch."))
        _, b, _, b_scale = operands(case, 1)
        self.register_buffer("b", b)
        self.register_buffer("b_scale", b_scale)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, scale = LOW.group_quant(x, self.group)
        return q, scale, LOW.block_scaled_matmul(q, self.b, scale, self.b_scale, x.dtype)


@pytest.mark.parametrize("leading", [(), (4,)])
def test_a_program_multiplies_what_it_quantized(leading: tuple[int, ...], tmp_path: Path) -> None:
    """Dynamic rows, none among them; the product is a kernel, and kernels.json says how it is launched."""
    layer = Layer(200, 192, 64)
    example = torch.randn(7, *leading, 192, dtype=torch.bfloat16)
    compiled = lowering.compile(layer, (example,), dynamic_shapes=({0: torch.export.Dim("T")},))
    assert [launch.kernel.source for launch in compiled.dispatched.launches] == ["row.c", "matmul.c"]
    compiled.dump_kernels(tmp_path)
    launch = json.loads((tmp_path / "kernels.json").read_text())["launches"][1]
    rows = example[..., 0].numel()
    assert launch["grid"] == [13 * -(-rows // 128), 1, 1] and launch["constants"] == [rows]
    shapes = [binding["shape"] for binding in launch["bindings"]]
    assert shapes == [[rows, 192], [200, 192], [rows, 3], [4, 3], [rows, 200]]
    program = lowering.load(compiled.vmfb)
    for count in (0, 1, 2, 40):
        x = torch.randn(count, *leading, 192, dtype=torch.bfloat16)
        q, scale, out = program(x)
        assert out.shape == (count, *leading, 200)
        tensors = [q.flatten(0, -2), layer.b, scale.flatten(0, -2), layer.b_scale]
        assert_product(spec(200, 192, 64, "bfloat16"), out.flatten(0, -2), tensors)


def test_a_vector_is_one_row() -> None:
    layer = Layer(40, 64, 32)
    x = torch.randn(64)
    q, scale, out = lowering.load(lowering.compile(layer, (x,)).vmfb)(x)
    tensors = [q[None], layer.b, scale[None], layer.b_scale]
    assert out.shape == (40,)
    assert_product(spec(40, 64, 32), out[None], tensors)


class Channels(torch.nn.Module):
    """Per-token activations and per-channel weights, of fp8 and of int8, and one static scale."""

    def __init__(self, columns: int, depth: int) -> None:
        super().__init__()
        self.b, scale = LOW.group_quant(torch.randn(columns, depth), 0)
        self.b_scale = scale
        self.codes, self.codes_scale = LOW.group_quant(torch.randn(columns, depth), 0, dtype=torch.int8)
        self.static = torch.tensor([0.01])

    def products(self, x: torch.Tensor) -> list[list[torch.Tensor]]:
        fp8, fp8_scale = LOW.group_quant(x, 0)
        int8, int8_scale = LOW.group_quant(x, 0, dtype=torch.int8)
        static = (x.float() / self.static).clamp(-448, 448).to(E4M3FN)
        return [
            [fp8, self.b, fp8_scale, self.b_scale],
            [int8, self.codes, int8_scale, self.codes_scale],
            [static, self.b, self.static, self.b_scale],
        ]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [LOW.block_scaled_matmul(*tensors, torch.float32) for tensors in self.products(x)]


@pytest.mark.parametrize("target", ["h200", "b200", "gfx950"])
def test_scales_of_tokens_and_channels_have_kernels_on_gpus(target: str) -> None:
    model = Channels(200, 256)
    report = lowering.explain(model, (torch.randn(5, 256, dtype=torch.bfloat16),), target=target)
    assert not [remark.text for remark in report.remarks if "left to IREE" in remark.text]


def test_scales_of_tokens_and_channels() -> None:
    """fp8 within its bound, int8 bit for bit; the static scale is one for all rows."""
    model = Channels(200, 192)
    x = torch.randn(7, 192, dtype=torch.bfloat16)
    compiled = lowering.compile(model, (x,), dynamic_shapes=({0: torch.export.Dim("T")},))
    assert [launch.kernel.source for launch in compiled.dispatched.launches].count("matmul.c") == 3
    program = lowering.load(compiled.vmfb)
    for rows in (1, 40):
        x = torch.randn(rows, 192, dtype=torch.bfloat16)
        fp8, int8, static = program(x)
        first, second, third = model.products(x)
        assert_product(spec(200, 192, 192, b_scales="rows"), fp8, first)
        assert torch.equal(int8, LOW.block_scaled_matmul(*second, torch.float32))
        assert_product(spec(200, 192, 192, a_scales="one", b_scales="rows"), static, third)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bias_behind_a_product_is_part_of_its_kernel(dtype: torch.dtype) -> None:
    """With the roundings of the model; not where the product is read besides, or the vector is no bias."""

    class Biased(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes, self.scale = LOW.group_quant(torch.randn(40, 64), 0, dtype=torch.int8)
            self.bias = torch.nn.Buffer(torch.randn(40).to(dtype))

        def product(self, x: torch.Tensor) -> torch.Tensor:
            return LOW.block_scaled_matmul(
                *(lambda q, s: (q, self.codes, s))(*LOW.group_quant(x, 0, dtype=torch.int8)),
                self.scale,
                dtype,
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            kept = self.product(x + 1)
            return self.product(x) + self.bias, kept + self.bias, kept, self.bias + self.product(-x)

    model, x = Biased(), torch.randn(7, 64).to(dtype)
    compiled = lowering.compile(model, (x,))
    specs = [launch.kernel.spec for launch in compiled.dispatched.launches]
    biases = [(s.bias, s.bias_rounding) for s in specs if isinstance(s, MatmulSpec)]
    once = "once" if dtype == torch.float32 else "twice"
    assert sorted(biases) == sorted([(True, once), (False, "once"), (True, once)])
    for found, expected in zip(lowering.load(compiled.vmfb)(x), model(x), strict=True):
        assert torch.equal(found, expected)


def test_subnormal_codes_count_on_iree_s_workers() -> None:
    """They run with subnormal numbers flushed to zero; codes of fp8 and small results are not."""

    class Product(torch.nn.Module):
        def forward(self, a, b, a_scale, b_scale):
            return LOW.block_scaled_matmul(a, b, a_scale, b_scale, torch.float32)

    smallest = torch.full((3, 64), 1, dtype=torch.uint8).view(E4M3FN)
    tensors = [smallest, smallest, torch.full((3, 1), 2.0**-120), torch.ones(1, 1)]
    found = lowering.load(lowering.compile(Product(), tuple(tensors)).vmfb)(*tensors)
    assert torch.equal(found, torch.full((3, 3), 2.0 ** (-9 - 9 + 6 - 120)))


def test_what_has_no_kernel_is_computed_by_iree() -> None:
    """A group of 16 is left to IREE, and still right."""
    layer = Layer(24, 64, 16)
    x = torch.randn(5, 64)
    compiled = lowering.compile(layer, (x,))
    assert all(launch.kernel.source != "matmul.c" for launch in compiled.dispatched.launches)
    q, scale, out = lowering.load(compiled.vmfb)(x)
    assert_product(spec(24, 64, 16), out, [q, layer.b, scale, layer.b_scale])


def test_workgroups_share_the_columns() -> None:
    """Every column is some workgroup's."""
    for sixteens in range(1, 3600):
        values, rule = tile_defines(16 * sixteens - 5, ProductTile())
        share, workgroups = values["SHARE"] // 16, rule.workgroups(128)
        assert (workgroups - 1) * share < sixteens <= workgroups * share
        assert rule.workgroups(129) == 2 * workgroups


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16, 32])
def test_a_host_loses_little_to_a_share_of_its_own(workers: int) -> None:
    """A program is the same for all hosts: of wide products each is within 4% of the best, by prediction."""
    for columns in (1536, 2048, 3072, 4096, 6144, 7168, 18432, 24576, 49152, 129280):
        share = tile_defines(columns, ProductTile())[0]["SHARE"] // 16
        best = min(busiest(columns // 16, workers, own) for own in range(1, 400))
        assert busiest(columns // 16, workers, share) <= 1.04 * best


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("share", [1, 2, 3, 4, 5, 6, 7, 10, 17])
def test_any_share_gives_the_same(share: int, arch: str, launcher) -> None:
    """Tiles of every number of sixteens, as the rest of a share and of the last one."""
    case = spec(16 * 17 - 5, 192, 64)
    kernel = instance(case, variant(arch))
    defines = tuple((name, str(16 * share) if name == "SHARE" else value) for name, value in kernel.defines)
    entry, rule = f"share_of_{share}", GridRule(128, columns=-(-17 // share))
    defines = (("ENTRY", entry), *defines[1:])
    kernel = dataclasses.replace(kernel, entry=entry, defines=defines, grid_rule=rule)
    for rows in (1, 6, 129):
        tensors = operands(case, rows)
        (actual,) = run(kernel, launcher(kernel), in_memory(case, tensors), rows)
        assert_product(case, actual, tensors)
