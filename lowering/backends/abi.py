"""Check that an object takes what its dispatch passes.

IREE launches a kernel by name and trusts it: a wrong number of bindings shows as corrupt memory at
run time.  So the parameters are read back from the object itself, before it is embedded, and
compared with the instance.  A CPU object does not record them; there the compiler checks its
definition against ``cpu.prototype(instance)`` and the object keeps the text of that declaration.
"""

from __future__ import annotations

from ..families.instance import KernelInstance
from .objects import ObjectAbi
from .registry import backend_of


def check(instance: KernelInstance, data: bytes) -> ObjectAbi:
    """Read what ``data`` says of itself, and hold it against ``instance``.

    Raises CompileError, naming the entry, what the object has and what the dispatch passes, if the
    object is of another architecture, lacks the entry, needs symbols nobody provides or takes
    other parameters.
    """
    return backend_of(instance.target).check(instance, data)
