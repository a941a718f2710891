"""End to end: what a compiled program computes, what is in it, and what a compilation says about itself.

On the cpu programs run and are compared with eager PyTorch; for cuda and hip they are compiled and
looked at.  Inputs of the bit-for-bit comparisons are small multiples of 1/4, so that every order of
adding squares gives the same sum: nothing but the contract decides about a bit.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import lowering
from lowering.compiler import Compiled

GPUS = ("h200", "b200", "gfx950")
ROWS = Dim("T")
THIS = Path(__file__).name

group_quant = torch.ops.lowering.group_quant
rms_norm = torch.ops.lowering.rms_norm


# --- looking into a program -----------------------------------------------------------------------


def dispatches(compiled: Compiled, scratch: Path) -> list[str]:
    """The names of the functions the finished program dispatches, in order, read from its bytecode."""
    vmfb = scratch / "program.vmfb"
    compiled.save(vmfb)
    dump = Path(sysconfig.get_path("scripts")) / "iree-dump-module"
    command = [dump, "--output=disassembly", "--function=main$async", vmfb]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rodata = {
        key: bytes.fromhex(data) for key, data in re.findall(r"vm\.rodata\[(\d+)\] = ([0-9A-F]*)", text)
    }
    strings, functions, called = {}, {}, []
    for line in text.splitlines():
        if found := re.search(r"%r(\d+) = vm\.const\.ref\.rodata (\d+)", line):
            strings[found[1]] = rodata[found[2]]
        elif found := re.search(
            r"%i(\d+) = vm\.call @hal\.executable\.lookup\.function\(%[rR]\d+, %[rR](\d+)\)", line
        ):
            functions[found[1]] = strings[found[2]].decode()
        elif found := re.search(
            r"@hal\.command_buffer\.dispatch segments.*\(%[rR]\d+, %[rR]\d+, %i(\d+)", line
        ):
            called.append(functions[found[1]])
    return called


def custom(names: list[str], compiled: Compiled) -> list[str]:
    """Those of ``names`` that are kernels of ours; IREE's own are called ``main$async_dispatch_<n>_...``."""
    ours = [name for name in names if not name.startswith("main$async_dispatch_")]
    assert {name.removesuffix("_workgroup") for name in ours} == set(compiled.dispatched.objects)
    return ours


def assert_objects_embedded(compiled: Compiled) -> None:
    """The checked kernel objects, byte for byte, are what the program carries (the cpu's are linked)."""
    assert compiled.dispatched.objects
    for entry, data in compiled.dispatched.objects.items():
        if compiled.target.backend == "cpu":
            assert entry.encode() in compiled.vmfb
        else:
            assert len(data) > 1000 and data[:4] == b"\x7fELF"
            assert data in compiled.vmfb, f"{entry} is not in the program"


# --- comparing with eager --------------------------------------------------------------------------


