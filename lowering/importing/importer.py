"""Step 1, import: make torch-dialect MLIR of a torch module, with its weights left outside.

torch.export traces the module, torch-mlir's FX importer turns the graph into MLIR
(``torch_dialect``).  Parameters, buffers and constant tensors become
``util.global`` ops that name an entry of a parameter archive, so no weight is ever copied
into the IR.  Nothing here knows about fusion or targets.
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from iree.compiler import ir
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from patterns.contracts import ScaleLayout
from patterns.sites import Remark

from .. import containers
from .. import ops as _ops  # noqa: F401  registers torch.ops.lowering.*
from ..checkpoints.adopt import adopted
from ..errors import CompileError, LoweringError, ToolchainError
from ..report.sites import Folded
from ..signature import (
    Constant,
    Integer,
    Leaf,
    Parameters,
    Signature,
    TensorSpec,
    evaluate,
    host_arch,
    sizes_of,
)
from ..targets import Target
from ..weights.recipes import Recipe
from . import checkpoints, python_numbers, refusals, single_sizes
from .conditions import conditions, forget_multiples
from .decompositions import decompositions
from .exporting import drop_assertions, export
from .foreign import functionalize
from .held_caches import as_buffers
from .mutations import Mutations, explicit, kept, state_specs
from .naming import Names
from .results import chosen, returning, row_major, without_containers
from .sizes import Call
from .sources import Source

# The release whose torch dialect IREE 3.13 reads; pyproject.toml has the same.
TORCH_MLIR = "20261001"

# Kept whole so that recognisers and IREE's own lowerings see them; every other operation goes
# through PyTorch's core decompositions, which is what the torch dialect is tested with.
_KEPT = (
    torch.ops.aten.rms_norm,
    torch.ops.aten.linear,
    torch.ops.aten.silu,
    torch.ops.aten.gelu,
    torch.ops.aten.scaled_dot_product_attention,
)


@dataclass
class Program:
    """An imported model: its IR, the tensors its globals name, and how it is called.

    It is one function of a program, called ``name``.
    """

    module: ir.Module
    parameters: dict[str, torch.Tensor | Recipe]
    name: str = "main"
    inputs: tuple[Leaf, ...] | None = None
    outputs: tuple[Leaf, ...] | None = None
    input_tree: str | None = None
    output_tree: str | None = None
    conditions: tuple[str, ...] = ()
    row_major: frozenset[int] = frozenset()  # the numbers of results that are returned so
    mutations: Mutations = field(default_factory=Mutations)
    folded: tuple[Folded, ...] = ()
    remarks: tuple[Remark, ...] = ()

    @property
    def context(self) -> ir.Context:
        return self.module.context

    def main(self) -> ir.Operation:
        """The function that is compiled and called: that of its name, or the only public one."""
        functions = [op.operation for op in self.module.body if op.operation.name == "func.func"]
        public = [f for f in functions if "sym_visibility" not in f.attributes]
        named = [f for f in public if ir.StringAttr(f.attributes["sym_name"]).value == self.name]
        if not (named or public):
            raise CompileError("the module has no public function")
        return (named or public)[0]

    def mark_strides(self, layouts: Mapping[int, ScaleLayout]) -> None:
        """Results that are returned as physical buffers, by number; the runtime makes them logical."""
        outputs = list(self.outputs or ())
        returned = [(place, leaf) for place, leaf in enumerate(outputs) if isinstance(leaf, TensorSpec)]
        for number, layout in layouts.items() if outputs else ():
            place, leaf = returned[number]
            outputs[place] = replace(leaf, strides=layout)
        self.outputs = tuple(outputs) if self.outputs is not None else None

    def signature(
        self, target: Target, parameters: Parameters | None, stored: tuple[str, ...] = ()
    ) -> Signature:
        return Signature(
            target=target.name,
            backend=target.backend,
            arch=target.arch if target.is_gpu else host_arch(),
            inputs=self.inputs,
            outputs=self.outputs,
            input_tree=self.input_tree,
            output_tree=self.output_tree,
            parameters=parameters,
            conditions=self.conditions,
            state=state_specs(self.mutations.state),
            stored=stored,
            written=self.mutations.written,
            checks=self.mutations.checks,
        )


# torch.export keeps what it is at in variables of its modules.
_EXPORTING = threading.RLock()


def import_module(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    context: ir.Context,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    output: containers.Names | None = None,
) -> Program:
    """Export ``module`` for ``args`` and import it into ``context``: as ``import_functions``, of one."""
    sources = {"main": Source(module, args, kwargs, dynamic_shapes)}
    return import_functions(sources, context, output=output)["main"]


def import_functions(
    sources: Mapping[str, Source], context: ir.Context, *, output: containers.Names | None = None
) -> dict[str, Program]:
    """Export each model and import it into ``context``, as a function of one program.

    An ExportedProgram is taken as it is; of a module, quantized layers of other libraries are adopted while
    it is exported.  output: the results that are kept, as ``containers.select`` has them; None: all.
    Tensors that are one in memory are one in all functions, and what one of them writes to is state of all.
    Raises CompileError with torch.export's own words when a module cannot be exported, and where two
    functions have different tensors of one name; UsageError where ``output`` names no result.  One thread at
    a time exports, the others wait.
    """
    with _EXPORTING:
        models = {name: _exported(source, output) for name, source in sources.items()}
        names = Names(tuple(sources))
        state = set().union(*(kept(model.functional) for model in models.values()))
        return {name: _import(model, context, name, names, state) for name, model in models.items()}


@dataclass(frozen=True)
class _Exported:
    """A model as torch.export has it, and as it is imported.

    asserted: conditions beside those that the program has.  inputs, outputs: the leaves of its arguments and
    of what is kept of its result, whose tree ``tree`` is.
    """

    exported: torch.export.ExportedProgram
    functional: torch.export.ExportedProgram
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    tree: pytree.TreeSpec
    asserted: tuple[str, ...]
    remarks: tuple[Remark, ...]


def _exported(source: Source, output: containers.Names | None) -> _Exported:
    module = source.module
    if isinstance(module, torch.export.ExportedProgram):
        return _made_functional(module, output, (), ())
    with adopted(module) as adopting, as_buffers(adopting), _results(adopting, output):
        exported, asserted = _export(adopting, source.args, dict(source.kwargs or {}), source.dynamic_shapes)
        return _made_functional(exported, None, asserted, checkpoints.dequantized(module))


@contextmanager
def _results(module: torch.nn.Module, output: containers.Names | None) -> Iterator[None]:
    """Make the results of a module what is asked for, in containers that torch.export knows."""

    def asked(module: torch.nn.Module, args: Any, result: Any) -> Any:
        return containers.register(result if output is None else containers.select(result, output))

    hook = module.register_forward_hook(asked)
    try:
        yield
    finally:
        hook.remove()


def _made_functional(
    exported: torch.export.ExportedProgram,
    output: containers.Names | None,
    asserted: tuple[str, ...],
    remarks: tuple[Remark, ...],
) -> _Exported:
    as_exported = exported  # what follows may lose the guards of a program that was saved
    forget_multiples(exported)
    with warnings.catch_warnings():
        # torch copies its own tree specs in a way it has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        exported = _functional(without_containers(exported))
        asserted += single_sizes.write_out(exported)
        inputs = _leaves(exported, exported.graph_signature.input_specs, InputKind.USER_INPUT)
        all_outputs = _leaves(exported, exported.graph_signature.output_specs, OutputKind.USER_OUTPUT)
        numbers, tree = chosen(as_exported.call_spec.out_spec or pytree.tree_structure(()), output)
        names = containers.leaf_names(tree)
        outputs = tuple(map(_named, (all_outputs[number] for number in numbers), names))
        _check_ints(inputs, outputs)
        drop_assertions(exported)
        exported = returning(exported, [n for n in numbers if isinstance(all_outputs[n], TensorSpec)])
    return _Exported(as_exported, exported, inputs, outputs, tree, asserted, remarks)


def _import(
    model: _Exported, context: ir.Context, name: str, names: Names, state: Collection[Hashable]
) -> Program:
    rows = row_major(model.functional)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        exported, mutations = explicit(model.functional, name, names, state)
    torch_dialect = _torch_dialect()
    refusals.check(exported, torch_dialect.importable)
    written = [item.argument for item in mutations.written]
    module, parameters = torch_dialect.import_graph(exported, context, name, names, written)
    return Program(
        module=module,
        parameters={**parameters},
        name=name,
        inputs=model.inputs,
        outputs=model.outputs,
        input_tree=_dumped(model.exported.call_spec.in_spec),
        output_tree=_dumped(model.tree),
        row_major=rows | {item.result for item in mutations.written if item.result is not None},
        mutations=mutations,
        conditions=conditions(model.exported, model.inputs, model.asserted),
        remarks=model.remarks,
    )


def _torch_dialect() -> ModuleType:
    """The half that stands on torch-mlir's wheel, loaded with the first model: `run` needs none of it."""
    install = f"pip install torch-mlir=={TORCH_MLIR}"
    try:
        installed = importlib.metadata.version("torch-mlir")
    except importlib.metadata.PackageNotFoundError:
        raise ToolchainError(
            f"models are imported with torch-mlir, which is not installed: {install}"
        ) from None
    if installed != TORCH_MLIR:
        raise ToolchainError(
            f"torch-mlir {installed} is installed, whose dialect IREE need not read: {install}"
        )
    from . import torch_dialect

    return torch_dialect


