"""Say of a model that cannot be exported or imported what is wrong, where in the model, and the way out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..errors import CompileError
from .parameters import is_storable

_PACKAGES = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent.parent}/")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s*([^\n]*))?')
_NOISE = re.compile(r"\s*For more information, run with TORCH_LOGS=\S*|\s*You can suppress this .*")

# What torch.export says, and what it means for the user of a model.
_ADVICE = (
    (
        r"transformers\.cache_utils|applied to DynamicCache containing only",
        "of caches a program takes and returns DynamicCache with plain layers, and this model has another: "
        'keep what you need of its result (output="logits"), set model.config.use_cache = False, or wrap the '
        "model so that the cache's tensors are arguments and results",
    ),
    (
        r"expected compiled_fn to be GraphModule",
        "the model writes to a buffer whose memory is also another buffer's or parameter's, and PyTorch "
        "cannot take that apart: register one of them, and view it where the other is used",
    ),
)
_FIXED = (
    "the model's own code decides by these sizes, or loops over them: compile it with them fixed, a program "
    "for each size (leave them out of dynamic_shapes), or write the loop as torch.while_loop"
)
_FIXES_SIZES = re.compile(r"Constraints violated|Specializations unexpectedly required")
_LOOP = re.compile(r":\d+: (for|while)\b")
# torch's spelling of the size of an argument, and of what is asked of it.
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_RELATION = re.compile(r"(Eq|Ne)\(([^,()]*(?:\(\d+\))?), ([^,()]*(?:\(\d+\))?)\)")
_LINES, _WIDTH = 8, 200
_NO_TYPE = (torch.uint16, torch.uint32, torch.uint64)
_INSTEAD = {
    "cond": "compute both branches and choose with torch.where",
    "scan": "write the loop in Python, which unrolls it, or as torch.while_loop",
    "associative_scan": "write the loop in Python, which unrolls it",
    "map_impl": "write the loop in Python, which unrolls it, or use torch.vmap",
}


def not_exported(module: torch.nn.Module, error: Exception) -> CompileError:
    """torch.export's own words, with the fixes that it suggests, and the line that it was at."""
    return CompileError(f"torch.export rejected {type(module).__name__}: {_told(error)}")


def open_topk(node: torch.fx.Node) -> CompileError:
    """A top-k that torch.export takes at no open size, and that would not be eager's among equals."""
    return CompileError(
        f"{model_line(node)}{node.target} is along an axis of open size, and a compiled program would choose "
        "others of equal elements than eager PyTorch does: compile the model with that size fixed, a program "
        "for each size (leave it out of dynamic_shapes)"
    )


def not_decomposed(error: Exception) -> CompileError:
    """The same where torch takes the operations of an exported program apart."""
    return CompileError(f"torch.export could not decompose the exported program: {_told(error)}")


def not_read(error: Exception) -> CompileError:
    """The importer's words without what it prints of a node, and the line of the model that this names."""
    said, _, of_node = str(error).partition(", {'stack_trace'")
    lines = [line for line in _FRAME.findall(of_node.replace("\\n", "\n")) if _is_theirs(line[0])]
    where = "".join(f"\n  {file}:{line}: {code}" for file, line, code in lines[-1:])
    return CompileError(f"the exported program cannot be imported: {type(error).__name__}: {said}{where}")


def _told(error: Exception) -> str:
    fixes_sizes = _FIXES_SIZES.search(str(error)) is not None
    where = list(dict.fromkeys(filter(None, [_line_of(error), *_guards(error)])))
    advice = [text for pattern, text in _ADVICE if re.search(pattern, str(error))]
    summary, loops = _summary(error), [line for line in where if _LOOP.search(line)]
    if fixes_sizes and loops:
        # What follows a loop over a size has that size too, and what torch suggests is that of the example.
        summary, where = summary[:1], loops
    lines = [*(advice or summary), *where[:_LINES]]
    if fixes_sizes:
        lines.append(_FIXED)
    return f"{type(error).__name__}: " + "\n  ".join(lines)


def _summary(error: Exception) -> list[str]:
    """The first paragraph, and that of the suggested fixes."""
    paragraphs = [text for text in re.split(r"\n\s*\n", str(error)) if text.strip()]
    kept = paragraphs[:1] + [text for text in paragraphs[1:] if text.lstrip().startswith("Suggested fix")]
    lines = [_NOISE.sub("", line).rstrip() for text in kept for line in text.splitlines()]
    shortened = [line if len(line) <= _WIDTH else f"{line[:_WIDTH]} ..." for line in lines if line.strip()]
    return shortened[:_LINES] or ["it gave no reason"]