def quarters(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiples of 1/4 within [-4, 4], with a row of zeros where there is a second row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-16, 17, shape, generator=generator).to(dtype) / 4
    if x.dim() > 1 and x.shape[-2] > 1:
        x[..., 1, :] = 0
    return x


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN and -0 is not 0."""
    same_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(same_width)


def assert_same(got, expected) -> None:
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), index
        assert torch.equal(bits(a), bits(b)), (
            f"output {index}: {(bits(a) != bits(b)).sum()} of {b.numel()} differ"
        )


def assert_runs_like_eager(model: nn.Module, compiled: Compiled, *calls: tuple[torch.Tensor, ...]) -> None:
    program = lowering.load(compiled.vmfb)
    for call in calls:
        before = [x.clone() for x in call]
        assert_same(program(*call), model(*call))
        assert_same(call, before)  # a program does not write to its inputs


# --- the two models of the fan-out -------------------------------------------------------------------


class FanOut(nn.Module):
    """relu -> rms_norm -> two equal quantizations, with or without a view between."""

    def __init__(self, hidden: int, view: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, generator=torch.Generator().manual_seed(1)).bfloat16())
        self.view = view

    def forward(self, x):
        y = rms_norm(torch.relu(x), self.weight, 1e-6)
        if self.view:
            y = y.view(-1, y.shape[-1])
        return (*group_quant(y, 128), *group_quant(y, 128))


FAN_OUTS = [(hidden, view) for hidden in (7168, 1536) for view in (False, True)]


def fan_out(hidden: int, view: bool, target: str) -> tuple[FanOut, Compiled]:
    model = FanOut(hidden, view)
    return model, lowering.compile(model, (quarters(4, hidden),), dynamic_shapes=({0: ROWS},), target=target)


@pytest.mark.parametrize(("hidden", "view"), FAN_OUTS)
@pytest.mark.parametrize("target", ("cpu", *GPUS))
def test_fan_out_is_one_kernel(hidden: int, view: bool, target: str, tmp_path: Path) -> None:
    """Norm and both quantizations are one custom dispatch that writes one set of outputs."""
    model, compiled = fan_out(hidden, view, target)
    assert compiled.report.summary() == {"fused": 3, "unfused": 0, "dispatches": 1}
    assert [site.op for site in compiled.report.sites] == ["rms_norm", "group_quant", "group_quant"]
    assert len({site.kernel for site in compiled.report.sites}) == 1

    names = dispatches(compiled, tmp_path)
    assert len(custom(names, compiled)) == 1
    assert len(names) == 2 and names[0].startswith("main$async_dispatch_0_elementwise"), names  # the relu
    [kernel] = compiled.dispatched.kernels.values()
    assert [b.name for b in kernel.bindings if b.access == "write"] == ["q0", "scale0"]
    assert_objects_embedded(compiled)

    if target == "cpu":
        calls = [(quarters(rows, hidden, seed=rows),) for rows in (5, 1, 0, 37)]
        assert_runs_like_eager(model, compiled, *calls)


def test_fan_out_on_values_of_every_size() -> None:
    """Rows of very large, very small, infinite and NaN values, in the same program as ordinary ones."""
    model, compiled = fan_out(1536, False, "cpu")
    x = quarters(6, 1536)
    x[2] *= 2.0**60  # the squares still fit float32; their sum too
    x[3] *= 2.0**-60  # the squares vanish beside epsilon
    x[4, 7] = float("inf")
    x[5, 1000] = float("nan")
    program = lowering.load(compiled.vmfb)
    q, scale, *_ = program(x)
    expected_q, expected_scale, *_ = model(x)
    assert_same((q[:4], scale[:4]), (expected_q[:4], expected_scale[:4]))
    # Any NaN will do where eager has one; which bits it has is nobody's contract.
    for got, expected in ((q.float(), expected_q.float()), (scale, expected_scale)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


# --- residuals, readers of y, layouts ------------------------------------------------------------------


class AddNormQuant(nn.Module):
    """An eager residual add, its sum read again, and y read besides its quantization."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(256, eps=1e-5, dtype=torch.bfloat16)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x, residual):
        total = x + residual
        y = self.norm(total)
        return (*group_quant(y, 64), total, y * 2)


class AddRmsNorm(nn.Module):
    """The fused contract: the statistic sees the sum before it is rounded."""

    def forward(self, x, residual):
        y, total = torch.ops.lowering.add_rms_norm(x, residual, None, 1e-6)
        return (*group_quant(y, 128), total)


class SumReadFirst(nn.Module):
    def forward(self, x, residual):
        total = x + residual
        early = torch.relu(total)
        return (*group_quant(rms_norm(total, None, 1e-6), 32), early)


class NoPlainAdd(nn.Module):
    """Neither is x + residual: one scales, the other broadcasts."""

    def forward(self, x, residual):
        scaled = torch.add(x, residual, alpha=2)
        broadcast = x + residual[:1]
        return (
            *group_quant(rms_norm(scaled, None, 1e-6), 64),
            *group_quant(rms_norm(broadcast, None, 1e-6), 64),
        )


