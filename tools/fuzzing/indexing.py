"""Steps that read and write by index, and those that write in place, into copies and into views of them."""

from __future__ import annotations

import torch

from .arithmetic import distinct
from .graph import Step
from .scope import Scope, Value


def _deep(v: Value) -> bool:
    return v.rank >= 2 and v.sizes[-1] is not None and v.last >= 4


def _indices(s: Scope, count: int, below: int) -> str:
    """A tensor of different indices."""
    return f"torch.tensor({s.random.sample(range(below), count)})"


def read(s: Scope) -> Step:
    """gather, index_select, indexing by tensors, embeddings."""
    x, out = s.pick(_deep), s.out()
    n = s.choice([1, 2, 4])
    some = f"torch.tensor({[s.random.randrange(x.last) for _ in range(n)]})"
    least = min(t.shape[0] for t in x.tensors)
    rows = f"torch.tensor({[s.random.randrange(least) for _ in range(n)]})"
    options = [
        f"{x}[..., {some}]",
        f"{x}.index_select(-1, {some})",
        f"{x}.index_select(0, {rows})",
        f"{x}[{rows}]",
    ]
    if x.is_float and distinct(x, -1):
        options += [f"{x}.gather(-1, {x}.topk(2, -1)[1])", f"torch.take_along_dim({x}, {x}.argsort(-1), -1)"]
        options += [f"{x}.gather(-1, {x}.argmax(-1, keepdim=True))"]
    ids = [v for v in s.values.values() if v.dtype == torch.int64 and _in_range(v, 16)]
    if ids:
        options += [f"F.embedding({s.choice(ids)}, {s.weight((16, 64), torch.float32, 'normal')})"] * 2
    return Step(f"{out} = {s.choice(options)}", (out,))


def _in_range(v: Value, below: int) -> bool:
    return all(t.numel() and int(t.min()) >= 0 and int(t.max()) < below for t in v.tensors)


def written(s: Scope) -> Step:
    """Functional forms of a write."""
    x, out = s.pick(_deep, lambda v: v.dtype != torch.bool and v.dtype.itemsize > 1), s.out()
    y = s.pick(x.like, lambda v: v.dtype == x.dtype)
    n = s.choice([1, 2, 4])
    columns, axis = _indices(s, n, x.last), s.choice([-1, x.rank - 1])
    least = min(t.shape[0] for t in x.tensors)
    rows = _indices(s, min(n, least), least)
    count = min(n, least)
    ids = f"{columns}.expand(*{x}.shape[:-1], {n})"
    zeros = f"torch.zeros({x.last}, dtype={x.dtype})"
    options = [
        f"{x}.index_copy({axis}, {columns}, {y}[..., :{n}])",
        f"{x}.index_add({axis}, {columns}, {y}[..., :{n}])",
        f"{x}.index_fill({axis}, {columns}, 2)",
        f"{x}.index_add(0, {rows}, {y}[:{count}], alpha=2)",
        f"{x}.slice_scatter({y}[..., :{n}], {axis}, 1, {n + 1})" if n < x.last else f"{x} + 0",
        f"{x}.select_scatter({y}[..., 0], {axis}, 1)",
        f"{x}.index_put(({rows},), {y}[:{count}])",
        f"{x}.index_put(({rows},), {y}[:{count}], accumulate=True)",
        f"{x}.scatter({axis}, {ids}, {y}[..., :{n}])",
        f"{x}.scatter({axis}, {ids}, 1)",
        f"{x}.scatter_add({axis}, {ids}, {y}[..., :{n}])",
        f"torch.zeros_like({x}).scatter({axis}, {ids}, {y}[..., :{n}]) + {x}",
        f"{x}.masked_fill({x} > 0, 0)",
        f"{x}.masked_scatter({x} > 0, {y})" if s.chance(0.3) else f"torch.where({x} > 0, {x}, {y})",
    ]
    if x.rank == 2:
        options.append(f"{x}.index_put(({rows},), {zeros})")
    return Step(f"{out} = {s.choice(options)}", (out,))


_INTO = (
    "{o}[..., :{n}] = 0",
    "{o}[..., 1] = {y}[..., 0]",
    "{o}[0] = 1",
    "{o}[0].mul_(2)",
    "{o}[..., {n}:] += {y}[..., {n}:]",
    "{o}[:, 0].copy_({y}[:, 1])",
    "{o}.add_({y})",
    "{o}.mul_(2)",
    "{o}.zero_()\n{o}[..., :2] += 1",
    "{o}.transpose(-1, -2)[0] = 3",
    "{o}[-1, ..., ::2] = {y}[-1, ..., ::2]",
    "{o}.index_add_(-1, torch.tensor([0, 2]), {y}[..., :2])",
    "{o}.index_fill_(-1, torch.tensor([1]), 0)",
    "{o}.index_copy_(0, torch.tensor([1]), {y}[:1])",
    "{o}.scatter_(-1, torch.zeros(*{o}.shape[:-1], 1, dtype=torch.int64), 5)",
    "{o}.masked_fill_({o} < 0, 0)",
    "{o}.clamp_(min=0)",
    "{o}[{y} > 0] = 0",
    "{o}[..., 0:1].fill_(4)",
    "{o}.view(-1)[:3] = 7",
)


def in_place(s: Scope) -> Step:
    """A write into a copy, or into a view of it."""
    x, out = s.pick(_deep, lambda v: v.is_float or v.dtype in (torch.int64, torch.int32)), s.out()
    y = s.pick(x.like, lambda v: v.dtype == x.dtype)
    copy = s.choice(["{x}.clone()", "{x} + 1", "torch.zeros_like({x})", "{x}.contiguous().clone()"]).format(
        x=x
    )
    writes = [
        s.choice(_INTO).format(o=out, y=y, n=s.choice([1, 2, x.last // 2]))
        for _ in range(s.choice([1, 1, 2]))
    ]
    return Step("\n".join([f"{out} = {copy}", *writes]), (out,))


STEPS = ((2, read), (3, written), (3, in_place))
