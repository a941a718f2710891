"""Step 1, import: make torch-dialect MLIR of a torch module, with its weights left outside.

torch.export traces the module, the FX importer that ships with the IREE compiler
(torch-mlir's) turns the graph into MLIR.  Parameters, buffers and constant tensors become
``util.global`` ops that name an entry of a parameter archive, so no weight is ever copied
into the IR.  Nothing here knows about fusion or targets.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from iree.compiler import ir
from iree.compiler.dialects import func, util
from iree.compiler.extras.fx_importer import FxImporter, FxImporterHooks, GraphNodeImporter
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from patterns import torch_ir
from patterns.contracts import ScaleLayout
from patterns.sites import Remark

from .. import ops as _ops  # noqa: F401  registers torch.ops.lowering.*
from ..checkpoints.adopt import adopted
from ..errors import CompileError, LoweringError
from ..report.sites import Folded
from ..signature import PARAMETER_SCOPE, Constant, Leaf, Parameters, Signature, TensorSpec, host_arch
from ..targets import Target
from ..weights.recipes import Recipe
from . import checkpoints, refusals
from .conditions import conditions, forget_multiples
from .decompositions import decompositions
from .foreign import functionalize

# Kept whole so that recognisers and IREE's own lowerings see them; every other operation goes
# through PyTorch's core decompositions, which is what the torch dialect is tested with.
_KEPT = (
    torch.ops.aten.rms_norm,
    torch.ops.aten.linear,
    torch.ops.aten.silu,
    torch.ops.aten.gelu,
    torch.ops.aten.scaled_dot_product_attention,
)

_MLIR_DTYPES: dict[torch.dtype, Callable[[], ir.Type]] = {
    torch.float64: ir.F64Type.get,
    torch.float32: ir.F32Type.get,
    torch.float16: ir.F16Type.get,
    torch.bfloat16: ir.BF16Type.get,
    torch.float8_e4m3fn: ir.Float8E4M3FNType.get,
    torch.float8_e4m3fnuz: ir.Float8E4M3FNUZType.get,
    torch.float8_e5m2: ir.Float8E5M2Type.get,
    torch.float8_e8m0fnu: ir.Float8E8M0FNUType.get,
    torch.int64: lambda: ir.IntegerType.get_signless(64),
    torch.int32: lambda: ir.IntegerType.get_signless(32),
    torch.int16: lambda: ir.IntegerType.get_signless(16),
    torch.int8: lambda: ir.IntegerType.get_signless(8),
    torch.uint8: lambda: ir.IntegerType.get_signless(8),
    torch.bool: lambda: ir.IntegerType.get_signless(1),
}


@dataclass
class Program:
    """An imported model: its IR, the tensors its globals name, and how it is called."""

    module: ir.Module
    parameters: dict[str, torch.Tensor | Recipe]
    inputs: tuple[Leaf, ...] | None = None
    outputs: tuple[Leaf, ...] | None = None
    input_tree: str | None = None
    output_tree: str | None = None
    conditions: tuple[str, ...] = ()
    folded: tuple[Folded, ...] = ()
    remarks: tuple[Remark, ...] = ()

    @property
    def context(self) -> ir.Context:
        return self.module.context

    def main(self) -> ir.Operation:
        """The function that is compiled and called: ``@main``, or the only public one."""
        functions = [op.operation for op in self.module.body if op.operation.name == "func.func"]
        public = [f for f in functions if "sym_visibility" not in f.attributes]
        named = [f for f in public if ir.StringAttr(f.attributes["sym_name"]).value == "main"]
        if not (named or public):
            raise CompileError("the module has no public function")
        return (named or public)[0]

    def mark_strides(self, layouts: Mapping[int, ScaleLayout]) -> None:
        """Results that are returned as physical buffers, by number; the runtime makes them logical."""
        outputs = list(self.outputs or ())
        for number, layout in layouts.items() if outputs else ():
            outputs[number] = replace(outputs[number], strides=layout)  # type: ignore[call-arg]
        self.outputs = tuple(outputs) if self.outputs is not None else None

    def signature(self, target: Target, parameters: Parameters | None) -> Signature:
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
) -> Program:
    """Export ``module`` for ``args`` and import it into ``context``.

    An ExportedProgram is taken as it is; of a module, quantized layers of other libraries are adopted while
    it is exported.  Raises CompileError with torch.export's own words when the module cannot be exported.
    One thread at a time exports, the others wait.
    """
    with _EXPORTING:
        if isinstance(module, torch.export.ExportedProgram):
            return _import(module, context)
        with adopted(module) as adopting:
            program = _import(_export(adopting, args, dict(kwargs or {}), dynamic_shapes), context)
        program.remarks = checkpoints.dequantized(module)
        return program


def _import(exported: torch.export.ExportedProgram, context: ir.Context) -> Program:
    as_exported = exported  # what follows may lose the guards of a program that was saved
    forget_multiples(exported)
    with warnings.catch_warnings():
        # torch copies its own tree specs in a way it has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        exported = _functional(exported)
    refusals.check(exported, _MLIR_DTYPES, GraphNodeImporter)
    externalised = _ExternalParameters()
    importer = FxImporter(context=context, hooks=externalised, graph_node_importer_cls=_ExampleImporter)
    try:
        importer.import_program(exported, func_name="main")
    except (NotImplementedError, TypeError, ValueError) as error:
        raise CompileError(f"the exported program cannot be imported: {error}") from error
    _note_arguments(importer.module, exported)
    _drop_constant_results(importer.module, exported)
    inputs = _leaves(exported, exported.graph_signature.input_specs, InputKind.USER_INPUT)
    return Program(
        module=importer.module,
        parameters=externalised.tensors,
        inputs=inputs,
        outputs=_leaves(exported, exported.graph_signature.output_specs, OutputKind.USER_OUTPUT),
        input_tree=_dump_tree(exported.call_spec.in_spec),
        output_tree=_dump_tree(exported.call_spec.out_spec),
        conditions=conditions(as_exported, inputs),
    )


def parse_module(text: str | bytes, context: ir.Context) -> Program:
    """A Program from torch-dialect MLIR, text or bytecode; its calling convention is left unstated."""
    try:
        module = ir.Module.parse(text, context=context)
    except ir.MLIRError as error:
        raise CompileError(f"the source is not valid MLIR: {error}") from error
    return Program(module=module, parameters={})


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    try:
        args, kwargs = _distinct((args, kwargs))
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
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


def _note_arguments(module: ir.Module, exported: torch.export.ExportedProgram) -> None:
    metas = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    with module.context:
        main = Program(module, {}).main()
        torch_ir.set_example(main, [_example(metas.get(name)) for name in names])


def _drop_constant_results(module: ir.Module, exported: torch.export.ExportedProgram) -> None:
    """A result that is no tensor was burned in: the signature holds it, the program need not return it."""
    specs = [s for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    if not any(isinstance(spec.arg, ConstantArgument) for spec in specs):
        return
    with module.context, ir.Location.unknown():
        main = Program(module, {}).main()
        block = torch_ir.block_of(main)
        old = list(block.operations)[-1].operation
        kept = [
            v
            for v, spec in zip(old.operands, specs, strict=True)
            if not isinstance(spec.arg, ConstantArgument)
        ]
        with ir.InsertionPoint(old), old.location:
            func.ReturnOp(kept)
        old.erase()
        inputs = [argument.type for argument in block.arguments]
        main.attributes["function_type"] = ir.TypeAttr.get(
            ir.FunctionType.get(inputs, [v.type for v in kept])
        )


def _dump_tree(spec: pytree.TreeSpec | None) -> str | None:
    """Write a pytree spec as JSON; None when it holds a container that has no serialised name."""
    if spec is None:
        return None
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError:
        return None


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
    if not isinstance(value, torch.Tensor):
        raise CompileError(f"{argument.name} is a {type(value).__name__}; inputs and outputs must be tensors")
    shape = tuple(dim if isinstance(dim, int) else str(dim.node.expr) for dim in value.shape)
    return TensorSpec(argument.name, str(value.dtype).removeprefix("torch."), shape)


class _ExampleImporter(GraphNodeImporter):
    """Notes on each operation the sizes its dynamic results have for the example arguments, and on each
    error the operation that it is about.
    """

    def _import_torch_op_overload(self, loc: ir.Location, node: torch.fx.Node, *others: Any) -> None:
        try:
            super()._import_torch_op_overload(loc, node, *others)
        except (NotImplementedError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise refusals.not_imported(node, error) from error

    def bind_node_value(self, node: torch.fx.Node, value: Any, result_index: int = 0) -> None:
        super().bind_node_value(node, value, result_index)
        if isinstance(value, ir.OpResult):
            metas = node.meta.get("val")
            metas = metas if isinstance(metas, (tuple, list)) else [metas]
            op = value.owner.operation
            if len(metas) == len(op.results):
                torch_ir.set_example(op, [_example(meta) for meta in metas])


def _example(meta: Any) -> tuple[int, ...] | None:
    """The sizes a traced tensor had; None if they are all static anyway."""
    if not isinstance(meta, torch.Tensor) or all(isinstance(dim, int) for dim in meta.shape):
        return None
    sizes = [dim if isinstance(dim, int) else dim.node.hint for dim in meta.shape]
    if None in sizes:
        return None
    return tuple(
        torch_ir.ExampleSize(int(size), () if isinstance(dim, int) else _factors(dim))
        for size, dim in zip(sizes, meta.shape, strict=True)
    )


def _factors(size: torch.SymInt) -> list[str]:
    """The factors of a size's expression, a power once for each time it counts."""
    powers = [factor.as_base_exp() for factor in size.node.expr.as_ordered_factors()]
    whole = all(count.is_Integer and count > 0 for _, count in powers)
    return sorted(str(base) for base, count in powers for _ in range(int(count))) if whole else []