@pytest.mark.parametrize(
    ("model", "patterns", "writes"),
    [
        (AddNormQuant(), {"add_norm_quant"}, ["sum", "y", "q0", "scale0"]),
        (AddRmsNorm(), {"add_norm_quant"}, ["sum", "q0", "scale0"]),
        (SumReadFirst(), {"add_norm_quant"}, ["sum", "q0", "scale0"]),
        (NoPlainAdd(), {"norm_quant"}, ["q0", "scale0"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_residual_adds(model: nn.Module, patterns: set[str], writes: list[str]) -> None:
    example = (quarters(4, 256), quarters(4, 256, seed=1))
    compiled = lowering.compile(model, example, dynamic_shapes=({0: ROWS}, {0: ROWS}))
    assert not compiled.report.unfused
    assert {site.pattern for site in compiled.report.sites} == patterns
    for kernel in compiled.dispatched.kernels.values():
        assert [b.name for b in kernel.bindings if b.access == "write"] == writes
    # Sixteenths of the second operand make sums that bfloat16 has to round.
    calls = [(quarters(n, 256, seed=n), quarters(n, 256, seed=n + 1) / 64) for n in (3, 64, 1)]
    assert_runs_like_eager(model, compiled, *calls)


class ColumnScales(nn.Module):
    def forward(self, x):
        y = rms_norm(x, None, 1e-6)
        return group_quant(y, 64, scale_layout="column_tma")


class ColumnScalesBetween(nn.Module):
    """A column_tma scale that is read inside the program, where only its logical shape matters."""

    def forward(self, x):
        q, scale = group_quant(rms_norm(x, None, 1e-6), 64, scale_layout="column_tma")
        return q.float().unflatten(-1, (-1, 64)) * scale.unsqueeze(-1)


@pytest.mark.parametrize("rows", [(5,), (2, 3)], ids=["matrix", "batch"])
def test_column_tma_scales(rows: tuple[int, ...]) -> None:
    model = ColumnScales()
    shapes = {axis: Dim(f"axis{axis}") for axis in range(len(rows))}
    compiled = lowering.compile(model, (quarters(*rows, 256),), dynamic_shapes=(shapes,))
    assert not compiled.report.unfused
    program = lowering.load(compiled.vmfb)
    for size in (rows, (8,) if len(rows) == 1 else (4, 2), (1,) * len(rows), (0,) * len(rows)):
        x = quarters(*size, 256)
        got, expected = program(x), model(x)
        assert_same(got, expected)
        assert got[1].stride() == expected[1].stride() or 0 in size


class MadeContiguous(nn.Module):
    def forward(self, x):
        scale = group_quant(x, 64, scale_layout="column_tma")[1]
        return scale.contiguous(), scale.contiguous().view(-1, 2), scale.reshape(-1, 2)


def test_scales_that_the_model_makes_contiguous_are() -> None:
    x = torch.randn(3, 5, 128)
    results = lowering.load(lowering.compile(MadeContiguous(), (x,)).vmfb)(x)
    for ours, eager in zip(results, MadeContiguous()(x), strict=True):
        assert torch.equal(ours, eager) and ours.stride() == eager.stride()


def test_column_tma_scale_read_inside_the_program() -> None:
    model = ColumnScalesBetween()
    compiled = lowering.compile(model, (quarters(5, 256),), dynamic_shapes=({0: ROWS},))
    program = lowering.load(compiled.vmfb)
    for rows in (5, 1, 8):
        x = quarters(rows, 256, seed=rows)
        assert torch.equal(program(x), model(x))


class Batched(nn.Module):
    """Leading axes of every kind, static and dynamic, and quantizations that split the last axis."""

    def forward(self, x):
        y = rms_norm(x, None, 1e-6)
        heads = y.unflatten(-1, (4, 64))
        return (*group_quant(y, 128), *group_quant(heads, 32), y.flatten(0, 1))


def test_leading_axes_and_split_rows() -> None:
    model = Batched()
    compiled = lowering.compile(model, (quarters(2, 5, 256),), dynamic_shapes=({1: ROWS},))
    assert compiled.report.summary() == {"fused": 3, "unfused": 0, "dispatches": 1}
    assert_runs_like_eager(model, compiled, *[(quarters(2, rows, 256, seed=rows),) for rows in (5, 1, 0, 16)])


class Vector(nn.Module):
    def forward(self, x):
        return group_quant(rms_norm(x, None, 1e-6), 32)


def test_a_single_row_without_leading_axes() -> None:
    compiled = lowering.compile(Vector(), (quarters(96),))
    assert compiled.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}
    assert_runs_like_eager(Vector(), compiled, (quarters(96, seed=3),))


# --- a real architecture ----------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def llama(layers: int) -> nn.Module:
    """A Hugging Face Llama in float32, unedited but for its linear layers, which are quantized."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
    )
    return Logits(lowering.quantize(LlamaForCausalLM(config).eval()))


def compile_llama(model: nn.Module, target: str) -> Compiled:
    shapes = ({1: Dim("tokens", max=512)},)
    return lowering.compile(
        model, (torch.zeros(1, 9, dtype=torch.long),), dynamic_shapes=shapes, target=target
    )


def assert_llama_fused(compiled: Compiled, names: list[str], layers: int) -> None:
    """Both norms of each layer and the last one; seven linear layers' quantizations in each layer."""
    ops = [site.op for site in compiled.report.sites]
    assert (ops.count("rms_norm"), ops.count("group_quant")) == (2 * layers + 1, 7 * layers)
    assert not compiled.report.unfused
    for site in compiled.report.sites:
        assert re.search(r"/modeling_llama\.py:\d+$", site.location), site
    # Per layer: norm + q, k and v's one quantization; o's; norm + gate and up's; down's.  Then the last norm.
    # Beside these a product behind each and, on the cpu, the linear layer that is not quantized.
    products = 4 * layers + (compiled.target.backend == "cpu")
    assert len(custom(names, compiled)) == compiled.report.dispatches == 4 * layers + 1 + products
    # After the first norm every residual add is its norm's.
    patterns = [site.pattern for site in compiled.report.sites if site.op == "rms_norm"]
    assert patterns == ["norm_quant", *["add_norm_quant"] * (2 * layers - 1), "add_norm"]


def test_llama_on_the_cpu(tmp_path: Path) -> None:
    """Logits agree with eager to float32's accuracy.

    Both compute in float32, in another order: 1e-5 of the range of the logits is a few hundred of its
    last places.  Rarely such a difference decides how a value is rounded to fp8, one code then differs
    by 1/16, and everything behind it, later tokens included, moves by up to about 1% (eager does so
    too when its embeddings are disturbed by 1e-7).  So most logits must agree to 1e-5, all to 2e-2.
    """
    model = llama(layers=2)
    compiled = compile_llama(model, "cpu")
    assert_llama_fused(compiled, dispatches(compiled, tmp_path), layers=2)
    program = lowering.load(compiled.vmfb)
    errors = []
    for tokens in (9, 1, 2, 40, 3, 12, 16):
        ids = torch.randint(0, 500, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = model(ids)
        got = program(ids)
        assert got.dtype == torch.float32 and got.shape == (1, tokens, 500)
        errors.append(((got - expected).abs() / (expected.max() - expected.min())).flatten())
        assert errors[-1].max() <= 2e-2, tokens
    assert torch.cat(errors).median() <= 1e-5


@pytest.mark.parametrize("target", GPUS)
def test_llama_on_gpus(target: str, tmp_path: Path) -> None:
    compiled = compile_llama(llama(layers=1), target)
    assert_llama_fused(compiled, dispatches(compiled, tmp_path), layers=1)
    assert_objects_embedded(compiled)


def test_llama_on_gfx942_keeps_its_norms(tmp_path: Path) -> None:
    """Its hardware has another fp8: the quantizations are left to IREE, each with the reason, and compile."""
    compiled = compile_llama(llama(layers=1), "gfx942")
    by_op = {
        op: [site for site in compiled.report.sites if site.op == op] for op in ("rms_norm", "group_quant")
    }
    assert len(by_op["rms_norm"]) == 3 and all(site.fused for site in by_op["rms_norm"])
    assert len(by_op["group_quant"]) == 7
    for site in by_op["group_quant"]:
        assert site.status == "unfused"
        assert re.fullmatch(r"gfx942 .*float8_e4m3fnuz.*float8_e4m3fn\b.*\.", site.reason or "")
    assert len(custom(dispatches(compiled, tmp_path), compiled)) == compiled.report.dispatches >= 3
    assert_objects_embedded(compiled)


# --- parameters ---------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(256)
        self.linear = lowering.nn.BlockScaledLinear.from_linear(nn.Linear(256, 512))

    def forward(self, x):
        return self.linear(self.norm(x))


def test_parameters_in_an_archive_or_in_the_program(tmp_path: Path) -> None:
    """The same results; the archive holds the weights the program then does not."""
    model, x, archive = Linear(), torch.randn(3, 256), tmp_path / "weights.irpa"
    inside = lowering.compile(model, (x,))
    outside = lowering.compile(model, (x,), parameters=archive)
    weight = model.linear.weight.view(torch.uint8).numpy().tobytes()
    assert weight in inside.vmfb
    assert weight not in outside.vmfb and weight in archive.read_bytes()
    assert len(inside.vmfb) - len(outside.vmfb) > len(weight)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.irpa"]

    y = torch.randn(3, 256)
    expected = lowering.load(inside.vmfb)(y)
    assert torch.equal(lowering.load(outside.vmfb, parameters=archive)(y), expected)
    assert (expected - model(y)).abs().max() <= 1e-5 * expected.abs().max()


# --- what no kernel takes -----------------------------------------------------------------------------------


class SmallGroups(nn.Module):
    def forward(self, x):
        y = rms_norm(x, None, 1e-6)
        return (*group_quant(y, 16), *group_quant(y, 128))


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_a_group_size_without_kernel_still_compiles(target: str, tmp_path: Path) -> None:
    compiled = lowering.compile(
        SmallGroups(), (quarters(4, 256),), dynamic_shapes=({0: ROWS},), target=target
    )
    assert [(site.op, site.status) for site in compiled.report.sites] == [
        ("rms_norm", "fused"),
        ("group_quant", "unfused"),
        ("group_quant", "fused"),
    ]
    [site] = compiled.report.unfused
    assert site.reason == "The row kernel quantizes groups of 32, 64 or 128 elements, not 16."
    assert re.search(rf"{THIS}:\d+$", site.location)
    names = dispatches(compiled, tmp_path)
    assert len(custom(names, compiled)) == 1 and len(names) > 1
    if target == "cpu":
        assert_runs_like_eager(SmallGroups(), compiled, (quarters(7, 256),), (quarters(1, 256, seed=2),))


class ColumnScalesWithoutKernel(nn.Module):
    def forward(self, x):
        y = rms_norm(x, None, 1e-6)
        packed = group_quant(y, 16, scale="ue8m0", scale_layout="ue8m0_packed")
        return (
            *group_quant(y, 16, scale_layout="column"),
            *group_quant(y, 8, scale_layout="column_tma"),
            *packed,
        )


@pytest.mark.parametrize("rows", [(5,), (2, 3)], ids=["matrix", "batch"])
def test_scales_without_kernel_have_the_strides_of_their_layout(rows: tuple[int, ...]) -> None:
    model = ColumnScalesWithoutKernel()
    shapes = {axis: Dim(f"axis{axis}") for axis in range(len(rows))}
    compiled = lowering.compile(model, (quarters(*rows, 256),), dynamic_shapes=(shapes,))
    assert compiled.report.summary()["unfused"] == 3
    program = lowering.load(compiled.vmfb)
    for size in (rows, (8,) if len(rows) == 1 else (4, 2), (1,) * len(rows), (0,) * len(rows)):
        got, expected = program(quarters(*size, 256)), model(quarters(*size, 256))
        assert_same(got, expected)
        assert [g.stride() for g in got] == [e.stride() for e in expected] or 0 in size


class PlainTwice(nn.Module):
    """What two linear layers on a model's input do: quantize, use, quantize again."""

    def forward(self, x):
        q0, scale0 = group_quant(x, 128)
        first = q0.float() * 2
        q1, scale1 = group_quant(x, 128)
        return first, q1.float() * 3, scale0, scale1


def test_a_quantization_read_before_its_equal_is_made() -> None:
    compiled = lowering.compile(PlainTwice(), (quarters(4, 256),))
    assert compiled.report.summary() == {"fused": 2, "unfused": 0, "dispatches": 1}
    assert_runs_like_eager(PlainTwice(), compiled, (quarters(4, 256, seed=5),))


class Svd(nn.Module):
    def forward(self, x):
        y = torch.relu(x)
        return torch.linalg.svdvals(y)


def test_an_operation_iree_cannot_lower_is_named_with_its_line() -> None:
    line = Svd.forward.__code__.co_firstlineno + 2
    with pytest.raises(lowering.CompileError) as caught:
        lowering.compile(Svd(), (torch.randn(4, 4),))
    assert f"{THIS}:{line}" in str(caught.value)
    assert "svd" in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("target", ["abacus", "", "sm_80"])
def test_an_unknown_target_is_refused_before_anything_else(target: str) -> None:
    with pytest.raises(lowering.UsageError, match="known targets: cpu, sm_90/h100/h200"):
        lowering.compile(nn.Identity(), (), target=target)


# --- phases ------------------------------------------------------------------------------------------------


def test_dumped_phases_show_each_step(tmp_path: Path) -> None:
    model, started = FanOut(1536, True), []
    lowering.compile(
        model,
        (quarters(4, 1536),),
        dump_phases_to=tmp_path / "phases",
        progress=lambda phase, detail: started.append(phase),
    )
    files = sorted(path.name for path in (tmp_path / "phases").iterdir())
    assert files == [
        "0-import.mlir",
        "1-normalize.mlir",
        "2-raise.mlir",
        "3-sink.mlir",
        "4-fuse.mlir",
        "5-layout.mlir",
        "6-fold.mlir",
        "7-dispatch.mlir",
        "8-expand.mlir",
        "9-linalg.mlir",
    ]
    text = {name: (tmp_path / "phases" / name).read_text() for name in files}
    assert '"torch.lowering.rms_norm"' in text["0-import.mlir"]
    assert '"vmfuse.norm"' in text["2-raise.mlir"] and '"vmfuse.row"' not in text["3-sink.mlir"]
    assert text["4-fuse.mlir"].count('"vmfuse.row"') == 1
    assert "vmfuse." not in text["8-expand.mlir"]
    assert "torch." not in re.sub(r"#.*|loc\(.*", "", text["9-linalg.mlir"]).replace("vmfuse", "")
    assert started == [
        "import",
        "normalize",
        "raise",
        "sink",
        "fuse",
        "layout",
        "fold",
        "dispatch",
        "kernels",
        "expand",
        "weights",
        "compile",
    ]


def test_a_failing_compilation_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(lowering.CompileError):
        lowering.compile(Svd(), (torch.randn(4, 4),), parameters=tmp_path / "weights.irpa")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_compiles_to_the_same_kernels_again() -> None:
    """A kernel's name and bytes depend on nothing but what it computes and for whom."""
    first, second = (fan_out(1536, False, "h200")[1].dispatched.objects for _ in range(2))
    assert first == second
