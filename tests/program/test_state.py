"""What a model writes to: buffers are the program's state, updated in place; arguments have new values."""

from __future__ import annotations

import pytest
import torch
from iree.compiler import ir
from torch import Tensor, nn

import lowering
from lowering.isolation.iree_steps import Iree
from lowering.program.streams import not_in_place
from lowering.signature import Written

CAPACITY = 64
TOKENS = torch.export.Dim("tokens", max=16)
E4M3 = torch.float8_e4m3fn


class Caches(nn.Module):
    """Caches as models write to them, each in a way of its own, and counters."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        shape = (2, 3, capacity, 8)
        for name in ("copied", "placed", "sliced", "chosen"):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("small", torch.zeros(shape, dtype=E4M3), persistent=False)
        self.register_buffer("seen", torch.zeros(2, capacity, dtype=torch.bool))
        self.register_buffer("paged", torch.zeros(capacity // 4, 4, 8, dtype=torch.bfloat16))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.full((8,), 0.5))

    def forward(self, x: Tensor, positions: Tensor, pages: Tensor) -> tuple[Tensor, ...]:
        batch, last = torch.arange(2), x[:, :, -1]
        places = torch.arange(x.shape[2]) + self.length
        self.copied.index_copy_(2, places, x)
        self.placed[batch, :, positions] = last
        self.sliced[:, :, 3:4] = x[:, :, :1]
        self.chosen.scatter_(2, positions.view(2, 1, 1, 1).expand(2, 3, 1, 8), last[:, :, None])
        self.small[:, :, places] = x.to(E4M3)
        self.seen[batch, positions] = True
        self.paged[pages, positions % 4] = last[:, 0].bfloat16()
        self.length.add_(x.shape[2])
        self.mean.lerp_(x.mean((0, 1, 2)), 0.25)
        caches = (self.copied, self.placed, self.sliced, self.chosen, self.small.float())
        read = torch.stack([cache.sum(-2) * self.weight for cache in caches])
        return read, self.seen[:, 5], self.paged[3], self.mean + self.length


WHOLE = {"length", "mean"}
"""The state of ``Caches`` that a call computes as a whole."""


def call(tokens: int, place: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments with numbers that sums of some are exact of."""
    x = torch.randint(-4, 5, (2, 3, tokens, 8)).float()
    return x, torch.tensor([place, place + 2]), torch.tensor([3, 1])


@pytest.fixture(scope="module")
def compiled() -> lowering.Compiled:
    return lowering.compile(Caches(), call(2), dynamic_shapes=({2: TOKENS}, None, None))


def assert_state(program: lowering.Program, model: nn.Module) -> None:
    """The state is what the buffers of ``model`` are, bit for bit."""
    buffers = dict(model.named_buffers())
    for name, found in program.state_dict().items():
        assert found.dtype == buffers[name].dtype
        same = found.view(-1).view(torch.uint8), buffers[name].view(-1).view(torch.uint8)
        assert torch.equal(*same), name


