"""The child process: makes graphs, compiles them, judges them; a line of JSON in, a line of JSON out.

It handles many modules, so that importing is paid once, and may die at any of them: the parent knows which.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import resource
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import lowering
from tools.child import serve
from tools.fuzzing import judge
from tools.fuzzing.grammar import graph_of
from tools.fuzzing.graph import Graph, source

# The one verdict that holds for each of several graphs in one module.
RIGHT = "right"
Verdict = tuple[str, str]
# What is said of sizes that torch.export excludes: those where it would have traced something else.
_GATED = "_mul"  # ends the name of a gate
_EXCLUDED = "the model was exported for sizes with"


@dataclass
class Judgement:
    """The verdict of a module, and the numbers of the graphs that it is about, where that is known; settled:
    the others have been judged too and are right.
    """

    verdict: Verdict
    about: list[int] = field(default_factory=list)
    settled: bool = False


def verdict_of(graphs: Sequence[Graph], target: str = "cpu") -> Verdict:
    """Give what becomes of the module of all ``graphs``, and a sentence on what is not right."""
    return judgement_of(graphs, target).verdict


def judgement_of(graphs: Sequence[Graph], target: str = "cpu") -> Judgement:
    """The same, with what is known of each graph."""
    text, places = source(graphs)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graphs.py"
        path.write_text(text)
        built = _import(path)
        try:
            module, args, shapes = built.build()
            with torch.no_grad():
                module(*args)
        except Exception as error:
            return Judgement(("invalid", f"{type(error).__name__}: {error}"))
        try:
            compiled = lowering.compile(module, args, dynamic_shapes=shapes, target=target)
        except lowering.LoweringError as error:
            return _refused(graphs, places, str(error))
        except Exception as error:
            return Judgement(("raw", f"{type(error).__name__}: {error} {_where(error)}"))
        found = _missing(graphs, places, compiled.report, path)
        device = _device(compiled.target.backend)
        if device is not None:
            try:
                for number, verdict in _called(graphs, module, compiled.vmfb, built, device):
                    found.setdefault(number, verdict)
            except _Failed as failed:
                return Judgement(
                    failed.verdict, [n for n in range(len(graphs)) if f"g{n}_" in failed.verdict[1]]
                )
        return Judgement(next(iter(found.values()), (RIGHT, "")), sorted(found), settled=True)


class _Failed(Exception):
    """A call that gave no results."""

    def __init__(self, verdict: str, why: str) -> None:
        super().__init__(why)
        self.verdict: Verdict = verdict, why


def _refused(graphs: Sequence[Graph], places: list[list[range]], why: str) -> Judgement:
    """It is about those of several that torch.export does not take alone, or whose lines ``why`` names."""
    about: list[int] = []
    if len(graphs) > 1 and why.startswith("torch.export rejected"):
        about = [number for number, graph in enumerate(graphs) if not _exports(graph)]
    lines = {int(line) for line in re.findall(r"graphs[.]py:(\d+)", why)}
    named = [number for number, of_steps in enumerate(places) if any(lines & set(step) for step in of_steps)]
    return Judgement(("refused", why), about or named)


def _exports(graph: Graph) -> bool:
    names: dict[str, Any] = {}
    exec(source([graph])[0], names)
    module, args, shapes = names["build"]()
    try:
        torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    except Exception:  # whatever the tracer raises
        return False
    return True


def _device(backend: str) -> str | None:
    """Tell where programs of ``backend`` can be run on this machine; None: they are compiled only."""
    there = backend == "cpu" or (backend == "cuda" and torch.cuda.is_available())
    return backend if there else None


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.name})"


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("graphs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _missing(
    graphs: Sequence[Graph], places: list[list[range]], report: Any, path: Path
) -> dict[int, Verdict]:
    """By graph, a site that was put in and is not in the report, or one there without a reason."""
    sites: list[tuple[str, int]] = []
    missing: dict[int, Verdict] = {}
    for site in report.sites:
        file, _, line = site.location.rpartition(":")
        ours = line.isdigit() and Path(file).name == path.name
        if ours:
            sites.append((site.op, int(line)))
        if not site.fused and not site.reason:
            of = (n for n, steps in enumerate(places) if ours and any(int(line) in step for step in steps))
            missing.setdefault(next(of, 0), ("sites", f"no reason at {site.location}"))
    for number, (graph, of_steps) in enumerate(zip(graphs, places, strict=True)):
        for step, lines in zip(graph.steps, of_steps, strict=True):
            for op in step.sites:
                here = next((entry for entry in sites if _names(entry[0], op) and entry[1] in lines), None)
                if here is not None:
                    sites.remove(here)
                else:
                    missing.setdefault(number, ("sites", f"no {op} in the report of: {step.code}"))
    return missing


def _names(reported: str, op: str) -> bool:
    """Tell whether a site is that of ``op``; of the product of two activations either is the gate."""
    return reported == op or (reported.endswith(_GATED) and op.endswith(_GATED))


def _called(
    graphs: Sequence[Graph], module: torch.nn.Module, vmfb: bytes, built: Any, device: str
) -> Iterator[tuple[int, Verdict]]:
    """Give what is not right of both calls, with the number of its graph; eager PyTorch computes on the cpu,
    whatever the device.  Raises _Failed where a call gives no results.
    """
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    try:
        program = lowering.load(vmfb)
    except lowering.LoweringError as error:
        raise _Failed("late", f"load: {error}") from error
    for call in range(len(graphs[0].sizes)):
        args = built.arguments(call)
        reference = judge.Reference(copy.deepcopy(module), args)
        args = _moved(args, device)
        try:
            results = program(*args)
        except lowering.LoweringError as error:
            verdict = "refused" if _EXCLUDED in str(error) else "late"
            raise _Failed(verdict, f"call {call + 1}: {error}") from error
        except Exception as error:
            raise _Failed(
                "raw", f"call {call + 1}: {type(error).__name__}: {error} {_where(error)}"
            ) from error
        yield from _judged(graphs, results, reference, call)
        owners = [number for number, graph in enumerate(graphs) for _ in graph.arguments]
        for number, ours, eager in zip(owners, args, reference.args, strict=True):
            if not judge.same(ours.cpu(), eager):
                yield number, ("changed", f"call {call + 1}: an argument was written")
    for name, p in module.named_parameters():
        if not judge.same(p.detach(), weights[name]):
            owner = re.match(r"m(\d+)[.]", name)
            yield int(owner[1]) if owner else 0, ("changed", "a weight was written")


def _moved(args: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """The arguments on ``device``; a tensor that is given twice is still one."""
    made: dict[int, torch.Tensor] = {}
    return [made.setdefault(id(a), a.to(device)) for a in args]


def _made_by(graph: Graph, name: str) -> Any:
    return next((step for step in graph.steps if name in step.outs), None)


def _judged(
    graphs: Sequence[Graph], results: Any, reference: judge.Reference, call: int
) -> Iterator[tuple[int, Verdict]]:
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    if len(results) != len(reference.results):
        raise _Failed("wrong", f"{len(results)} results for {len(reference.results)}")
    owners = [(number, name) for number, graph in enumerate(graphs) for name in graph.results]
    pairs = zip(owners, results, reference.results, strict=True)
    for index, ((number, name), ours, eager) in enumerate(pairs):
        verdict, problem = "wrong", reference.problem(index, ours.cpu())
        if problem is None:
            step = _made_by(graphs[number], name)
            strided = step is not None and name in step.strided
            verdict, problem = "strides", judge.strides_problem(ours, eager, strided=strided)
        if problem is not None:
            yield number, (verdict, f"call {call + 1}, result {index}: {problem}")


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Give what a job gives: graphs are seeds, or whole."""
    if "seeds" in job:
        graphs = [graph_of(seed, special=job["special"]) for seed in job["seeds"]]
    else:
        graphs = [Graph.from_dict(graph) for graph in job["graphs"]]
    if job.get("generate"):
        return {"graphs": [graph.to_dict() for graph in graphs]}
    found = judgement_of(graphs, job.get("target", "cpu"))
    return {**asdict(found), "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(answer)
