"""Random chains of views between a norm and a quantization: each fuses, or says why it cannot.

Whether whole groups survive a chain is found out without the compiler, by sending the numbers of the elements
through it.  Many chains start at one norm; where they fuse they all become the same output of it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowering
from lowering.families.registry import supported
from lowering.targets import resolve
from tests.raised import Function, integers, sites

rms_norm = torch.ops.lowering.rms_norm
group_quant = torch.ops.lowering.group_quant

G, HIDDEN = 64, 256
Step = Callable[[Tensor], Tensor]
Chain = list[tuple[str, Step]]
# What needs sizes that are not known where the input's are not: rows that become columns, or are counted.
STATIC = (
    "join the last axis",
    "flatten and unflatten",
    "squeeze",
    "transpose of the last axis",
    "slice of rows",
)


def steps(y: Tensor, draw: random.Random) -> dict[str, Step]:
    """The steps that can be done to a tensor like ``y``; those of its sizes that steps name are static."""
    rank, last = y.dim(), y.shape[-1]
    axis = draw.randrange(rank)
    found: dict[str, Step] = {
        "view": lambda y: y.reshape(-1, last),
        "unsqueeze": lambda y: y.unsqueeze(axis),
        "clone": lambda y: y.clone(),
        "contiguous": lambda y: y.contiguous(),
        "alias": torch.ops.aten.alias,
        "expand": lambda y: y.unsqueeze(0).expand(2, *[-1] * rank),
        "slice of all of the last axis": lambda y: y[..., 0:last],
    }
    if rank > 1:
        found["transpose and back"] = lambda y: y.transpose(-1, -2).transpose(-1, -2)
        found["flatten and unflatten"] = lambda y: y.flatten(-2).unflatten(-1, (-1, last))
        found["slice of rows"] = lambda y: y[1:] if axis == 0 else y[:-1]
        found["join the last axis"] = lambda y: y.flatten(-2)
    if rank > 2:
        found["flatten"] = lambda y: y.flatten(0, 1)
        found["transpose"] = lambda y: y.transpose(0, rank - 2)
        found["permute"] = lambda y: y.permute(*range(1, rank - 1), 0, rank - 1)
        found["select"] = lambda y: y[:, -1] if axis else y.select(0, 0)
    if last % (2 * G) == 0:
        found["split the last axis"] = lambda y: y.unflatten(-1, (2, last // 2))
    if 1 in y.shape[:-1]:
        one = list(y.shape).index(1)
        found["squeeze"] = lambda y: y.squeeze(one)
    if last > G:
        found["slice across groups"] = lambda y: y[..., G // 2 : last - G // 2]
    if rank > 1 and y.shape[-2] % G == 0:
        found["transpose of the last axis"] = lambda y: y.transpose(-1, -2)
    return found


def chain(seed: int, shape: tuple[int, ...], dynamic: bool) -> Chain:
    """A chain of up to seven steps, none of which makes a tensor empty or large."""
    draw, y, found = random.Random(seed), torch.zeros(shape), []
    for _ in range(draw.randint(1, 7)):
        possible = steps(y, draw)
        if dynamic:  # where a size of the input is not known, it cannot be counted or made part of a row
            for name in (
                "join the last axis",
                "flatten and unflatten",
                "squeeze",
                "transpose of the last axis",
            ):
                possible.pop(name, None)
        if any(name == "slice across groups" for name, _ in found):
            possible.pop("slice across groups", None)  # two might meet on a group's edge again, far apart
        name = draw.choice(sorted(possible))
        z = possible[name](y)
        # A row of one is where symbolic sizes would be specialised.
        if (
            0 < z.numel() <= 65536
            and z.dim() < 6
            and not (dynamic and "slice of rows" in [n for n, _ in found])
        ):
            found.append((name, possible[name]))
            y = z
    return found


def applied(steps: Chain, y: Tensor) -> Tensor:
    for _, step in steps:
        y = step(y)
    return y


def whole_groups_survive(steps: Chain, shape: tuple[int, ...]) -> bool:
    """Whether every group of the chain's result is a group of the norm's."""
    numbers = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    groups = applied(steps, numbers).reshape(-1, G)
    whole = groups[:, :1] + torch.arange(G)
    return bool((groups == whole).all() and (groups[:, 0] % G == 0).all())


def quantized(chains: list[Chain], layout: str = "row") -> Function:
    def function(w: Tensor, x: Tensor) -> list[Tensor]:
        y = rms_norm(x, w, 1e-6)
        return [out for c in chains for out in group_quant(applied(c, y), G, scale_layout=layout)]

    return Function(function)


SHAPES = [(4, HIDDEN), (3, 5, HIDDEN), (2, 3, 2, HIDDEN)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chain_fuses_exactly_where_whole_groups_survive(shape: tuple[int, ...]) -> None:
    seen: Counter[str] = Counter()
    for batch in range(4):
        chains = [chain(1000 * batch + n, shape, dynamic=False) for n in range(25)]
        _, *quants = sites(quantized(chains), torch.zeros(shape, dtype=torch.bfloat16)).records
        for steps_, record in zip(chains, quants, strict=True):
            names = [name for name, _ in steps_]
            seen.update(names)
            if whole_groups_survive(steps_, shape):
                assert record.pattern == "norm_quant", (names, record.reason)
            else:
                assert record.reason and "between producer and quantization" in record.reason, names
    assert {"slice across groups", "transpose and back", "split the last axis", "expand"} <= set(seen)


@pytest.mark.parametrize("layout", ["column", "column_tma"])
def test_a_chain_of_column_scales_fuses_or_says_why(layout: str) -> None:
    chains = [chain(n, (3, 5, HIDDEN), dynamic=False) for n in range(40)]
    _, *quants = sites(quantized(chains, layout), torch.zeros(3, 5, HIDDEN, dtype=torch.bfloat16)).records
    fused = sum(record.fused for record in quants)
    assert 0 < fused < len(quants)
    assert all(record.fused or "between producer and quantization" in record.reason for record in quants)


def test_chains_of_any_number_of_rows_compute_what_eager_computes() -> None:
    chains = [chain(n, (3, 5, HIDDEN), dynamic=True) for n in range(30)]
    module = quantized(chains)
    batch, time = torch.export.Dim("batch", min=3, max=64), torch.export.Dim("time", min=3, max=64)
    example = integers(3, 5, HIDDEN)
    compiled = lowering.compile(module, (example,), dynamic_shapes=(({0: batch, 1: time},),))
    patterns = Counter(site.pattern for site in compiled.report.sites)
    assert patterns["norm_quant"] == 1 + sum(whole_groups_survive(c, (3, 5, HIDDEN)) for c in chains)
    program = lowering.load(compiled.vmfb)
    for shape in ((3, 5), (3, 3), (4, 7)):
        x = integers(*shape, HIDDEN)
        outputs = zip(program(x), module(x), strict=True)
        for number, (got, expected) in enumerate(outputs):
            names = [name for name, _ in chains[number // 2]]
            assert got.shape == expected.shape, names
            assert torch.equal(got.float(), expected.float()), names


def test_slices_of_the_last_axis_that_cut_no_group_follow() -> None:
    def function(w: Tensor, x: Tensor) -> list[Tensor]:
        y = rms_norm(x, w, 1e-6)
        cut = y[..., G // 2 : HIDDEN - G // 2]  # by itself it cuts two groups
        slices = (y[..., :G], y[..., G:], cut[..., G // 2 : G // 2 + G], y.unflatten(-1, (2, -1))[..., G:])
        return [out for view in slices for out in group_quant(view, G)]

    module, x = Function(function), integers(5, HIDDEN)
    compiled = lowering.compile(module, (x,))
    assert compiled.report.summary() == {"fused": 5, "unfused": 0, "dispatches": 1}
    for got, expected in zip(lowering.load(compiled.vmfb)(x), module(x), strict=True):
        assert got.shape == expected.shape and torch.equal(got.float(), expected.float())


def test_column_scales_that_nobody_sees_follow_every_view() -> None:
    """A layout says how a scale lies in memory; inside the program only its values matter."""

    def function(w: Tensor, x: Tensor) -> Tensor:
        y = rms_norm(x, w, 1e-6)
        outs = []
        for view in (y[1:], y.unflatten(-1, (2, 128)), y.unsqueeze(1).expand(-1, 2, -1)):
            q, scale = group_quant(view, G, scale_layout="column_tma")
            outs.append((q.float().unflatten(-1, (-1, G)) * scale.unsqueeze(-1)).flatten())
        return torch.cat(outs)

    module, x = Function(function), integers(5, HIDDEN)
    compiled = lowering.compile(module, (x,))
    assert compiled.report.summary() == {"fused": 4, "unfused": 0, "dispatches": 1}
    assert torch.equal(lowering.load(compiled.vmfb)(x), module(x))


def test_packed_scales_follow_what_keeps_their_rows_and_say_so_where_they_cannot() -> None:
    def function(w: Tensor, x: Tensor) -> list[Tensor]:
        y = rms_norm(x, w, 1e-6)
        packed = {"scale": "ue8m0", "scale_layout": "ue8m0_packed"}
        views = (y, y.flatten(0, 1).unsqueeze(0), y.unflatten(-1, (2, 128)))
        return [out for view in views for out in group_quant(view, G, **packed)]

    module, x = Function(function), integers(2, 3, HIDDEN)
    compiled = lowering.compile(module, (x,))
    norm, same, flat, split = compiled.report.sites
    assert [site.pattern for site in (norm, same, flat)] == ["norm_quant"] * 3
    assert "a ue8m0_packed scale layout cannot follow" in (split.reason or "")
    for got, expected in zip(lowering.load(compiled.vmfb)(x), module(x), strict=True):
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
        assert torch.equal(got.float(), expected.float())


def test_the_kernels_of_a_target_do_not_change_what_survives() -> None:
    chains = [chain(n, (3, 5, HIDDEN), dynamic=False) for n in range(10)]
    x = torch.zeros(3, 5, HIDDEN, dtype=torch.bfloat16)
    any_kernel = sites(quantized(chains), x)
    cpu = sites(quantized(chains), x, support=supported(resolve("cpu")))
    assert [r.pattern for r in cpu.records] == [r.pattern for r in any_kernel.records]