def test_calls_do_what_eager_does(compiled: lowering.Compiled) -> None:
    program, model = lowering.load(compiled.vmfb), Caches()
    for step, tokens in enumerate((16, 1, 1, 3, 7, 1)):
        given = call(tokens, step)
        for found, wanted in zip(program(*given), model(*given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert_state(program, model)
    program.reset()
    assert_state(program, Caches())


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[ir.Module]:
    """The programs that are compiled from now on, where IREE has laid out their memory."""
    found: list[ir.Module] = []
    look = Iree.compile_and_look

    def kept(iree, module, flags):
        vmfb, made = look(iree, module, flags)
        found.append(made)
        return vmfb, made

    monkeypatch.setattr(Iree, "compile_and_look", kept)
    return found


def sizes_in(module: ir.Module, name: str) -> list[int]:
    """The last number that each operation of this name is given: the bytes that it copies or allocates."""
    found: list[int] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.operation.name == name:
            makers = [value.owner for value in op.operands if str(value.type) == "index"]
            found.append(ir.IntegerAttr(makers[-1].attributes["value"]).value)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
def test_what_is_updated_is_updated_in_place(monkeypatch, target):
    """No cache is copied, and nothing is allocated that grows with the capacity."""
    programs = looked_at(monkeypatch)
    compiled = lowering.compile(Caches(4096), call(1), target=target)
    state = [spec.name for spec in compiled.signature.state]
    results = {state[item.argument - 3]: item.result for item in compiled.signature.written}
    assert {name for name, result in results.items() if result is not None} == WHOLE
    (program,) = programs  # it was not compiled again for want of a place
    mask = 2 * 4096  # bytes of the smallest
    assert max(sizes_in(program, "stream.cmd.copy"), default=0) < mask
    assert max(sizes_in(program, "stream.resource.alloca"), default=0) < mask


class Arguments(nn.Module):
    """Arguments that are written, as a whole and at indices, others that are not; one is returned as well."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        total = x + z
        x.copy_(torch.sort(x, -1).values)
        y.index_copy_(0, places, z)
        return total, y


def arguments(rows: int = 6) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(rows, 8), torch.randperm(rows)


@pytest.fixture(scope="module")
def writing() -> lowering.Program:
    compiled = lowering.compile(Arguments(), arguments())
    assert compiled.signature.written == (Written(0, 2), Written(1))
    return lowering.load(compiled.vmfb)


def test_arguments_that_a_model_writes_to_are_written(writing: lowering.Program) -> None:
    for change in (
        lambda tensors: tensors,
        lambda tensors: [t.t().contiguous().t() for t in tensors[:3]] + [tensors[3]],
        lambda tensors: [torch.cat([t[:1], t])[1:] for t in tensors],  # not at a multiple of 64 bytes
    ):
        given = list(change(list(arguments())))
        theirs = [tensor.clone() for tensor in given]
        found, wanted = writing(*given), Arguments()(*theirs)
        for one, other in zip((*found, *given), (*wanted, *theirs), strict=True):
            assert torch.equal(one, other)
        found[1].zero_()  # the result is a tensor of its own
        assert torch.equal(given[1], theirs[1])


def test_memory_of_two_arguments_is_not_written(writing: lowering.Program) -> None:
    x, y, z, places = arguments()
    kept = x.clone()
    with pytest.raises(lowering.RunError, match="argument x is written and shares memory with argument z"):
        writing(x, y, x, places)
    with pytest.raises(lowering.RunError, match="argument x is written and shares memory with argument y"):
        writing(x, x.view(8, 6).view(6, 8), z, places)
    with pytest.raises(lowering.RunError, match="argument x is written, and several of its elements are one"):
        writing(x[:1].expand(6, 8), y, z, places)
    assert torch.equal(x, kept)


class Old(nn.Module):
    """Reads what was there, and returns what is; and writes outside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.arange(32.0).view(8, 4))

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        old = self.cache.sum(0)
        self.cache[places] = x
        return old, self.cache


def test_what_is_read_before_it_is_written() -> None:
    """The cache is copied then, and a caller may write to what is returned."""
    x, places = torch.randn(2, 4), torch.tensor([5, 2])
    program, model = lowering.load(lowering.compile(Old(), (x, places)).vmfb), Old()
    for _ in range(3):
        for found, wanted in zip(program(x, places), model(x, places), strict=True):
            assert torch.equal(found, wanted)
            found.zero_()
        assert_state(program, model)
        x, places = x + 1, places + 1
    before = program.state_dict()["cache"]
    program(x, torch.tensor([8, 100]))  # behind the last place: nothing is written, where eager refuses
    assert torch.equal(program.state_dict()["cache"], before)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.zeros(8))
        self.register_buffer("part", self.whole[:4])

    def forward(self, x: Tensor) -> Tensor:
        self.whole.add_(x)
        self.part.mul_(2)
        return self.whole + 1


def test_buffers_that_share_memory_are_refused() -> None:
    with pytest.raises(lowering.CompileError, match="writes to a buffer whose memory is also another"):
        lowering.compile(Shared(), (torch.ones(8),))


def test_iree_that_copies_what_was_to_be_written_is_found_out(monkeypatch) -> None:
    """The program is compiled again, and the value is returned."""
    wrong = iter([{1}])
    monkeypatch.setattr("lowering.compiler.not_in_place", lambda *_: next(wrong, set()))
    compiled = lowering.compile(Arguments(), arguments())
    assert compiled.signature.written == (Written(0, 2), Written(1, 3))
    given = arguments()
    theirs = [tensor.clone() for tensor in given]
    lowering.load(compiled.vmfb)(*given), Arguments()(*theirs)
    assert all(map(torch.equal, given, theirs))


STREAMS = """
util.func public @f(%a: !hal.buffer_view, %b: !hal.buffer_view) -> !hal.buffer_view {
  %size = arith.constant 64 : index
  %zero = arith.constant 0 : index
  %a0 = stream.tensor.import %a : !hal.buffer_view -> tensor<16xf32> in !stream.resource<external>{%size}
  %b0 = stream.tensor.import %b : !hal.buffer_view -> tensor<16xf32> in !stream.resource<external>{%size}
  %t = stream.cmd.execute with(%a0 as %x: !stream.resource<external>{%size},
                               %b0 as %y: !stream.resource<external>{%size}) {
    stream.cmd.copy %x[%zero], %y[%zero], %size
        : !stream.resource<external>{%size} -> !stream.resource<external>{%size}
  } => !stream.timepoint
  %r = stream.timepoint.await %t => %b0 : !stream.resource<external>{%size}
  %e = stream.tensor.export %r : tensor<16xf32> in !stream.resource<external>{%size} -> !hal.buffer_view
  util.return %e : !hal.buffer_view
}
"""


def test_what_writes_to_an_argument_is_found() -> None:
    with ir.Context():
        module = ir.Module.parse(STREAMS)
    assert not_in_place(module, "f", [0, 1]) == {0}
    assert not_in_place(module, "f", [0, 1], lent=[1]) == {0, 1}
    assert not_in_place(module, "g", [0, 1]) == set()
