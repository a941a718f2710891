"""The entry point that writes into memory of the caller's: in place, with nothing allocated by IREE."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from iree import compiler as iree_compiler
from torch import Tensor, nn

import lowering
from lowering.isolation.iree_steps import Iree
from lowering.runtime import program as runtime
from lowering.signature import Signature, TensorSpec, known_sizes

ROWS = torch.export.Dim("T")
BY_ROWS = ({0: ROWS},)


def rows(count: int, width: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (count, width), generator=generator).bfloat16()


class Chain(nn.Module):
    """Every value is a result, and all but the last are read by the next site as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        written, residual = [], x
        for layout in ("row", "column_tma"):
            x, residual = torch.ops.lowering.add_rms_norm(x, residual, self.weight, 1e-6)
            written += [x, residual, *torch.ops.lowering.group_quant(x, 128, scale_layout=layout)]
        return tuple(written)


class Generated(nn.Module):
    """The same of operations that IREE compiles; and values that only the next operation reads."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.float() @ x.float().t()
        z = torch.relu(y)
        w = torch.softmax(z @ y, -1)
        return y, z.view(-1), w @ y, (w @ y).argmax(-1)


class Passed(nn.Module):
    """Arguments, constants, parameters, repeated and reshaped results, empty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, 256).bfloat16())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        positive, q = y > 0, (x.float() * 3).to(torch.int8)
        return x, y, y, self.weight, torch.ones(3), x[:0], y.view(-1), y.t(), positive, q, q.view(torch.uint8)


