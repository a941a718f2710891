"""Whole gfx950 programs through IREE's HIP driver, on the stand-in and the executor, beside the cpu target.

A driver is made once in a process and the stand-in must not be found by other tests, so programs run in
processes of their own.  Inputs are small integers where bits are compared: sums of them are exact in
every order.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowering
from tests.program import test_paged as paged
from tests.program.test_storage import BY_ROWS, Counted, Passed
from tools.bench.block import LARGEST_ERROR, Block
from tools.gfx950.hip import library
from tools.gpu import cases as gpu_cases
from tools.gpu import compare as gpu_compare

ROOT = Path(__file__).resolve().parents[2]
EMULATED = (sys.executable, "-m", "tools.gfx950.hip")

# Calls program FIRST.safetensors times: the inputs are named call.argument, the outputs call.result.
CALL = """
import sys
from safetensors.torch import load_file, save_file
import lowering
program, inputs, outputs = sys.argv[1:]
program, results = lowering.load(program, device="hip"), {}
given = load_file(inputs)
for call in sorted({name.partition(".")[0] for name in given}):
    arguments = [given[name] for name in sorted(given) if name.startswith(call + ".")]
    found = program(*arguments)
    found = found if isinstance(found, tuple) else (found,)
    results |= {f"{call}.{i}": tensor.clone() for i, tensor in enumerate(found)}
save_file(results, outputs)
"""

# Graphs of tensors on the CPU, which the stand-in plays the GPU of.
GRAPHS = """
import sys
import torch
import lowering.dynamo
from tests.gfx950.test_hip_programs import Appending

lowering.dynamo._target = lambda device: "gfx950"
lowering.dynamo._place = lambda device: "hip"
model, eager = Appending(), Appending()
compiled = torch.compile(model, backend="lowering")
for tokens in (2, 3, 4):
    x = torch.randint(-4, 5, (tokens, 64)).float()
    with torch.no_grad():
        for found, wanted in zip(compiled(x), eager(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.cache, eager.cache) and torch.equal(model.length, eager.length)
model.weight.data.mul_(2)
with torch.no_grad():
    torch.testing.assert_close(compiled(x)[0], 2 * eager(x)[0], rtol=1e-5, atol=1e-5)
programs = [program for each in lowering.dynamo._Compiled.alive for program in each._programs]
print(len(programs), "programs")
"""

Build = Callable[..., Path]


def emulated(*words: object, arch: str = "gfx950") -> subprocess.CompletedProcess[str]:
    command = [*EMULATED, "--arch", arch, *(str(word) for word in words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def run(program: Path, calls: Sequence[Sequence[Tensor]], arch: str = "gfx950") -> list[list[Tensor]]:
    """The results of each call of ``program``, loaded once by ``lowering.load(..., device="hip")``."""
    given, back = program.with_suffix(".in.safetensors"), program.with_suffix(".out.safetensors")
    save_file({f"{i}.{j}": tensor for i, call in enumerate(calls) for j, tensor in enumerate(call)}, given)
    done = emulated("python", "-c", CALL, program, given, back, arch=arch)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this is no GPU") == 1
    found = load_file(back)
    count = len(found) // len(calls)
    return [[found[f"{i}.{j}"] for j in range(count)] for i in range(len(calls))]


def on_cpu(program: Path, call: Sequence[Tensor]) -> list[Tensor]:
    found = lowering.load(program, device="cpu")(*call)
    return list(found) if isinstance(found, tuple) else [found]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        assert (
            a.contiguous().numpy(force=True).tobytes() == e.contiguous().numpy(force=True).tobytes()
            if (a.dtype in (torch.float32, torch.int32, torch.int64))
            else torch.equal(a.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8))
        )


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """From -8 to 8: the sum of 16384 squares is exact in float32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- fused kernels: equal bit for bit --------------------------------------------------------------


@pytest.mark.parametrize("view", [False, True], ids=["plain", "view"])
@pytest.mark.parametrize("hidden", [1536, 7168])
def test_fan_out_models_equal_the_cpu_target(build: Build, hidden, view):
    case = gpu_cases.case_named(f"fanout-{'view-' if view else ''}{hidden}")
    model, shapes = gpu_cases.build(case), case.dynamic_shapes()
    example = (integers(8, hidden),)
    programs = [build(target, model, example, shapes) for target in ("gfx950", "cpu")]
    calls = [(integers(rows, hidden, seed=rows),) for rows in (1, 5, 0)]
    for call, results in zip(calls, run(programs[0], calls), strict=True):
        assert_same_bits(results, on_cpu(programs[1], call))


def test_the_command_line_runs_a_residual_block(build: Build, tmp_path: Path):
    """run-vmfb itself, unchanged, and its own choice of the device."""
    case = gpu_cases.case_named("add-norm-7168")
    model, call = gpu_cases.build(case), (integers(3, 7168), integers(3, 7168, seed=1))
    save_file({"x": call[0], "residual": call[1]}, tmp_path / "in.safetensors")
    program = build("gfx950", model, call)
    inputs = [
        word for name in ("x", "residual") for word in ("--input", f"@{tmp_path}/in.safetensors:{name}")
    ]
    done = emulated("run-vmfb", program, *inputs, "--output", f"@{tmp_path}/out.safetensors")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    results = [found[f"output_{i}"] for i in range(4)]
    assert_same_bits(results, on_cpu(build("cpu", model, call), call))


@pytest.mark.parametrize("model", [Passed(), Counted()], ids=["passed", "counted"])
def test_results_of_every_kind_equal_the_cpu_target(build: Build, model: nn.Module):
    """Arguments, constants and repeated results in memory of the caller's; sizes that only values tell."""
    programs = [build(target, model, (integers(5, 256),), BY_ROWS) for target in ("gfx950", "cpu")]
    calls = [(integers(rows, 256, seed=rows),) for rows in (1, 5)]
    for call, results in zip(calls, run(programs[0], calls), strict=True):
        assert_same_bits(results, on_cpu(programs[1], call))


# -- products --------------------------------------------------------------------------------------


class Biased(nn.Module):
    """A product with a bias, whose weight's last block of scales may be cut by its end."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(columns)
        weight = torch.randint(-8, 9, (columns, 384), generator=generator)
        self.weight = nn.Buffer(weight.to(torch.float8_e4m3fn))
        self.scale = nn.Buffer(torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.25, 1.0]])[: -(-columns // 128)])
        self.bias = nn.Buffer(torch.randint(-8, 9, (columns,), generator=generator).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        q, scale = torch.ops.lowering.group_quant(x, 128, scale="ue8m0")
        return torch.ops.lowering.block_scaled_matmul(
            q, self.weight, scale, self.scale, torch.bfloat16, self.bias
        )


class Pair(nn.Module):
    """Two of them that are one kernel, of 278 columns, which its layout pads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Biased(128), Biased(150)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x).view(-1, 2, 64).transpose(0, 1) * 2, self.second(x) * 2


