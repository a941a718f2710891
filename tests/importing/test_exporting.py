"""Models whose own code decides by a size that stays open, and those that loop over one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import lowering
from lowering.errors import CompileError, RunError
from lowering.importing.exporting import export
from lowering.importing.sizes import Call

THIS = Path(__file__).name
TIME = ({0: Dim("b", max=8), 1: Dim("t", max=100)},)


class Chunks(nn.Module):
    """As state-space models pad a sequence to whole chunks, and cut it again if it was padded."""

    def forward(self, x):
        batch, time, width = x.shape
        padding = (16 - time % 16) % 16
        y = torch.nn.functional.pad(x, (0, 0, 0, padding)).reshape(batch, -1, 16, width)
        y = (y.cumsum(2) + y.sum(2).cumsum(1).unsqueeze(2)).reshape(batch, -1, width)
        return y[:, :time] if padding > 0 else y


class ChunksAndNorm(nn.Module):
    """The norm of Mamba2: of groups of rows that are as long as what was cut has elements for each token."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64))

    def forward(self, x):
        batch, time, _ = x.shape
        y = Chunks()(x)
        rows = y.unflatten(-1, (2, 32)).reshape(batch, time, -1) * torch.nn.functional.silu(x)
        *lead, width = rows.shape
        groups = rows.view(*lead, width // 32, 32)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y, self.weight * groups.view(*lead, width // 32 * 32)


def test_a_sequence_of_any_length_is_cut_into_chunks() -> None:
    model = ChunksAndNorm()
    compiled = lowering.compile(model, (torch.randn(2, 13, 64),), dynamic_shapes=TIME)
    (norm,) = compiled.report.sites
    assert norm.fused and norm.op == "rms_norm", norm
    program = lowering.load(compiled.vmfb)
    for shape in ((2, 13), (1, 1), (3, 16), (1, 17), (2, 48), (8, 100)):
        x = torch.randint(-9, 9, (*shape, 64)).float()  # sums of small integers are exact
        cut, normed = zip(program(x), model(x), strict=True)
        assert torch.equal(*cut), shape
        # An exponential, its reciprocal and the products of a gate, a mean, a root and two products.
        torch.testing.assert_close(*normed, rtol=2**-20, atol=0.0)
    with pytest.raises(RunError, match="t"):
        program(torch.randn(1, 101, 64))


class Elsewhere(nn.Module):
    """Another function beyond a number of elements."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        y = Chunks()(x)
        return y * 2 if x.shape[0] * x.shape[1] > self.limit else y


def test_a_branch_by_size_that_changes_what_is_computed_is_refused() -> None:
    with pytest.raises(CompileError, match="decides by these sizes"):
        lowering.explain(Elsewhere(20), (torch.randn(2, 13, 4),), dynamic_shapes=TIME)


def test_an_assertion_that_no_evaluated_size_violates_is_a_condition() -> None:
    """Beyond 500 elements the model is another one: such sizes are refused when the program is called."""
    _, conditions = export(Elsewhere(500), Call((torch.randn(2, 13, 4),), {}), TIME)
    assert any("500" in text for text in conditions), conditions


class Refuses(nn.Module):
    """Few elements are an error of the model."""

    def forward(self, x):
        if x.shape[0] * x.shape[1] < 5:
            raise ValueError("too few")
        return Chunks()(x)


def test_an_assertion_is_kept_that_only_sizes_violate_which_the_model_refuses() -> None:
    _, conditions = export(Refuses(), Call((torch.randn(2, 13, 4),), {}), TIME)
    assert any(text.endswith(">= 5") for text in conditions), conditions


class Loops(nn.Module):
    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):  # LOOP
            state = state * 0.5 + x[:, step]
        return state


class LoopsOverChunks(nn.Module):
    """As the linear attention of Qwen3.5 and Kimi does."""

    def forward(self, x):
        chunks = nn.functional.pad(x, (0, 0, 0, (16 - x.shape[1] % 16) % 16)).unflatten(1, (-1, 16))
        state = torch.zeros_like(chunks[:, 0])
        for chunk in range(chunks.shape[1]):  # LOOP OVER CHUNKS
            state = state * 0.5 + chunks[:, chunk]
        return state


@pytest.mark.parametrize(
    ("model", "mark", "size"),
    [(Loops(), "# LOOP", ".size(1) == 13"), (LoopsOverChunks(), "# LOOP OVER CHUNKS", "//16), 1)")],
)
def test_a_loop_over_a_size_is_named_with_its_line_and_a_way_out(model, mark, size) -> None:
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.endswith(mark))
    with pytest.raises(CompileError) as refused:
        lowering.explain(model, (torch.randn(2, 13, 4),), dynamic_shapes=TIME)
    first, loop, way_out = str(refused.value).splitlines()
    assert "Constraints violated" in first
    assert f"{THIS}:{line}: for " in loop and loop.endswith(size)
    assert "leave them out of dynamic_shapes" in way_out


class Indexer(nn.Module):
    """As DeepSeek-V3.2 chooses the tokens that a token looks at: many scores are zero, and so equal."""

    def forward(self, x):
        scores = torch.relu(x @ x.transpose(1, 2))
        return scores.topk(min(8, scores.shape[-1]), dim=-1).indices  # CHOOSES


def test_a_top_k_along_an_open_axis_is_named_with_its_line_and_a_way_out() -> None:
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.endswith("# CHOOSES"))
    with pytest.raises(CompileError) as refused:
        lowering.explain(Indexer(), (torch.randn(2, 13, 4),), dynamic_shapes=TIME)
    said = str(refused.value)
    assert f"{THIS}:{line}: aten.topk.default is along an axis of open size" in said, said
    assert "leave it out of dynamic_shapes" in said and "\n" not in said, said


class Biased(nn.Module):
    """As MPT cuts what it adds to scores out of a longer table, along an axis of size 1 as well."""

    def __init__(self):
        super().__init__()
        self.table = nn.Buffer(torch.randn(4, 1, 128))

    def forward(self, x):
        time = x.shape[1]
        first, key = (max(0, self.table.size(axis) - time) for axis in (1, 2))
        return (x[:, None] @ x[:, None].mT) + self.table[:, first:, key:]


def test_an_axis_that_is_one_by_computing_is_stretched() -> None:
    model = Biased()
    compiled = lowering.compile(model, (torch.randn(2, 13, 8),), dynamic_shapes=TIME)
    program = lowering.load(compiled.vmfb)
    for batch, time in ((2, 13), (3, 1), (1, 100)):
        x = torch.randn(batch, time, 8)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RunError, match=re.escape("1 - Max(0, 1 - x.shape[1]) == 1")):
        program(torch.randn(2, 0, 8))


class Attends(nn.Module):
    def forward(self, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("known", [True, False])
def test_keys_and_values_have_one_length(known: bool) -> None:
    """PyTorch's own shape function takes any two, and a program would read behind the shorter."""
    shapes = ({}, {} if known else {2: Dim.AUTO}, {2: Dim.AUTO})
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 23, 8)
    exported, _ = export(Attends(), Call((query, key, key.clone()), {}), shapes)
    _, keys, values = (node.meta["val"].shape for node in exported.graph.nodes if node.op == "placeholder")
    assert keys == values and str(values[2]).isdigit() == known
