"""A graph as data: arguments, weights and steps of source text; and the Python file that it is.

Nothing here needs torch, so that the parent of the workers can shrink graphs without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Shape = tuple[int | str, ...]  # an axis is a size, or the name of a dynamic one
SIZES: tuple[str, ...] = ("T", "S")
_NAME = re.compile(r"\b[av]\d+\b|\bself\.w\d+\b")


@dataclass(frozen=True)
class Tensor:
    """An argument or a weight: how ``make`` draws it; ``same`` names the argument that it is, instead."""

    name: str
    shape: Shape
    dtype: str
    kind: str
    seed: int
    same: str | None = None

    def source(self) -> str:
        """The expression that makes it."""
        shape = ", ".join(map(str, self.shape)) + ("," if len(self.shape) == 1 else "")
        return self.same or f'make("{self.kind}", {self.seed}, ({shape}), torch.{self.dtype})'


@dataclass(frozen=True)
class Step:
    """Lines of source that compute ``outs``, and the canonical operations that a report must find there.

    strided: outs whose strides must be eager's although they are not contiguous.
    """

    code: str
    outs: tuple[str, ...]
    sites: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Step:
        """The step of which ``asdict`` made this."""
        return cls(data["code"], *(tuple(data[key]) for key in ("outs", "sites", "strided")))

    @property
    def reads(self) -> set[str]:
        """The arguments, weights and values that it reads."""
        return set(_NAME.findall(self.code)) - set(self.outs)


@dataclass(frozen=True)
class Graph:
    """A module's forward; ``sizes``: what ``SIZES`` are at each call, first those it is exported with."""

    seed: int
    special: bool
    sizes: tuple[tuple[int, ...], ...]
    arguments: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    results: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Graph:
        """The graph of which ``to_dict`` made this."""
        tensors = {
            key: tuple(Tensor(**{**t, "shape": tuple(t["shape"])}) for t in data[key])
            for key in ("arguments", "weights")
        }
        steps = tuple(map(Step.from_dict, data["steps"]))
        lists = {"sizes": tuple(map(tuple, data["sizes"])), "results": tuple(data["results"]), "steps": steps}
        return cls(**{**data, **tensors, **lists})

    def to_dict(self) -> dict[str, Any]:
        """The graph as plain values."""
        return asdict(self)

    def live(self) -> Graph:
        """The graph without steps, weights and arguments that no result needs."""
        needed, steps = set(self.results), []
        for step in reversed(self.steps):
            if needed & set(step.outs):
                needed |= step.reads
                steps.append(step)
        arguments = tuple(a for a in self.arguments if a.name in needed)
        held = {a.name for a in arguments}
        arguments = tuple(replace(a, same=a.same if a.same in held else None) for a in arguments)
        weights = tuple(w for w in self.weights if w.name in needed)
        return replace(self, arguments=arguments, weights=weights, steps=tuple(reversed(steps)))


HEADER = """
import torch
from torch.nn import functional as F

import lowering


def make(kind, seed, shape, dtype):
    g = torch.Generator().manual_seed(seed)
    if kind.startswith("below "):
        return torch.randint(0, int(kind[6:]), shape, generator=g).to(dtype)
    if kind == "integers":
        return torch.randint(0 if dtype == torch.uint8 else -100, 100, shape, generator=g).to(dtype)
    x = torch.randn(shape, generator=g)
    if kind == "weight":
        x = 1 + x / 4
    if kind == "rows":  # each of another magnitude
        x = x * torch.exp2(torch.randint(-4, 5, (*shape[:-1], 1), generator=g))
    if kind == "special":
        values = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-30, 3e38, -6e4, 1e-7]
        some = torch.tensor(values)[torch.randint(0, len(values), shape, generator=g)]
        few = torch.rand((*shape[:-1], 1), generator=g) < 0.5
        x = torch.where((torch.rand(shape, generator=g) < 0.03) & few, some, x)
    return x.to(dtype)
"""