def _line_of(error: BaseException) -> str:
    """The line of the model that the tracer was at, from the error's own words or its traceback."""
    frames = _FRAME.findall(str(error))
    frames += [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    return next((f"{file}:{line}: {code}" for file, line, code in reversed(frames) if _is_theirs(file)), "")


def _is_theirs(file: str) -> bool:
    return not (
        file.startswith(_PACKAGES) or file.startswith("<") or file.endswith("/torch/fx/graph_module.py")
    )


def _guards(error: BaseException) -> Iterator[str]:
    """The lines of the model whose operations bound the sizes that ``error`` is about.

    torch names the sizes alone.  Which function of its own asked for each bound is known where the error was
    raised, and the operations that were traced, each with its line, a few frames above.
    """
    graph = _local(error, "gm", torch.fx.GraphModule)
    environment = _local(error.__context__, "self", ShapeEnv)
    if graph is None or environment is None:
        return
    sizes = {symbol: _name(sources[0]) for symbol, sources in environment.var_to_sources.items() if sources}
    names = {str(symbol): name for symbol, name in sizes.items()}
    # An error about a size that has one value does not name it.
    concerned = {symbol for symbol, name in sizes.items() if name in str(error)} or set(sizes)
    for guard in environment.guards:
        if concerned.isdisjoint(guard.expr.free_symbols):
            continue
        asking = getattr(guard.sloc.framework_loc, "name", "")
        needed = _spelled(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(guard.expr)))
        asked = guard.sloc.framework_loc
        if asked is not None and _is_theirs(asked.filename):
            # A loop over a size, an index or a branch of the model itself.
            yield f"{asked.filename}:{asked.lineno}: {asked.line or asked.name} needs {needed}"
        for node in graph.graph.nodes:
            if isinstance(node.target, OpOverload) and _asks(node.target, asking):
                yield f"{model_line(node)}{node.target} needs {needed}"


def _spelled(needed: str) -> str:
    """``Eq(L['ids'].size()[1], 9)`` as ``ids.size(1) == 9``."""
    sizes = _SIZE.sub(r"\1.size(\2)", needed)
    relations = {"Eq": "==", "Ne": "!="}
    return _RELATION.sub(lambda found: f"{found[2]} {relations[found[1]]} {found[3]}", sizes)[:_WIDTH]


def _name(source: Any) -> str:
    return str(source.name() if callable(source.name) else source.name)


def _asks(op: OpOverload, function: str) -> bool:
    """Tell whether a function of torch's own, such as ``meta_topk``, is about ``op``."""
    base = op.name().partition("::")[2].partition(".")[0]
    return re.search(rf"(?<![a-zA-Z]){base}(?![a-zA-Z])", function) is not None


def _local(error: BaseException | None, name: str, type_: type) -> Any:
    """The innermost variable ``name`` of that type where ``error`` passed."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)] if error is not None else []
    found = [frame.f_locals[name] for frame in frames if isinstance(frame.f_locals.get(name), type_)]
    return found[-1] if found else None


# -- an exported program ---------------------------------------------------------------------------------


def model_line(node: torch.fx.Node) -> str:
    """``file:line: `` of the model that ``node`` comes from; for an argument, where it is used first."""
    for candidate in (node, *node.users):
        for file, line, _ in reversed(_FRAME.findall(candidate.meta.get("stack_trace") or "")):
            if _is_theirs(file):
                return f"{file}:{line}: "
    return ""


def check(exported: torch.export.ExportedProgram, importable: Callable[[str], bool]) -> None:
    """Refuse what cannot be imported.  importable: tells whether an operator of higher order is."""
    _check_effects(exported)
    for node in exported.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            name = node.target.name()
            if not importable(name):
                instead = _INSTEAD.get(name, "write it with plain operations")
                raise CompileError(f"{model_line(node)}torch's {name} cannot be compiled: {instead}")
    _check_inputs(exported)
    _check_types(exported)


def _check_types(exported: torch.export.ExportedProgram) -> None:
    """Refuse tensors that the torch dialect has no type for."""
    for node in exported.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if not isinstance(value, torch.Tensor):
                continue
            what = value.dtype if value.dtype in _NO_TYPE else value.layout
            if what is not torch.strided:
                raise CompileError(
                    f"{model_line(node)}{node.target} makes a tensor of {what}, which cannot be compiled; "
                    "compute with a dense tensor of another dtype"
                )


def _check_effects(exported: torch.export.ExportedProgram) -> None:
    """Refuse operations that do something beside computing their results, as checking or printing."""
    for node in exported.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.higher_order.with_effects:
            about = next((n for n in node.all_input_nodes if n.op == "call_function"), node)
            while about.all_input_nodes and "getitem" in str(about.target):
                about = about.all_input_nodes[0]
            of = "" if about is node else f", which belongs to {about.target},"
            raise CompileError(
                f"{model_line(node)}{node.args[1]}{of} cannot be compiled: it checks or prints while it "
                "runs; compute this outside of the model, or with operations that do not check their operands"
            )


def _check_inputs(exported: torch.export.ExportedProgram) -> None:
    nodes = {node.name: node for node in exported.graph.nodes}
    for spec in exported.graph_signature.input_specs:
        node = nodes.get(getattr(spec.arg, "name", ""))
        value = node.meta.get("val") if node is not None else None
        if node is None:
            continue
        dtype = value.dtype if isinstance(value, torch.Tensor) else None
        if spec.kind != InputKind.USER_INPUT and dtype is not None and not is_storable(dtype):
            instead = "torch.view_as_real of it" if dtype.is_complex else "it in a dtype that can be"
            raise CompileError(
                f"{model_line(node)}the parameter {spec.target} is {dtype}, which cannot be compiled; "
                f"keep {instead} and compute with that"
            )


def not_imported(node: torch.fx.Node, error: Exception) -> CompileError:
    """An operation that the torch dialect has no form of, or not for these operands."""
    said = (str(error) or type(error).__name__).splitlines()[0][:300]
    return CompileError(
        f"{model_line(node)}{node.target} cannot be compiled: {said}; write it with other operations"
    )
