"""The child process: makes graphs, compiles them, judges them; a line of JSON in, a line of JSON out.

It handles many modules, so that importing is paid once, and may die at any of them: the parent knows which.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import lowering
from fuzzing import judge
from fuzzing.grammar import graph_of
from fuzzing.graph import Graph, source

# The one verdict that holds for each of several graphs in one module.
RIGHT = "right"
Verdict = tuple[str, str]


def verdict_of(graphs: Sequence[Graph], target: str = "cpu") -> Verdict:
    """What becomes of the module of all ``graphs``, and a sentence on what is not right."""
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
            return "invalid", f"{type(error).__name__}: {error}"
        try:
            compiled = lowering.compile(module, args, dynamic_shapes=shapes, target=target)
        except lowering.LoweringError as error:
            return "refused", str(error)
        except Exception as error:
            return "raw", f"{type(error).__name__}: {error} {_where(error)}"
        missing = _missing(graphs, places, compiled.report, path)
        if missing:
            return "sites", missing
        device = _device(compiled.target.backend)
        return (RIGHT, "") if device is None else _called(graphs, module, compiled.vmfb, built, device)


def _device(backend: str) -> str | None:
    """Where programs of ``backend`` can be run on this machine; None: they are compiled only."""
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


def _missing(graphs: Sequence[Graph], places: list[list[range]], report: Any, path: Path) -> str:
    """A site that was put in and is not in the report, or one there without a reason."""
    found = []
    for site in report.sites:
        file, _, line = site.location.rpartition(":")
        if line.isdigit() and Path(file).name == path.name:
            found.append((site.op, int(line)))
        if not site.fused and not site.reason:
            return f"no reason at {site.location}"
    for graph, of_steps in zip(graphs, places, strict=True):
        for step, lines in zip(graph.steps, of_steps, strict=True):
            for op in step.sites:
                here = next((entry for entry in found if entry[0] == op and entry[1] in lines), None)
                if here is None:
                    return f"no {op} in the report of: {step.code}"
                found.remove(here)
    return ""


def _called(
    graphs: Sequence[Graph], module: torch.nn.Module, vmfb: bytes, built: Any, device: str
) -> Verdict:
    """Both calls; eager PyTorch computes on the cpu, whatever the device."""
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    try:
        program = lowering.load(vmfb)
    except lowering.LoweringError as error:
        return "late", f"load: {error}"
    strided = [
        bool((step := _made_by(g, name)) and name in step.strided) for g in graphs for name in g.results
    ]
    for call in range(len(graphs[0].sizes)):
        args = built.arguments(call)
        reference = judge.Reference(copy.deepcopy(module), args)
        args = _moved(args, device)
        try:
            results = program(*args)
        except lowering.LoweringError as error:
            return "late", f"call {call + 1}: {error}"
        except Exception as error:
            return "raw", f"call {call + 1}: {type(error).__name__}: {error} {_where(error)}"
        verdict = _judged(results, reference, strided, call)
        if verdict is not None:
            return verdict
        if not all(judge.same(a.cpu(), b) for a, b in zip(args, reference.args, strict=True)):
            return "changed", f"call {call + 1}: an argument was written"
    if not all(judge.same(p.detach(), weights[name]) for name, p in module.named_parameters()):
        return "changed", "a weight was written"
    return RIGHT, ""


def _moved(args: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """The arguments on ``device``; a tensor that is given twice is still one."""
    made: dict[int, torch.Tensor] = {}
    return [made.setdefault(id(a), a.to(device)) for a in args]


def _made_by(graph: Graph, name: str) -> Any:
    return next((step for step in graph.steps if name in step.outs), None)


def _judged(results: Any, reference: judge.Reference, strided: list[bool], call: int) -> Verdict | None:
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    if len(results) != len(reference.results):
        return "wrong", f"{len(results)} results for {len(reference.results)}"
    for index, (ours, eager) in enumerate(zip(results, reference.results, strict=True)):
        problem = reference.problem(index, ours.cpu())
        if problem is not None:
            return "wrong", f"call {call + 1}, result {index}: {problem}"
        problem = judge.strides_problem(ours, eager, strided=strided[index])
        if problem is not None:
            return "strides", f"call {call + 1}, result {index}: {problem}"
    return None


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What a job gives: graphs are seeds, or whole."""
    if "seeds" in job:
        graphs = [graph_of(seed, special=job["special"]) for seed in job["seeds"]]
    else:
        graphs = [Graph.from_dict(graph) for graph in job["graphs"]]
    if job.get("generate"):
        return {"graphs": [graph.to_dict() for graph in graphs]}
    verdict, why = verdict_of(graphs, job.get("target", "cpu"))
    return {"verdict": verdict, "why": why, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main() -> None:
    """Answer jobs until there are no more."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr  # what compilers print is no answer
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
