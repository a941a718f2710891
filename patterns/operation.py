"""Declare an operation once: its name, what it carries, what fits it, and what finds and fuses it.

An ``Operation`` is the IR form of one operation of this project, a ``torch.operator`` with an attribute that
holds a frozen value.  A ``PatternFamily`` is what becomes of a model's spelling of it: the recognisers that
raise it, the suspicions about what they left, and the fusion that gives it to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iree.compiler import ir

from . import torch_ir
from .canonical import from_attribute
from .contracts import Spec
from .recogniser import Recogniser, Suspicion
from .sites import Ledger
from .torch_ir import TensorType

if TYPE_CHECKING:
    from .named_call import NamedOp

Types = Sequence["TensorType | None"]
# Says why no kernel exists for a spec, or None when one does: the target answers this, not the pattern.
Support = Callable[[Spec], "str | None"]
Fusion = Callable[[ir.Block, Ledger, Support], None]


@dataclass(frozen=True)
class Operation:
    """The IR form of one operation.

    name
        ``vmfuse.norm``; one of an outsider's family begins with a word of its own.
    carries
        The frozen dataclass that says what it computes: a contract, or, of what a kernel computes, a spec.
    why_not
        A sentence saying which operand or result does not fit a carried value, given the types of all
        operands and results; None if all do.
    site
        What the report calls it; None if it is no site, such as what the fusion makes of one.
    is_kernel
        Whether one kernel computes it: then what it carries is the spec of that kernel.
    is_producer
        Whether a quantization of its first result may be part of its kernel: then views between the two
        move below the quantization.
    """

    name: str
    carries: type
    why_not: Callable[[Any, Types, Types], str | None]
    site: Callable[[Any], str] | None = None
    is_kernel: bool = False
    is_producer: bool = False

    def value(self, op: ir.Operation) -> Any:
        """Read what ``op``, of this name, carries."""
        return from_attribute(self.carries, op.attributes["spec" if self.is_kernel else "contract"])

    def verify(self, op: ir.Operation) -> str | None:
        """Say what is wrong with ``op``, of this name, or None: its attributes, operands and results."""
        needed = ("spec", "sites") if self.is_kernel else ("contract",)
        missing = [name for name in needed if name not in op.attributes]
        if missing:
            return f"it has no {' and no '.join(missing)}"
        try:
            value = self.value(op)
        except (TypeError, KeyError, ValueError) as error:
            return f"it does not carry a {self.carries.__name__}: {error}"
        operands = [torch_ir.tensor_type(operand) for operand in op.operands]
        return self.why_not(value, operands, [torch_ir.tensor_type(result) for result in op.results])


@dataclass(frozen=True)
class PatternFamily:
    """Everything that ``patterns`` knows of operations that belong together.

    operations
        What is raised, and what the fusion makes of it.
    recognisers, suspicions
        In the order in which they are asked; those of one family before those of the next.
    named
        Operations of other libraries that stand for these, so that models that call them can be exported.
    fuse
        Gives the raised operations of a block to kernels, as far as the target supports them, and the ledger
        the reasons for the others; None where another step does.
    """

    operations: tuple[Operation, ...]
    recognisers: tuple[Recogniser, ...] = ()
    suspicions: tuple[Suspicion, ...] = ()
    named: tuple[NamedOp, ...] = ()
    fuse: Fusion | None = None
