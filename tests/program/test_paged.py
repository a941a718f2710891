"""Attention over a cache in pages: a pool that sequences share, and tables of the pages that each one has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering.signature import Written
from tests.program.test_state import looked_at, sizes_in

HEADS, SIZE, PAGE, WIDTH = 2, 8, 4, 16
BATCH, PAGES, COLUMNS = 3, 24, 6
TOKENS = torch.export.Dim("tokens", max=PAGE * COLUMNS)


class Attention(nn.Module):
    """One layer: new tokens are put at their slots, and look at what their sequence has in its pages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(WIDTH, 3 * HEADS * SIZE, bias=False)

    def attend(self, x: Tensor, pools: tuple[Tensor, Tensor], slots: Tensor, table: Tensor, ends: Tensor):
        """x [B, T, WIDTH], slots [B, T], table [B, COLUMNS], ends [B]: the tokens a sequence has then."""
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, SIZE)).unbind(2)
        for pool, new in zip(pools, (key, value), strict=True):
            pool[slots // PAGE, slots % PAGE] = new
        keys, values = (pool[table].flatten(1, 2).transpose(1, 2) for pool in pools)
        last = ends[:, None] - x.shape[1] + torch.arange(x.shape[1])
        seen = torch.arange(keys.shape[2]) <= last[..., None]
        return nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=seen[:, None]
        )


class Kept(Attention):
    """The pool is the program's."""

    keys: Tensor
    values: Tensor

    def __init__(self, pages: int = PAGES) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(pages, PAGE, HEADS, SIZE))

    def forward(self, x: Tensor, slots: Tensor, table: Tensor, ends: Tensor) -> Tensor:
        return self.attend(x, (self.keys, self.values), slots, table, ends)


class Given(Attention):
    """The pool is the caller's."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, ends: Tensor):
        return self.attend(x, (keys, values), slots, table, ends)


class Pages:
    """Pages that are given to sequences as they grow, in an order of their own; page 0 is for padding."""

    def __init__(self, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.free = (torch.randperm(PAGES - 1, generator=generator) + 1).tolist()
        self.table = torch.zeros(BATCH, COLUMNS, dtype=torch.long)
        self.ends = torch.zeros(BATCH, dtype=torch.long)

    def appended(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of ``counts[b]`` more tokens, padded in front; the table and the lengths then."""
        slots = torch.zeros(BATCH, int(counts.max()), dtype=torch.long)
        for row, count in enumerate(counts.tolist()):
            for column in range(count):
                page, place = divmod(int(self.ends[row]), PAGE)
                if not place:
                    self.table[row, page] = self.free.pop()
                slots[row, column - count] = self.table[row, page] * PAGE + place
                self.ends[row] += 1
        return slots, self.table.clone(), self.ends.clone()


PROMPTS = torch.tensor([9, 3, 6])
STEPS = [PROMPTS, *[torch.ones(BATCH, dtype=torch.long)] * 8, torch.tensor([2, 4, 0])]


def calls() -> list[tuple[Tensor, ...]]:
    torch.manual_seed(2)
    pages = Pages()
    return [(torch.randn(BATCH, int(counts.max()), WIDTH), *pages.appended(counts)) for counts in STEPS]


def real(call: tuple[Tensor, ...], counts: Tensor) -> Tensor:
    """Which of a call's tokens are no padding, [B, 1, T, 1]."""
    tokens = call[0].shape[1]
    return (torch.arange(tokens) >= tokens - counts[:, None])[:, None, :, None]


def assert_attends(found: Tensor, wanted: Tensor, call: tuple[Tensor, ...], counts: Tensor) -> None:
    # Sums of 24 products in another order.
    mask = real(call, counts)
    torch.testing.assert_close(found * mask, wanted.nan_to_num() * mask, rtol=1e-5, atol=1e-6)
    assert found[mask.expand_as(found)].abs().max() > 0.01


@pytest.fixture(scope="module")
def compiled() -> lowering.Compiled:
    model = Kept()
    prefill, decode = calls()[0], calls()[1]
    shapes = {"x": {1: TOKENS}, "slots": {1: TOKENS}, "table": None, "ends": None}
    return lowering.compile({"prefill": (model, prefill, shapes), "decode": (model, decode)})


def test_sequences_of_different_lengths_share_a_pool(compiled: lowering.Compiled) -> None:
    program, model = lowering.load(compiled.vmfb), Kept()
    for call, counts in zip(calls(), STEPS, strict=True):
        function = program.decode if call[0].shape[1] == 1 else program.prefill
        assert_attends(function(*call), model(*call), call, counts)
        for name, pool in program.state_dict().items():
            torch.testing.assert_close(pool[1:], dict(model.named_buffers())[name][1:], rtol=1e-5, atol=1e-6)


def test_pages_of_a_finished_sequence_are_used_again(compiled: lowering.Compiled) -> None:
    """A sequence that takes them sees nothing of what they held."""
    program = lowering.load(compiled.vmfb)
    first = [program.prefill(*calls()[0]), program.decode(*calls()[1])]
    again = [program.prefill(*calls()[0]), program.decode(*calls()[1])]
    assert all(map(torch.equal, first, again))


def given(call: tuple[Tensor, ...], pools: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return call[0], *pools, *call[1:]


def test_a_pool_of_the_callers_is_written_where_it_is() -> None:
    def pools() -> tuple[Tensor, Tensor]:
        return torch.zeros(PAGES, PAGE, HEADS, SIZE), torch.zeros(PAGES, PAGE, HEADS, SIZE)

    shapes = ({1: TOKENS}, None, None, {1: TOKENS}, None, None)
    compiled = lowering.compile(Given(), given(calls()[0], pools()), dynamic_shapes=shapes)
    assert compiled.signature.written == (Written(1), Written(2))
    program, model, theirs, wanted = lowering.load(compiled.vmfb), Given(), pools(), pools()
    for call, counts in zip(calls(), STEPS, strict=True):
        assert_attends(program(*given(call, theirs)), model(*given(call, wanted)), call, counts)
        for one, other in zip(theirs, wanted, strict=True):
            torch.testing.assert_close(one[1:], other[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["cpu", "h200", "gfx950"])
def test_no_pool_is_copied(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    programs = looked_at(monkeypatch)
    pages = 4096
    compiled = lowering.compile(Kept(pages), calls()[1], target=target)
    assert [item.result for item in compiled.signature.written] == [None, None]
    (program,) = programs
    pool = pages * PAGE * HEADS * SIZE * 4
    assert max(sizes_in(program, "stream.cmd.copy"), default=0) < pool
    assert max(sizes_in(program, "stream.resource.alloca"), default=0) < pool