class Counted(nn.Module):
    """The first result has a size that only the values tell; memory on the way has too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = torch.nonzero(x[0])
        return found, found.float().cumsum(0).sum(0), x + 1


class Nested(nn.Module):
    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        q, scale = torch.ops.lowering.group_quant(x, 128)
        return {"quantized": [q, scale]}


def stream_ir(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    examples: tuple[object, ...],
    target: str,
    shapes: object = BY_ROWS,
) -> str:
    """The program where all allocations, copies and dispatches are explicit."""
    found: list[str] = []

    def stop_at_streams(_, module, flags) -> bytes:
        bytecode = io.BytesIO()
        module.operation.write_bytecode(bytecode)
        options = ["--iree-input-type=none", "--compile-to=stream", *flags]
        found.append(iree_compiler.compile_str(bytecode.getvalue(), extra_args=options).decode())
        return b""

    monkeypatch.setattr(Iree, "compile", stop_at_streams)
    lowering.compile(model, examples, dynamic_shapes=shapes, target=target)
    return found[0]


def function(text: str, name: str) -> str:
    start = text.index(f"util.func public @{name}(")
    return text[start : text.index("util.return", start)]


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
@pytest.mark.parametrize("model", [Chain(), Generated()], ids=["kernels", "generated"])
def test_results_are_written_in_place(monkeypatch, model, target):
    text = stream_ir(monkeypatch, model, (rows(5),), target)
    into, main = function(text, "main$into$async"), function(text, "main$async")
    assert not re.findall(r"stream\.\w+\.(?:alloca|copy|update|clone)\b", into), into
    assert into.count("stream.cmd.dispatch ") == main.count("stream.cmd.dispatch ") > 1
    assert "stream.resource.alloca" in main
    assert "main$into$async_transients_size" in text


def without_storage(monkeypatch: pytest.MonkeyPatch, program: bytes) -> runtime.Program:
    """The program by its other entry point, where IREE allocates: as earlier releases call it."""
    known = runtime.signatures_of

    def bare(module, name) -> dict[str, Signature]:
        return {n: replace(s, placed=()) for n, s in known(module, name).items()}

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "signatures_of", bare)
        return lowering.load(program)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), i
        assert torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        ), i


@pytest.mark.parametrize(
    ("model", "placed"),
    [
        (Chain(), {0, 1, 2, 3, 4, 5, 6, 7}),
        (Generated(), {0, 1, 2, 3}),
        (Passed(), set(range(11))),
        (Counted(), set()),
    ],
    ids=["kernels", "generated", "passed", "counted"],
)
def test_both_entry_points_return_the_same(monkeypatch, model, placed):
    compiled = lowering.compile(model, (rows(5),), dynamic_shapes=BY_ROWS)
    assert {number for numbers in compiled.signature.placed for number in numbers} == placed
    program, other = lowering.load(compiled.vmfb), without_storage(monkeypatch, compiled.vmfb)
    for count in (5, 1, 37, 5):
        x = rows(count, seed=count)
        before, found = x.clone(), program(x)
        assert_same(found, other(x))
        assert torch.equal(x, before)
        for a, b in zip(found, model(x), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)


def test_results_are_ordinary_tensors_of_each_call():
    """Fresh memory each time, which outlives the program: arguments and weights share none of it."""
    compiled = lowering.compile(Passed(), (rows(5),), dynamic_shapes=BY_ROWS)
    assert (1, 2) in compiled.signature.placed
    program, x = lowering.load(compiled.vmfb), rows(5)
    first, second = program(x), program(rows(5, seed=1))
    again = program(x)
    kept = [tensor.clone() for tensor in first]
    assert first[1].data_ptr() == first[2].data_ptr() and first[1] is not first[2]
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in (*first, *second)}
    for numbers in compiled.signature.placed:
        one, other = first[numbers[0]], second[numbers[0]]
        assert one.numel() == 0 or one.data_ptr() != other.data_ptr()
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
    for tensor in again:
        tensor.zero_()
    assert torch.equal(x, rows(5))
    assert all(torch.equal(a, b) for a, b in zip(program(x), kept, strict=True))
    del program
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: x[1:3],
        lambda x: (torch.ones(2), x.clone(), x.reshape(-1)),
        lambda x: (torch.zeros(3), torch.cat([x, x])),
        lambda x: (x[1:3], x.float().sum(), x * 2),
        lambda x: (torch.nonzero(x[0]), x, torch.ones(2), x * 2),
    ],
    ids=["argument", "slice", "given", "moved", "slice and scalar", "counted"],
)
def test_results_that_nothing_computes(function):
    """What is given or only moved, alone and beside what is computed, and a result without sizes."""

    class Model(nn.Module):
        def forward(self, x: Tensor):
            return function(x)

    x = rows(5)
    found, expected = lowering.load(lowering.compile(Model(), (x,)).vmfb)(x), function(x)
    pairs = [(found, expected)] if isinstance(expected, Tensor) else zip(found, expected, strict=True)
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)


def test_results_in_containers():
    compiled = lowering.compile(Nested(), (rows(5),), dynamic_shapes=BY_ROWS)
    found, expected = lowering.load(compiled.vmfb)(rows(7)), Nested()(rows(7))
    assert type(found) is dict and type(found["quantized"]) is list
    assert_same(tuple(found["quantized"]), tuple(expected["quantized"]))


def test_any_tool_can_call_main(tmp_path: Path):
    """``main`` is what it was: tensors in, tensors out, no storage."""
    from iree import runtime as iree

    path = tmp_path / "chain.vmfb"
    lowering.compile(Generated(), (rows(5),), dynamic_shapes=BY_ROWS).save(path)
    module = iree.load_vm_flatbuffer_file(str(path), driver="local-sync")
    x = torch.ones(3, 256, dtype=torch.bfloat16)
    import ml_dtypes

    results = module.main(x.float().numpy().astype(ml_dtypes.bfloat16))
    assert len(results) == 4
    assert torch.equal(torch.from_numpy(results[0].to_host().copy()), torch.full((3, 3), 256.0))


def spec(dtype: str, *shape) -> TensorSpec:
    return TensorSpec("t", dtype, shape)


@pytest.mark.parametrize(
    ("result", "known"),
    [
        (spec("float32", 3), True),
        (spec("float32", "s0", "2*s0 + 1", "s1//2"), True),
        (spec("float32", "u0"), False),
        (spec("float32", None), False),
        (TensorSpec("t", "float32", None), False),
        (spec("float64", 3), False),  # IREE stores it as float32
    ],
)
def test_sizes_that_a_caller_knows(result, known):
    signature = Signature("cpu", "cpu", "", (spec("int8", "s0", "s1"),), (spec("int8"), result))
    assert known_sizes(signature) == ((0, 1) if known else (0,))


def test_memory_that_is_not_there_is_an_error():
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[0]
            return x.new_ones(size, size, size) + 1

    program = lowering.load(lowering.compile(Cube(), (rows(5, 1),), dynamic_shapes=BY_ROWS).vmfb)
    assert torch.equal(program(rows(3, 1)), torch.full((3, 3, 3), 2, dtype=torch.bfloat16))
    with pytest.raises(lowering.RunError, match=r"main failed: .*(memory|RESOURCE_EXHAUSTED)"):
        program(rows(200_000, 1))  # 14 petabytes


def test_a_program_is_not_refused_for_the_second_entry_point(monkeypatch, tmp_path):
    """Where IREE cannot compile it, the program has ``main`` alone, and the report says why."""
    known = Iree.compile

    def refuse(iree, module, flags):
        if "main$into" in str(module):
            raise lowering.CompileError("IREE could not compile the program:\n  model.py:3: no such luck")
        return known(iree, module, flags)

    monkeypatch.setattr(Iree, "compile", refuse)
    compiled = lowering.compile(Nested(), (rows(5),), dynamic_shapes=BY_ROWS)
    assert compiled.signature.placed == ()
    (remark,) = compiled.report.remarks
    assert (remark.op, remark.location) == ("main", "model.py:3")
    assert "allocates its results in each call" in remark.text and "no such luck" in remark.text
    found, expected = lowering.load(compiled.vmfb)(rows(7)), Nested()(rows(7))
    assert_same(tuple(found["quantized"]), tuple(expected["quantized"]))


class GatheredExperts(nn.Module):
    """IREE 3.13 cannot place the memory of this one: its sizes are computed between its executions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 32)), nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y = torch.bmm(self.up[i], x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(self.down[j], y.unsqueeze(-1)).squeeze(-1)


def test_a_program_that_iree_can_compile_with_its_own_memory_alone():
    experts, x = GatheredExperts().requires_grad_(False), torch.randn(13, 32)
    i, j = torch.randint(0, 4, (2, 13))
    shapes = ({0: ROWS}, {0: ROWS}, {0: ROWS})
    program = lowering.load(lowering.compile(experts, (x, i, j), dynamic_shapes=shapes).vmfb)
    for count in (13, 2):
        arguments = x[:count], i[:count], j[:count]
        torch.testing.assert_close(program(*arguments), experts(*arguments), rtol=1e-5, atol=1e-5)


def test_memory_that_iree_fills_and_copies_itself():
    """What is set to a number, moved or copied is written by no kernel: IREE's driver does it."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            best = torch.topk(x.softmax(-1), 3, -1)
            mask = torch.zeros_like(x).scatter(1, best[1], 1.0)
            moved = self.weight.index_put((torch.tensor([1, 3]),), x[:2]) * 2
            view = x.view(x.shape[0] * 2, -1)
            return *best, mask * x, moved, view, x[1:], torch.cat([x, x * 2]), x.new_ones(x.shape), x

    model = Moved().requires_grad_(False)
    shapes = ({0: torch.export.Dim("T", min=4)},)
    compiled = lowering.compile(model, (torch.rand(4, 16),), dynamic_shapes=shapes)
    program = lowering.load(compiled.vmfb)
    assert {number for numbers in compiled.signature.placed for number in numbers} == set(range(9))
    for count in (4, 9):
        x = torch.rand(count, 16)
        before = x.clone()
        for a, b in zip(program(x), model(x), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b)
        assert torch.equal(x, before)


def test_a_batch_of_nothing():
    """Static sizes of which one is 0 leave nothing to compute, and no scratch memory."""
    program = lowering.load(lowering.compile(Nested(), (rows(0),)).vmfb)
    q, scale = program(rows(0))["quantized"]
    assert (q.shape, scale.shape) == ((0, 256), (0, 2))
