"""Takes away from a graph what it fails the same way without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .graph import SIZES, Graph, Step, renamed

Fails = Callable[[Graph], bool]


def shrink(graph: Graph, fails: Fails, trials: int = 60) -> Graph:
    """The smallest graph found in so many ``trials`` for which ``fails`` is still true."""
    while trials > 0:
        for smaller in _smaller(graph):
            trials -= 1
            if fails(smaller):
                graph = smaller
                break
            if trials <= 0:
                return graph
        else:
            return graph
    return graph


def _smaller(graph: Graph) -> Iterator[Graph]:
    """Graphs with less in them, those with much less first."""
    seen = {graph}
    for candidate in _candidates(graph):
        candidate = candidate.live()
        if candidate not in seen and candidate.results:
            seen.add(candidate)
            yield candidate


def _candidates(graph: Graph) -> Iterator[Graph]:
    results = list(dict.fromkeys(graph.results))
    if len(graph.results) > 1:
        half = len(graph.results) // 2
        yield replace(graph, results=graph.results[:half])
        yield replace(graph, results=graph.results[half:])
        for name in results:
            yield replace(graph, results=(name,))
        for index in range(len(graph.results)):
            yield replace(graph, results=graph.results[:index] + graph.results[index + 1 :])
    for index in reversed(range(len(graph.steps))):
        yield from _without(graph, index)
    for index, step in enumerate(graph.steps):
        for shorter in _shorter(step):
            yield replace(graph, steps=(*graph.steps[:index], shorter, *graph.steps[index + 1 :]))
    yield from _plainer_arguments(graph)


def _without(graph: Graph, index: int) -> Iterator[Graph]:
    """The graph without a step, what it read in place of what it made."""
    step, rest = graph.steps[index], graph.steps[index + 1 :]
    for name in sorted(name for name in step.reads if not name.startswith("self.")):
        names = dict.fromkeys(step.outs, name)
        later = tuple(replace(s, code=renamed(s.code, names)) for s in rest)
        results = tuple(names.get(result, result) for result in graph.results)
        yield replace(graph, steps=(*graph.steps[:index], *later), results=results)


def _shorter(step: Step) -> Iterator[Step]:
    """The step without one of its lines, where that is not all of it."""
    lines = step.code.splitlines()
    for index in range(len(lines)):
        if len(lines) > 1:
            yield replace(step, code="\n".join(lines[:index] + lines[index + 1 :]))


def _plainer_arguments(graph: Graph) -> Iterator[Graph]:
    """Nothing dynamic; ordinary numbers."""
    sizes = dict(zip(SIZES, graph.sizes[0], strict=True))
    if any(isinstance(size, str) for a in graph.arguments for size in a.shape):
        fixed = tuple(
            replace(a, shape=tuple(sizes[n] if isinstance(n, str) else n for n in a.shape))
            for a in graph.arguments
        )
        yield replace(graph, arguments=fixed)
    for kind in ("rows", "special"):
        if any(a.kind == kind for a in graph.arguments):
            plain = (replace(a, kind="normal" if a.kind == kind else a.kind) for a in graph.arguments)
            yield replace(graph, arguments=tuple(plain))
