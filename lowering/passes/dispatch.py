"""Step 6, dispatch: make each fused operation a call of one kernel, embedded as machine code.

Here kernels are chosen, compiled, and checked against the dispatch before they are embedded.  Each distinct
one gets one private function (``kernel_functions``), called from each of its sites (``kernel_calls``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from iree.compiler import ir

from patterns import canonical, torch_ir
from patterns.contracts import Contract
from patterns.sites import Cost, Ledger

from ..backends import abi, kernel_functions, toolchain
from ..families import registry
from ..families.instance import KernelInstance
from ..targets import Target
from . import kernel_calls
from .kernel_calls import PhysicalScale
from .kernel_calls import return_physical_scales as return_physical_scales


@dataclass
class Launch:
    """One call of a kernel, in the order of the program.

    ``rows`` is what the example arguments give, None where there were none (a model from MLIR).
    """

    kernel: KernelInstance
    rows: int | None


@dataclass
class Dispatched:
    """Hold what was embedded: the calls in program order, and each kernel's object by entry name."""

    launches: list[Launch] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    kernels: dict[str, KernelInstance] = field(default_factory=dict)
    physical_scales: list[PhysicalScale] = field(default_factory=list)


def dispatch(
    module: ir.Module,
    function: ir.Operation,
    target: Target,
    ledger: Ledger,
    directory: Path,
    progress: Callable[[str], None] = lambda entry: None,
    objects: dict[str, bytes] | None = None,
) -> Dispatched:
    """Replace every operation of ``function`` that a kernel computes by a call of that kernel, in place.

    ``directory`` gets the objects IREE reads from files; it must live until IREE has run.
    ``progress`` is told each kernel's entry before it is compiled.  ``objects``: those of kernels that were
    compiled for other functions, to which this one's are added.

    Raises CompileError when an object's parameters are not what the dispatch passes and
    ToolchainError when the target's kernel compiler is missing.
    """
    done, known = Dispatched(), {} if objects is None else objects
    chosen = choose_kernels(function, target, ledger)
    # Before any call is made: what a call returns no longer knows the sizes of the example.
    example_rows = [_example_rows(op, kernel) for op, kernel in chosen]
    for (op, kernel), rows in zip(chosen, example_rows, strict=True):
        if kernel.entry not in done.objects:
            if kernel.entry not in known:
                progress(kernel.entry)
                known[kernel.entry] = _checked_object(kernel)
            done.objects[kernel.entry] = known[kernel.entry]
            done.kernels[kernel.entry] = kernel
            kernel_functions.define(module, kernel, done.objects[kernel.entry], directory)
        done.launches.append(Launch(kernel, rows))
        kernel_calls.call(op, kernel, done.physical_scales)
    torch_ir.erase_dead(torch_ir.block_of(function))
    return done


def choose_kernels(
    function: ir.Operation, target: Target, ledger: Ledger
) -> list[tuple[ir.Operation, KernelInstance]]:
    """The kernel of every operation of ``function`` that has one, in block order; noted in ``ledger``."""
    chosen = []
    for op in [op.operation for op in torch_ir.block_of(function).operations]:
        spec = registry.spec_of(op)
        if spec is not None:
            kernel = registry.instance(spec, target)
            chosen.append((op, kernel))
            sites = canonical.sites_of(op)
            contracts = [ledger.records[site].contract for site in sites]
            for site, cost in zip(sites, _costs(kernel, contracts, _example_rows(op, kernel)), strict=True):
                ledger.assign_kernel(site, kernel.entry, cost)
    return chosen


def _costs(kernel: KernelInstance, contracts: Sequence[Contract | None], rows: int | None) -> list[Cost]:
    """Share the cost of a kernel among the sites of its operation, in their order.

    A quantization writes its own results, equal ones once; the first site does everything else.
    """
    if rows is None or not contracts:
        return [Cost(None, int(number == 0)) for number in range(len(contracts))]
    written: dict[Contract | None, int] = defaultdict(int)
    for binding in kernel.bindings:
        size = kernel.elements(binding, rows) * torch_ir.element_bytes(binding.dtype)
        written[binding.quantization] += size
    everything_else = written.pop(None, 0)
    shares = [written.pop(contract, 0) for contract in contracts]
    shares[0] += everything_else
    return [Cost(share, int(number == 0)) for number, share in enumerate(shares)]


def _checked_object(kernel: KernelInstance) -> bytes:
    data = toolchain.compile_kernel(kernel)
    abi.check(kernel, data)
    return data


def _example_rows(op: ir.Operation, kernel: KernelInstance) -> int | None:
    reads = [binding for binding in kernel.bindings if binding.access == "read"]
    shapes = (
        torch_ir.example_shape(operand)
        for binding, operand in zip(reads, op.operands, strict=True)
        if binding.has_rows
    )
    known = [shape for shape in shapes if shape is not None and len(shape) > 1]
    if known:
        return math.prod(known[0][:-1])
    type_ = torch_ir.tensor_type(op.operands[0])
    return 1 if type_ is not None and len(type_.shape) == 1 else None