def source(graphs: Sequence[Graph], comment: str = "") -> tuple[str, list[list[range]]]:
    """A file whose ``build`` returns one module of all ``graphs``; and the lines of each one's steps."""
    lines = [*([f'"""{comment}"""'] if comment else []), *HEADER.splitlines()]
    places: list[list[range]] = []
    for number, graph in enumerate(graphs):
        places.append(_module(lines, f"M{number}", graph))
    names = [f"M{number}()" for number in range(len(graphs))]
    if len(graphs) > 1:
        _all(lines, graphs)
        names = ["All()"]
    _build(lines, graphs, names[0])
    return "\n".join(lines) + "\n", places


def _module(lines: list[str], name: str, graph: Graph) -> list[range]:
    """Add the class of ``graph``; the numbers, from 1, of the lines of each step."""
    lines += ["", "", f"class {name}(torch.nn.Module):"]
    if graph.weights:
        lines += ["    def __init__(self):", "        super().__init__()"]
        lines += [f"        {w.name} = torch.nn.Parameter({w.source()}, False)" for w in graph.weights]
        lines.append("")
    lines.append(f"    def forward({', '.join(['self', *(a.name for a in graph.arguments)])}):")
    places = []
    for step in graph.steps:
        code = [f"        {line}" for line in step.code.splitlines()]
        places.append(range(len(lines) + 1, len(lines) + 1 + len(code)))
        lines += code
    lines.append(f"        return ({', '.join(graph.results)},)")
    return places


def _all(lines: list[str], graphs: Sequence[Graph]) -> None:
    lines += ["", "", "class All(torch.nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        self.m{n} = M{n}()" for n in range(len(graphs))]
    names = [[f"g{n}_{a.name}" for a in graph.arguments] for n, graph in enumerate(graphs)]
    lines += ["", f"    def forward({', '.join(['self', *(name for of in names for name in of)])}):"]
    lines += [f"        r{n} = self.m{n}({', '.join(of)})" for n, of in enumerate(names)]
    lines.append(f"        return ({', '.join(f'*r{n}' for n in range(len(graphs)))},)")


def _build(lines: list[str], graphs: Sequence[Graph], module: str) -> None:
    lines += ["", "", "def arguments(call=0):"]
    for n, graph in enumerate(graphs):
        lines.append(f"    {', '.join(SIZES)} = {graph.sizes}[call]")
        lines += [f"    g{n}_{a.name} = {_renamed(a, n)}" for a in graph.arguments]
    names = [f"g{n}_{a.name}" for n, graph in enumerate(graphs) for a in graph.arguments]
    lines += [f"    return ({''.join(f'{name}, ' for name in names)})", "", "", "def build():"]
    shapes = [_axes(a.shape, n) for n, graph in enumerate(graphs) for a in graph.arguments]
    dims = sorted({dim for shape in shapes for dim in shape.values()})
    least = {
        f"{size}{n}": min(sizes)
        for n, graph in enumerate(graphs)
        for size, *sizes in zip(SIZES, *graph.sizes, strict=True)
    }
    lines += [f'    {dim} = torch.export.Dim("{dim}", min={least[dim]})' for dim in dims]
    written = [f"{{{', '.join(f'{axis}: {dim}' for axis, dim in shape.items())}}}, " for shape in shapes]
    dynamic = f"({''.join(written)})" if dims else "None"
    lines.append(f"    return {module}, arguments(), {dynamic}")


def _renamed(argument: Tensor, number: int) -> str:
    return f"g{number}_{argument.same}" if argument.same else argument.source()


def _axes(shape: Shape, number: int) -> dict[int, str]:
    return {axis: f"{size}{number}" for axis, size in enumerate(shape) if isinstance(size, str)}


def renamed(code: str, names: dict[str, str]) -> str:
    """``code`` with the values in ``names`` called otherwise."""
    return _NAME.sub(lambda found: names.get(found[0], found[0]), code)
