"""Arguments and weights are only read; sizes that a model was not exported for are refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowering
from tests.program.test_storage import function, stream_ir, without_storage

ROWS = torch.tensor([1, 3])
HERE = torch.tensor([[0, 2], [1, 1]])


def cleared(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :8] = 0
    return y


def added(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[2:4].add_(y)
    z[0] *= 3
    return z


Updates = dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...] | Tensor]]

UPDATES: Updates = {
    "sort": lambda x, y: tuple(torch.sort(x, -1)),
    "sort of columns": lambda x, y: tuple(torch.sort(x, 0, descending=True)),
    "argsort": lambda x, y: torch.argsort(x, -1),
    "topk": lambda x, y: tuple(torch.topk(x, 3, -1)),
    "scatter": lambda x, y: x.scatter(1, HERE, y),
    "scatter_add": lambda x, y: x.scatter_add(0, HERE, y),
    "scatter_reduce": lambda x, y: x.scatter_reduce(1, HERE, y, "amax"),
    "index_put": lambda x, y: x.index_put((ROWS,), y),
    "index_put accumulate": lambda x, y: x.index_put((ROWS,), y, accumulate=True),
    "index_put of a view": lambda x, y: x.view(4, 32).index_put((ROWS,), y.new_ones(2, 32)),
    "index_add": lambda x, y: x.index_add(0, ROWS, y),
    "index_copy": lambda x, y: x.index_copy(0, ROWS, y),
    "index_fill": lambda x, y: x.index_fill(0, ROWS, 2.0),
    "slice_scatter": lambda x, y: x.slice_scatter(y, 0, 2, 4),
    "select_scatter": lambda x, y: x.select_scatter(y[0], 0, 3),
    "masked_fill": lambda x, y: x.masked_fill(x > 0, 1.0),
    "masked_scatter": lambda x, y: x.masked_scatter(x > 0, x.flip(0)),
    "cumsum": lambda x, y: x.cumsum(1),
    "cleared": lambda x, y: cleared(x),
    "added": added,
    "cat": lambda x, y: torch.cat([x, y]),
    "pad": lambda x, y: nn.functional.pad(x, (1, 2)),
    "roll": lambda x, y: x.roll(3, 1),
    "where": lambda x, y: torch.where(x > 0, x, x.flip(1)),
    "given": lambda x, y: (x, x.clone(), x.view(4, 32), x[1:3], x.t()),
}

# How an argument is used beside the update.  A program holds several updates, each of arguments of its own.
USES: dict[str, Callable[[Callable[..., object], Tensor, Tensor, Tensor], object]] = {
    "last": lambda update, x, y, weight: update(x, y),
    "read twice": lambda update, x, y, weight: (update(x, y), x * 2, y + 1),
    "returned": lambda update, x, y, weight: (update(x, y), x, y),
    "weight": lambda update, x, y, weight: (update(weight, y), x + weight),
}
GROUPS = [list(UPDATES)[start::3] for start in range(3)]


class Updating(nn.Module):
    """All updates of a group, each with an ``x`` of its own."""

    def __init__(self, names: list[str], use: str):
        super().__init__()
        self.names, self.use = names, USES[use]
        self.weights = nn.ParameterList(torch.randn(8, 16) for _ in names)

    def forward(self, xs: list[Tensor], ys: list[Tensor]) -> list[object]:
        rows = zip(self.names, xs, ys, self.weights, strict=True)
        return [self.use(UPDATES[name], x, y, weight) for name, x, y, weight in rows]


def arguments(count: int) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(8, 16) for _ in range(count)], [torch.randn(2, 16) for _ in range(count)]


def leaves(value: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def assert_only_reads(program, model: nn.Module, xs: list[Tensor], ys: list[Tensor]) -> None:
    """Called with these, ``program`` gives what ``model`` gives for copies, and leaves them as they were."""
    kept = [tensor.clone() for tensor in (*xs, *ys)]
    for _ in range(2):
        expected = leaves(model([x.clone() for x in xs], [y.clone() for y in ys]))
        found = leaves(program(xs, ys))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for a, b in zip((*xs, *ys), kept, strict=True):
            assert torch.equal(a, b)
        for result in found:  # nor does a caller that writes into a result
            result.zero_()
        for a, b in zip((*xs, *ys), kept, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_no_update_writes_into_an_argument(monkeypatch, group, use):
    names = GROUPS[group]
    model = Updating(names, use).requires_grad_(False)
    before = [weight.clone() for weight in model.weights]
    compiled = lowering.compile(model, arguments(len(names)))
    for program in (lowering.load(compiled.vmfb), without_storage(monkeypatch, compiled.vmfb)):
        assert_only_reads(program, model, *arguments(len(names)))
        # One tensor as every argument, and arguments that lie in one another.
        x, y = torch.randn(8, 16), torch.randn(2, 16)
        assert_only_reads(program, model, [x] * len(names), [y] * len(names))
        whole = torch.randn(16, 16)
        parts = [whole[start : start + 8] for start in (0, 4, 8)]
        xs = [parts[i % 3] for i in range(len(names))]
        assert_only_reads(program, model, xs, [x[6:8] for x in xs])
    assert all(torch.equal(a, b) for a, b in zip(model.weights, before, strict=True))


WRITES = re.compile(
    r"(?:rw|wo) (%arg\d+)\[|stream\.cmd\.copy .*?, (%arg\d+)\[|stream\.cmd\.fill .*?, (%arg\d+)\["
)


def written_arguments(body: str, arguments: int) -> set[int]:
    """The arguments, by number, whose memory an execution of ``body`` writes."""
    imported = dict(re.findall(r"(%\w+) = stream\.tensor\.import .*?%arg(\d+) : ", body))
    written = set()
    for execution in re.split(r"stream\.cmd\.execute", body)[1:]:
        taken = dict(re.findall(r"(%\w+) as (%arg\d+): ", execution.partition("{\n")[0]))
        inside = {name for found in WRITES.findall(execution) for name in found if name}
        numbers = [
            int(imported[value]) for value, name in taken.items() if name in inside and value in imported
        ]
        written |= {number for number in numbers if number < arguments}
    return written


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_no_program_of_any_target_writes_into_an_argument(monkeypatch, group, target):
    """In the program that IREE makes, where every write is explicit; without the protection it does."""
    names = GROUPS[group]
    model = Updating(names, "last").requires_grad_(False)
    entries = ("main$async", "main$into$async")

    def written() -> list[set[int]]:
        text = stream_ir(monkeypatch, model, arguments(len(names)), target, shapes=None)
        return [written_arguments(function(text, name), 2 * len(names)) for name in entries]

    assert written() == [set(), set()]
    monkeypatch.setattr("lowering.compiler.keep_arguments", lambda module: None)
    assert all(written())


class Readers(nn.Module):
    """Kernels, products, slices, views and sums of arguments: nothing is updated."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.lowering.rms_norm(x[:, :128], torch.ones(128, dtype=torch.bfloat16), 1e-6)
        return y, torch.relu(x[:, 64:192]) @ x[:, 128:].t(), x.view(-1, 128).float().sum(-1)


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
def test_what_is_only_read_is_not_copied(monkeypatch, target):
    """The same with and without the reader that protects arguments; and one copy for one update."""

    def counts(model: nn.Module) -> list[int]:
        text = stream_ir(monkeypatch, model, (torch.ones(6, 256, dtype=torch.bfloat16),), target)
        bodies = (function(text, name) for name in ("main$async", "main$into$async"))
        return [len(re.findall(r"stream\.cmd\.copy\b", body)) for body in bodies]

    class Updater(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # So many indices are no loop over the result: IREE updates in place.
            return x.index_add(0, torch.tensor([0, 2]).repeat(40), x.new_ones(80, 256))

    reads, updates = counts(Readers()), counts(Updater())
    assert updates == [1, 2]  # into memory that may be changed, and from there into the caller's
    monkeypatch.setattr("lowering.compiler.keep_arguments", lambda module: None)
    assert counts(Readers()) == reads
    assert counts(Updater()) == [0, 1]  # the argument itself was changed


def test_weights_that_torch_compile_passes_as_arguments():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return torch.sort(self.weight, -1)[0], self.weight.index_add(0, torch.tensor([1]), x)

    model = Model().requires_grad_(False)
    weight, x = model.weight.clone(), torch.randn(1, 64)
    found = torch.compile(model, backend="lowering")(x)
    for a, b in zip(found, model(x), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.weight, weight)


# --- sizes -------------------------------------------------------------------------------------


def lambda_module(function: Callable[..., object], count: int) -> nn.Module:
    class One(nn.Module):
        def forward(self, x: Tensor) -> object:
            return function(x)

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> object:
            return function(x, y)

    return (One, Two)[count - 1]()


def checked(x: Tensor) -> Tensor:
    torch._check(x.shape[0] % 8 == 0)
    torch._check(x.shape[0] <= 64)
    return x * 2


Dim = torch.export.Dim
M, AUTO = Dim("m"), Dim.AUTO
SIZES = {
    "range": (
        lambda x: x + torch.arange(16.0)[: x.shape[0]],
        ({0: Dim("n", min=2, max=16)},),
        [(2,), (16,)],
        {
            (17,): r"argument x: size 17 of axis 0: .* 2 <= x\.shape\[0\] <= 16",
            (1,): "size 1",
            (0,): "size 0",
        },
    ),
    "multiple": (
        lambda x: x * 1.5,
        ({0: 8 * Dim("m", max=4)},),
        [(16,), (8,)],
        {(17,): "8*m|8.s", (40,): "<= 32"},
    ),
    "two arguments": (
        lambda x, y: torch.cat([x, y]) * 2,
        ({0: 2 * M}, {0: 2 * M + 1}),
        [(4, 5), (8, 9)],
        {(4, 7): "argument y", (3, 5): "argument x"},
    ),
    "even": (
        lambda x: x.view(x.shape[0] // 2, 2) + 1,
        ({0: AUTO},),
        [(4,), (16,)],
        {(7,): "size 7 of axis 0"},
    ),
    "branch": (
        lambda x: x * 3 if x.shape[0] > 10 else x * 2,
        ({0: AUTO},),
        [(8,), (10,)],
        {(11,): r"x\.shape\[0\] <= 10"},
    ),
    "sum": (
        lambda x, y: torch.cat([x, y])[:6] * 2,
        ({0: AUTO}, {0: AUTO}),
        [(3, 3), (2, 9)],
        {(3, 2): r"argument x: size 3 of axis 0.*y\.shape\[0\] \+ x\.shape\[0\] >= 6|argument y: size 2"},
    ),
    "asserted": (checked, ({0: Dim.DYNAMIC},), [(8,), (64,)], {(72,): "<= 64", (12,): "% 8 == 0"}),
}


@pytest.mark.parametrize("saved", [False, True], ids=["module", "pt2"])
@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_a_model_was_not_exported_for_are_refused(tmp_path, case, saved):
    """Before anything is read; and those it was exported for give eager's values."""
    function, shapes, good, bad = SIZES[case]
    module = lambda_module(function, len(shapes))
    example = tuple(torch.rand(size) for size in good[0])
    if saved:
        exported = torch.export.export(module, example, dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / "model.pt2")
        compiled = lowering.compile(torch.export.load(tmp_path / "model.pt2"))
    else:
        compiled = lowering.compile(module, example, dynamic_shapes=shapes)
    program = lowering.load(compiled.vmfb)
    for sizes in good:
        arguments = tuple(torch.rand(size) for size in sizes)
        torch.testing.assert_close(program(*arguments), module(*arguments))
    for sizes, message in bad.items():
        for _ in range(2):  # nothing that was refused is remembered as right
            with pytest.raises(lowering.RunError, match=message):
                program(*(torch.rand(size) for size in sizes))


def test_sizes_inside_containers_are_named():
    class Model(nn.Module):
        def forward(self, x: Tensor, d: dict[str, list[Tensor]], *, z: Tensor) -> Tensor:
            return x[:5] * d["k"][0][:5] + z[:5]

    auto = {0: Dim.AUTO}
    compiled = lowering.compile(
        Model(),
        (torch.rand(8), {"k": [torch.rand(9)]}),
        kwargs={"z": torch.rand(11)},
        dynamic_shapes={"x": auto, "d": {"k": [auto]}, "z": auto},
    )
    program = lowering.load(compiled.vmfb)
    assert program(torch.rand(5), {"k": [torch.rand(6)]}, z=torch.rand(7)).shape == (5,)
    with pytest.raises(lowering.RunError, match=r"argument d_k_0: size 4 of axis 0: .* 5 <= d_k_0"):
        program(torch.rand(5), {"k": [torch.rand(4)]}, z=torch.rand(7))