@dataclass
class _ExternalParameters(FxImporterHooks):
    """Importer hooks that turn every tensor the program carries into a global naming a parameter."""

    tensors: dict[str, torch.Tensor | Recipe] = field(default_factory=dict)
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _module: ir.Operation | None = None

    def prepare_module(self, module_op: ir.Operation) -> None:
        self._module = module_op

    def resolve_input(self, gni: GraphNodeImporter, value: Any, info: Any) -> ir.Value | None:
        return self._load(value, str(info.input_spec.target))

    def resolve_literal(self, gni: GraphNodeImporter, literal: Any, info: Any) -> ir.Value | None:
        if not isinstance(literal, torch.Tensor) or literal.numel() <= 1:
            return None
        return self._load(literal, f"constant.{len(self.tensors)}")

    def _load(self, tensor: torch.Tensor, name: str) -> ir.Value:
        tensor = tensor.detach()
        # Tied weights are one parameter: same storage, same view of it.
        identity = (tensor.data_ptr() or name, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if identity not in self._names:
            assert self._module is not None
            self._names[identity] = name
            self.tensors[name] = tensor
            declare_parameter(self._module, name, tensor)
        return read_parameter(self._names[identity], tensor)


def declare_parameter(module: ir.Operation, name: str, tensor: torch.Tensor) -> None:
    """A global that is the parameter ``name``, of the type of ``tensor``.  Raises CompileError for a
    dtype that no program can hold.
    """
    type_ = builtin_type(_as_stored(tensor))
    with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]), ir.Location.unknown():
        value = ir.Attribute.parse(f'#flow.parameter.named<"{PARAMETER_SCOPE}"::"{name}"> : {type_}')
        util.GlobalOp(name, type_, initial_value=value, sym_visibility=ir.StringAttr.get("private"))