def parse_module(text: str | bytes, context: ir.Context) -> Program:
    """A Program from torch-dialect MLIR, text or bytecode; its calling convention is left unstated."""
    try:
        module = ir.Module.parse(text, context=context)
    except ir.MLIRError as error:
        raise CompileError(f"the source is not valid MLIR: {error}") from error
    return Program(module=module, parameters={})


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    try:
        args, kwargs = _distinct(containers.register((args, kwargs)))
        return python_numbers.checked(module, lambda: export(module, Call(args, kwargs), dynamic_shapes))
    except LoweringError:
        raise
    except Exception as error:  # torch.export raises whatever the model or the tracer raised
        raise refusals.not_exported(module, error) from error


def _functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    try:
        return functionalize(exported, _decompositions())
    except LoweringError:
        raise
    except Exception as error:  # what its rules raise is as various
        raise refusals.not_decomposed(error) from error


def _distinct(examples: Any) -> Any:
    """Copy a tensor that is in the tree twice: torch.export would make one argument of them."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.clone()

    return pytree.tree_map(once, examples)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = {**torch.export.default_decompositions(), **decompositions()}
    return {op: rule for op, rule in table.items() if getattr(op, "overloadpacket", None) not in _KEPT}


def _check_ints(inputs: tuple[Leaf, ...], outputs: tuple[Leaf, ...]) -> None:
    """Refuse a result that is an int and does not follow from the arguments' sizes."""
    known = {dim: 1 for leaf in inputs for dim in sizes_of(leaf) if isinstance(dim, str)}
    for leaf in outputs:
        if isinstance(leaf, Integer) and evaluate(leaf.size, known) is None:
            raise CompileError(
                f"the result {leaf.name} is an int ({leaf.size}) that does not follow from the sizes of the "
                "arguments; return it as a tensor, such as torch.tensor of it, or leave it out (output=)"
            )


def _dumped(spec: pytree.TreeSpec | None) -> str | None:
    return None if spec is None else containers.dump(spec)


def _named(leaf: Leaf, name: str) -> Leaf:
    return leaf if isinstance(leaf, Constant) else replace(leaf, name=name)


def _leaves(
    exported: torch.export.ExportedProgram, specs: Any, kind: InputKind | OutputKind
) -> tuple[Leaf, ...]:
    """The user's inputs or outputs, one entry per leaf of their tree."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    return tuple(_leaf(spec.arg, values) for spec in specs if spec.kind == kind)


def _leaf(argument: Any, values: Mapping[str, Any]) -> Leaf:
    if isinstance(argument, ConstantArgument):
        return Constant(argument.value)
    value = values.get(argument.name)
    if isinstance(value, torch.SymInt):
        return Integer(argument.name, str(value.node.expr))
    if not isinstance(value, torch.Tensor):
        raise CompileError(
            f"{argument.name} is a {type(value).__name__}; inputs and outputs are tensors and ints"
        )
    shape = tuple(dim if isinstance(dim, int) else str(dim.node.expr) for dim in value.shape)
    return TensorSpec(argument.name, str(value.dtype).removeprefix("torch."), shape)
