"""Step 8, run: load a compiled program and call it with torch tensors.

Needs torch, numpy and iree-base-runtime; no compiler is imported here.  Tensors cross in both
directions by DLPack, without a copy.  Two kinds of argument are copied first: tensors that are not
contiguous, and, on the cpu, tensors that do not start at a multiple of 64 bytes (a slice, a file
mapped by another library), which the cpu driver cannot take.

Every call is checked against the signature in the program, because the IREE runtime checks only
ranks and element types: a wrong size would be read out of bounds.  A program without that signature
is refused.

Threads: any number of threads may call one program.  An IREE context may be used by one thread at a time, so
calls of one ``Program`` take turns; programs loaded separately run side by side.

Order on a GPU: a call that is a graph (``graphs``) is an operation on torch's current stream like any
other; one that is not waits for that stream, runs, and returns when its results are there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from iree import runtime as iree
from torch import Tensor

from ..errors import RunError, UsageError
from ..signature import INITIAL, Signature
from .files import Check, check_archive, open_module, parameter_modules, signatures_of
from .function import Function
from .graphs import MODES, Mode, graphs_of
from .session import Place, Session, reported, returned
from .state import State, StateTensor

__all__ = ["Function", "Program", "load"]


def load(
    source: str | Path | bytes,
    device: str | torch.device | None = None,
    parameters: str | Path | None = None,
    *,
    check: Check = "whole",
    graphs: Mode = "auto",
) -> Program:
    """Load a compiled program.

    source: path of a .vmfb, which is memory-mapped and must not be overwritten in place while the
    program lives, or its bytes.  device: 'cpu', 'cuda', 'cuda:1', 'hip', ...; default: what the
    program was compiled for.  parameters: the .irpa file, if the weights were kept outside.
    check: 'whole' reads the program and its weights once and compares checksums, 'headers' leaves large
    weights unread until they are used (docs/weights.md says what that takes and finds).
    graphs: 'auto' makes a call on a GPU one launch of a graph where that is possible (docs/calls.md), 'off'
    does not.

    Raises RunError with one sentence when the file is missing, truncated, not ours or compiled for
    another device or architecture, when it or its parameters are damaged, when these are missing or not the
    ones it was compiled with, or when the device's driver is not available; UsageError for an unknown device
    name and for what is neither a path nor bytes.
    """
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise UsageError(
            f"load takes the path of a .vmfb or its bytes, not a {type(source).__name__}; what compile "
            "returns holds them: load(compiled.vmfb)"
        )
    name = "the program" if isinstance(source, bytes) else str(source)
    with reported(f"{name} cannot be loaded"):
        check_archive(source, name, check)
        module = open_module(source)
        signatures = signatures_of(module, name)
    first = next(iter(signatures.values()))
    if graphs not in MODES:
        raise UsageError(f"graphs is 'auto' or 'off', not {graphs!r}")
    graphs_of(first.backend, graphs)  # before the driver is opened
    place = Place.for_program(first, device, name)
    needed = next((s.parameters for s in signatures.values() if s.parameters), None)
    providers = parameter_modules(needed, parameters, name, check)
    with reported(f"{name} cannot be loaded on {place}"):
        return Program(module, signatures, place, providers, graphs)


class Program:
    """A loaded program: ``program(*args, **kwargs)`` calls ``main`` or the only function there is.

    ``program.decode(...)``, or ``program["decode"](...)``, calls the function of that name.

    Arguments are those of the module that was compiled; the result has the structure that module
    returned (a flat tuple where the structure's type is not known in this process).

    What the module kept in buffers that it writes to is the program's state, which lives from call to call.
    ``session()`` gives the same program with a state of its own.
    """

    def __init__(
        self,
        module: iree.VmModule,
        signatures: dict[str, Signature],
        place: Place,
        parameter_modules: Sequence[iree.VmModule] = (),
        graphs: Mode = "auto",
    ):
        self._session = session = Session(module, place, parameter_modules, graphs)
        specs = {spec.name: spec for signature in signatures.values() for spec in signature.state}
        stored = next((signature.stored for signature in signatures.values() if signature.stored), ())
        initial = module.lookup_function(INITIAL)

        def values() -> dict[str, Tensor]:
            views = returned(session.invoke(initial, ())) if initial is not None else []
            dtypes = (getattr(torch, specs[name].dtype) for name in stored)
            return dict(zip(stored, map(session.to_torch, views, dtypes), strict=True))

        self._state = State(session, tuple(specs.values()), values)
        self._functions = {
            name: Function(name, signature, session, module, self._state)
            for name, signature in signatures.items()
        }

    def session(self) -> Program:
        """The same program with a state of its own, as new; weights, code and ``close`` are shared."""
        other = copy.copy(self)
        other._state = self._state.another()
        other._functions = {name: each.with_state(other._state) for name, each in self._functions.items()}
        return other

    def state(self) -> tuple[StateTensor, ...]:
        """What the program remembers: name, dtype, shape and bytes of each tensor."""
        return self._state.describe()

    def state_dict(self) -> dict[str, Tensor]:
        """The values of the state, by name: copies, on the CPU."""
        return self._state.values()

    def reset(self) -> None:
        """Give the state the values that the module's buffers had when it was compiled."""
        self._state.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, all of it or nothing.

        Raises UsageError where that cannot be written, RunError for a program without state.
        """
        self._state.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read the state that ``save`` has written, of this program on any target.

        Raises RunError for any other file, and changes nothing then.
        """
        self._state.load(path)

    def close(self) -> None:
        """Let go of the program and its weights; it cannot be called after, nor can its sessions."""
        self._session.close()

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the exported functions."""
        return tuple(self._functions)

    def __getitem__(self, name: str) -> Function:
        if name not in self._functions:
            raise RunError(f"the program has no function {name!r}; it has {', '.join(self._functions)}")
        return self._functions[name]

    def __getattr__(self, name: str) -> Function:
        """Find a function by its name, as in ``program.decode(...)``."""
        functions = self.__dict__.get("_functions", {})
        if name not in functions:
            known = f"; its functions are {', '.join(functions)}" if functions else ""
            raise AttributeError(f"a program has no {name!r}{known}")
        return functions[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._functions})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._default(*args, **kwargs)

    def explain_call(self, *args: Any, **kwargs: Any) -> str:
        """Say whether ``program(*args, **kwargs)`` is one graph launch, or why it is not; nothing runs."""
        return self._default.explain_call(*args, **kwargs)

    @property
    def _default(self) -> Function:
        return self[next(iter(self._functions)) if len(self._functions) == 1 else "main"]
