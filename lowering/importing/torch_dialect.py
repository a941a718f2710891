"""The half of step 1 that is torch-mlir's: its FX importer writes the graph of an exported program as MLIR.

torch-mlir and IREE each bring an MLIR library of their own, whose objects do not mix.  The graph is imported
and verified in torch-mlir's context and crosses to IREE's as bytecode.  What only IREE's dialects can say
crosses as a placeholder: a parameter is an operator that names it, and becomes a load of its global.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_mlir.ir as mlir
from iree.compiler import ir
from torch.export.graph_signature import InputKind
from torch_mlir.dialects.torch import register_dialect
from torch_mlir.extras.fx_importer import FxImporter, FxImporterHooks, GraphNodeImporter

from patterns import torch_ir

from ..errors import LoweringError
from . import parameters, refusals
from .naming import Names
from .size_arithmetic import spell_sizes

# The operator that a parameter is until its module has crossed.
_PLACEHOLDER = "lowering.parameter"


def import_graph(
    exported: torch.export.ExportedProgram,
    context: ir.Context,
    function: str,
    names: Names,
    written: Sequence[int] = (),
) -> tuple[ir.Module, dict[str, torch.Tensor]]:
    """``exported`` as a module in ``context`` with the function of that name; the tensors its globals name.

    written: the arguments that the model writes to, which are marked on the function.
    """
    spell_sizes(exported.graph)
    there = mlir.Context()
    register_dialect(there)
    placeholders = _Placeholders(function, names)
    importer = FxImporter(context=there, hooks=placeholders, graph_node_importer_cls=_NodeImporter)
    try:
        main = importer.import_program(exported, func_name=function)
        with there:
            torch_ir.set_example(main, _examples(exported), mlir)
        importer.module.operation.verify()
    except LoweringError:
        raise
    except Exception as error:  # the importer also asserts, and looks up what may not be there
        raise refusals.not_read(error) from error
    code = io.BytesIO()
    importer.module.operation.write_bytecode(code)
    module = ir.Module.parse(code.getvalue(), context=context)
    with context, ir.Location.unknown():
        _resolve(module, placeholders.tensors)
        torch_ir.mark_written(_functions(module)[function], written)
    return module, placeholders.tensors


def importable(operator: str) -> bool:
    """Tell whether torch-mlir imports this operator of higher order."""
    return hasattr(GraphNodeImporter, f"_import_hop_{operator}")


def _examples(exported: torch.export.ExportedProgram) -> list[tuple[int, ...] | None]:
    """The sizes of the example arguments."""
    metas = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    return [_example(metas.get(name)) for name in names]


class _NodeImporter(GraphNodeImporter):
    """Notes on each operation the sizes its dynamic results have for the example arguments, and on each
    error the operation that it is about.
    """

    def _import_torch_op_overload(self, loc: mlir.Location, node: torch.fx.Node, *others: Any) -> None:
        try:
            super()._import_torch_op_overload(loc, node, *others)
        except LoweringError:
            raise
        except Exception as error:
            raise refusals.not_imported(node, error) from error

    def bind_node_value(self, node: torch.fx.Node, value: Any, result_index: int = 0) -> None:
        super().bind_node_value(node, value, result_index)
        if isinstance(value, mlir.OpResult):
            metas = node.meta.get("val")
            metas = metas if isinstance(metas, (tuple, list)) else [metas]
            op = value.owner.operation
            if len(metas) == len(op.results):
                torch_ir.set_example(op, [_example(meta) for meta in metas], mlir)


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
class _Placeholders(FxImporterHooks):
    """Importer hooks that turn every tensor the program carries into an operator that names it."""

    function: str
    names: Names
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def resolve_input(self, gni: GraphNodeImporter, value: Any, info: Any) -> mlir.Value | None:
        is_constant = info.input_spec.kind == InputKind.CONSTANT_TENSOR
        return self._named(value, str(info.input_spec.target), is_constant=is_constant)

    def resolve_literal(self, gni: GraphNodeImporter, literal: Any, info: Any) -> mlir.Value | None:
        if not isinstance(literal, torch.Tensor) or literal.numel() <= 1:
            return None
        return self._named(literal, f"constant.{len(self.tensors)}", is_constant=True)

    def _named(self, tensor: torch.Tensor, name: str, *, is_constant: bool) -> mlir.Value:
        tensor = tensor.detach()
        name = self.names.of(self.function, tensor, name, is_constant=is_constant)
        self.tensors.setdefault(name, tensor)
        return mlir.Operation.create(
            "torch.operator",
            results=[mlir.Type.parse(parameters.type_of(tensor).spelling)],
            attributes={"name": mlir.StringAttr.get(_PLACEHOLDER), "parameter": mlir.StringAttr.get(name)},
        ).result


def _functions(module: ir.Module) -> dict[str, ir.Operation]:
    functions = [op.operation for op in module.body if op.operation.name == "func.func"]
    return {ir.StringAttr(function.attributes["sym_name"]).value: function for function in functions}


def _resolve(module: ir.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Declare the parameters, and load them where their placeholders are."""
    functions = _functions(module).values()
    for op in [op for function in functions for op in torch_ir.block_of(function).operations]:
        if torch_ir.op_name(op.operation) == _PLACEHOLDER:
            name = ir.StringAttr(op.attributes["parameter"]).value
            with ir.InsertionPoint(op), op.location:
                op.results[0].replace_all_uses_with(parameters.read(name, tensors[name]))
            op.operation.erase()
    for name, tensor in tensors.items():
        parameters.declare(module.operation, name, tensor)