def test_joined_products_with_a_bias_equal_the_cpu_target(build: Build):
    """Codes are integers and scales powers of two: every sum is exact."""
    example, shapes = (integers(3, 384),), ({0: torch.export.Dim("T")},)
    gpu, cpu = (build(target, Pair(), example, shapes) for target in ("gfx950", "cpu"))
    report = lowering.explain(Pair(), example, dynamic_shapes=shapes, target="gfx950")
    assert [remark.text for remark in report.remarks] == [
        "2 products of one tensor are one, of 128 + 150 columns"
    ]
    calls = [(integers(rows, 384, seed=rows),) for rows in (1, 17, 0, 66)]
    for call, results in zip(calls, run(gpu, calls), strict=True):
        expected = Pair()(*call)
        assert_same_bits(results, on_cpu(cpu, call))
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_an_mlp_block_is_four_kernels(tmp_path: Path):
    """Norm + quant, product, silu * up + quant, product: near to eager by tools/bench/block.py's bound."""
    model, shapes = Block(256, 512), ({0: torch.export.Dim("T")},)
    example = (torch.randn(7, 256).bfloat16(),)
    compiled = lowering.compile(model, example, dynamic_shapes=shapes, target="gfx950")
    sources = [launch.kernel.source for launch in compiled.dispatched.launches]
    assert sources == ["row.hip", "matmul.hip", "row.hip", "matmul.hip"]
    compiled.save(program := tmp_path / "block.vmfb")
    calls = [(torch.randn(rows, 256).bfloat16(),) for rows in (1, 5, 70)]
    for call, (found,) in zip(calls, run(program, calls), strict=True):
        expected = model(*call).float()
        error = (found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error <= LARGEST_ERROR


# -- what IREE generates ---------------------------------------------------------------------------


class Everything(nn.Module):
    """Operations that no fused kernel takes; exact for small integers, whatever their order."""

    def forward(self, a: Tensor, b: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        product = a @ b
        return (
            product,
            (a.to(torch.bfloat16) @ b.to(torch.bfloat16)).float(),
            (a.to(torch.float16) @ b.to(torch.float16)).float(),
            torch.nn.functional.embedding(ids, product),
            product.sum(-1),
            product.amax(0),
            product.argmax(-1),
            product.t().contiguous() + 1,
            torch.where(product > 0, product, -product).to(torch.int32),
            torch.cumsum(a, 1),
            torch.topk(ids, 3).values,
            ids.sum() * ids,
        )


@pytest.mark.parametrize("m, k, n", [(48, 64, 80), (37, 53, 29)], ids=["even", "odd"])
def test_generated_kernels_equal_the_cpu_target(build: Build, m, k, n):
    """The even sizes use the matrix instructions; the odd ones end within what one access loads."""
    a, b = integers(m, k, dtype=torch.float32), integers(k, n, seed=1, dtype=torch.float32)
    call = (a, b, torch.tensor([0, 36, 13, 14, 5]))
    (results,) = run(build("gfx950", Everything(), call), [call])
    assert_same_bits(results, on_cpu(build("cpu", Everything(), call), call))


@pytest.mark.slow
def test_a_quantized_llama(build: Build):
    """Two layers, two lengths: as near to the same model in float32 as eager bfloat16 is (gpu_compare)."""
    case = gpu_cases.case_named("llama-2-layers")
    model = gpu_cases.build(case)
    calls = [case.inputs(tokens, 3, torch.device("cpu")) for tokens in (1, 5)]
    program = build(
        "gfx950", model, case.inputs(case.example_rows, 0, torch.device("cpu")), case.dynamic_shapes()
    )
    found = run(program, calls)
    eager = [model(*call) for call in calls]
    model.float()
    for call, (logits,), reference in zip(calls, found, eager, strict=True):
        differences = gpu_compare.compare_logits(logits, reference, model(*call))
        assert not [d.problem for d in differences if d.problem], differences


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def test_irees_own_command_runs_by_irees_own_flag(build: Build):
    """A process without a Python interpreter in it, and no variable set."""
    program = build("gfx950", Doubled(), (torch.zeros(3),))
    command = Path(sys.executable).parent / "iree-run-module"
    flags = ("--device=hip", f"--hip_dylib_path=file:{library()}", f"--module={program}", "--function=main")
    words = [str(command), *flags, "--input=3xf32=1,2,-3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3xf32=2 4 -6"
    assert done.stderr.count("this is no GPU") == 1


# -- what is refused -------------------------------------------------------------------------------


class Lookup(nn.Module):
    """A table whose length is known only when it is called."""

    def forward(self, table: Tensor, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, table)


def test_a_read_beyond_a_tensor_is_reported(build: Build):
    shapes = ({0: torch.export.Dim("v")}, {0: torch.export.Dim("n")})
    program = build("gfx950", Lookup(), (torch.randn(10, 256), torch.arange(4)), shapes)
    done = emulated("run-vmfb", program, "--input", "10x256xf32=rand:0", "--input", "3xi64=1,2,4000")
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert re.search("error: main failed: .*hipErrorIllegalAddress.*elementwise.*: a load of", last)
    assert re.search(r"workgroup \(2, 0, 0\), lane 0: global_load_dword", last)


class FnuzNorm(nn.Module):
    """Quantized to the fp8 that gfx942 alone converts in hardware."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 512).to(torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        return torch.ops.lowering.group_quant(y, 128, dtype=torch.float8_e4m3fnuz)


def test_a_program_runs_on_its_own_architecture_alone(build: Build):
    model, call = FnuzNorm(), (integers(3, 512),)
    program = build("gfx942", model, call)
    (results,) = run(program, [call], arch="gfx942")
    assert_same_bits(results, model(*call))
    done = emulated("run-vmfb", program, "--input", "3x512xbf16=1")
    assert done.returncode == 1
    assert "was compiled for gfx942; hip:0 is an emulated gfx950" in done.stderr


def test_an_unknown_command_is_named():
    done = emulated("run-vmfc")
    assert done.returncode == 2
    assert done.stderr == "python -m tools.gfx950.hip: error: there is no command 'run-vmfc'\n"


class Remembering(nn.Module):
    """A cache, counters and an argument that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 8, 4))
        self.register_buffer("length", torch.zeros(1, dtype=torch.long))
        self.register_buffer("total", torch.full((4,), 2.0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.cache.index_copy_(1, torch.arange(2) + self.length, x)
        self.length.add_(2)
        self.total.add_(x.sum((0, 1)))
        y.index_copy_(0, self.length, x[0, :1])
        return self.cache + 0, self.total + 0, y + 0


def test_state_lives_on_the_device(build: Build) -> None:
    calls = [(torch.randint(-4, 5, (2, 2, 4)).float(), torch.randn(6, 4)) for _ in range(2)]
    found = run(build("gfx950", Remembering(), calls[0]), calls)
    model = Remembering()
    for one, call in zip(found, calls, strict=True):
        assert_same_bits(one, model(*(tensor.clone() for tensor in call)))


def test_attention_over_a_cache_in_pages(build: Build) -> None:
    """Sequences of different lengths, from token to token; the pool lives on the device."""
    steps = slice(1, 3)
    calls, model = paged.calls()[steps], paged.Kept()
    program = build("gfx950", paged.Kept(), calls[0])
    for (found,), call, counts in zip(run(program, calls), calls, paged.STEPS[steps], strict=True):
        paged.assert_attends(found, model(*call), call, counts)


class Appending(nn.Module):
    """A norm whose rows a cache keeps, and a view of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.register_buffer("cache", torch.zeros(16, 64))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.cache.index_copy_(0, self.length + torch.arange(x.shape[0]), x)
        self.length.add_(x.shape[0])
        return nn.functional.rms_norm(x, (64,), self.weight, 1e-6), x[:1]


def test_graphs_of_torch_compile() -> None:
    """Weights by pointer, a cache and a counter written in place, a size that opens; no graph is eager's."""
    done = emulated("python", "-c", GRAPHS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 programs\n"