def read_parameter(name: str, tensor: torch.Tensor) -> ir.Value:
    """The parameter ``name``, of the type of ``tensor``, at the current insertion point."""
    stored = _as_stored(tensor)
    loaded = util.GlobalLoadOp(builtin_type(stored), name, is_immutable=True).result
    value = ir.Operation.create(
        "torch_c.from_builtin_tensor", results=[torch_type(stored)], operands=[loaded]
    ).result
    if tensor.dtype != torch.bool:
        return value
    wanted = torch_ir.TensorType(tuple(tensor.shape), "bool")
    return torch_ir.make("torch.prims.convert_element_type", wanted, [value, torch_ir.make_dtype("bool")])


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """View bools as bytes, which archives hold; IREE does not read one-bit elements from them."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def is_storable(dtype: torch.dtype) -> bool:
    """Tell whether a parameter can have this dtype."""
    return dtype in _MLIR_DTYPES


def builtin_type(tensor: torch.Tensor) -> ir.Type:
    """The builtin tensor type of a concrete tensor, e.g. ``tensor<4x8xbf16>``."""
    if tensor.dtype not in _MLIR_DTYPES:
        raise CompileError(f"a parameter of dtype {tensor.dtype} cannot be compiled")
    return ir.RankedTensorType.get(list(tensor.shape), _MLIR_DTYPES[tensor.dtype]())


def torch_type(tensor: torch.Tensor) -> ir.Type:
    """The torch dialect's type of a concrete tensor, e.g. ``!torch.vtensor<[4,8],bf16>``."""
    element = str(_MLIR_DTYPES[tensor.dtype]())
    if tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        element = element.replace("i", "si")
    elif tensor.dtype == torch.uint8:
        element = "ui8"
    shape = ",".join(str(dim) for dim in tensor.shape)
    return ir.Type.parse(f"!torch.vtensor<[{shape}],{element}>")
