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

Order on a GPU: a call waits for torch's current stream, runs, and returns when its results are there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from iree import runtime as iree
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import containers, ops
from ..errors import RunError, UsageError
from ..signature import (
    INITIAL,
    INTO,
    SCRATCH_SIZE,
    Constant,
    Integer,
    Signature,
    Symbols,
    TensorSpec,
    evaluate,
    holds,
    resolve,
    returned_tensors,
)
from .arguments import (
    bind,
    check_kinds,
    described,
    keywords_of,
    not_exported_for,
    passed,
    positional_count,
    result_tree,
    tensor_specs,
    without_constants,
)
from .files import Check, check_archive, function_of, open_module, parameter_modules, signatures_of
from .session import Memory, Place, Session, Storage, reported
from .state import State, StateTensor
from .writing import Writing

__all__ = ["Function", "Program", "load"]

# Calls with new shapes are checked and planned; the plans of this many are kept, then all are made anew.
_REMEMBERED_PLANS = 1024


def load(
    source: str | Path | bytes,
    device: str | torch.device | None = None,
    parameters: str | Path | None = None,
    *,
    check: Check = "whole",
) -> Program:
    """Load a compiled program.

    source: path of a .vmfb, which is memory-mapped and must not be overwritten in place while the
    program lives, or its bytes.  device: 'cpu', 'cuda', 'cuda:1', 'hip', ...; default: what the
    program was compiled for.  parameters: the .irpa file, if the weights were kept outside.
    check: 'whole' reads the program and its weights once and compares checksums, 'headers' leaves large
    weights unread until they are used (docs/weights.md says what that takes and finds).

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
    place = Place.for_program(first, device, name)
    needed = next((s.parameters for s in signatures.values() if s.parameters), None)
    providers = parameter_modules(needed, parameters, name, check)
    with reported(f"{name} cannot be loaded on {place}"):
        return Program(module, signatures, place, providers)


class Program:
    """A loaded program: ``program(*args, **kwargs)`` calls ``main``, ``program[name](...)`` any function.

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
    ):
        self._session = session = Session(module, place, parameter_modules)
        specs = {spec.name: spec for signature in signatures.values() for spec in signature.state}
        stored = next((signature.stored for signature in signatures.values() if signature.stored), ())
        initial = module.lookup_function(INITIAL)

        def values() -> dict[str, Tensor]:
            views = session.invoke(initial, ()) if initial is not None else []
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._default(*args, **kwargs)

    @property
    def _default(self) -> Function:
        return self[next(iter(self._functions)) if len(self._functions) == 1 else "main"]


class Function:
    """One exported function of a program."""

    def __init__(
        self, name: str, signature: Signature, session: Session, module: iree.VmModule, state: State
    ):
        self.name = name
        self.signature = signature
        self.passed_inputs = passed(signature.inputs)
        """The arguments of ``run``; None when the program does not say."""
        self.tensor_outputs = tensor_specs(signature.outputs)
        """The results of ``run``; None when the program does not say."""
        self._session, self._state = session, state
        self._writing = Writing(signature)
        into = bool(signature.placed)
        self._function = function_of(module, name + INTO if into else name)
        # A program that needs no scratch memory has no such function.
        self._scratch_size = module.lookup_function(name + INTO + SCRATCH_SIZE) if into else None
        self._in_tree = containers.load(signature.input_tree)
        self._result_tree = result_tree(signature.output_tree)
        self._keywords = keywords_of(signature.input_tree)
        self._positional = positional_count(self._in_tree, signature.inputs)
        self._all_tensors = self.tensor_outputs == signature.outputs
        outputs = self._returned_tensors = returned_tensors(signature)
        self._strided = [(i, spec.strides) for i, spec in enumerate(outputs) if spec.strides]
        self._dtypes = tuple(getattr(torch, spec.dtype) for spec in outputs)
        placed = {number for numbers in signature.placed for number in numbers}
        self._returned = [i for i in range(len(outputs)) if i not in placed]
        self._returned_dtypes = [self._dtypes[i] for i in self._returned]
        self._plans: dict[Any, _Plan] = {}

    def with_state(self, state: State) -> Function:
        """The same function on another state."""
        other = copy.copy(self)
        other._state = state
        return other

    @property
    def device(self) -> torch.device:
        """Say where arguments must be and results are."""
        return self._session.place.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == self._positional and not kwargs and all(isinstance(x, Tensor) for x in args)
        values = args if plain else self._leaves(args, kwargs)
        results: list[Any] = self.run(*values)
        if not self._all_tensors:
            results = list(self._with_others(results, values))
        tree = self._result_tree
        if tree is not None and tree.num_leaves == len(results):
            return pytree.tree_unflatten(results, tree)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, *values: Any) -> list[Tensor]:
        """Call with the tensors and ints of ``passed_inputs``, flat; returns the tensors of the result.

        What the model writes to among them is written.
        """
        if not (self._writing.arguments or self.signature.state):
            return self._run(values, values, {})
        with self._state.held() if self.signature.state else nullcontext():
            return self._run_writing(values)

    def _run_writing(self, values: Sequence[Any]) -> list[Tensor]:
        """Call a function that writes to arguments, or has a state, which is held."""
        writing, state = self._writing, self._state
        self._plan(values)  # refuses what cannot be passed before anything is made of it
        passed, finish = writing.lend(values, self._session)
        passed += [state.view(spec.name) for spec in self.signature.state]
        spare = {number: state.spare(name) for number, name in writing.state.items()}
        results = self._run(values, passed, spare)
        for argument, number in writing.results.items():
            values[argument].detach().copy_(results[number])
        for bring_back in finish:
            bring_back()
        for number, name in writing.state.items():
            if results[number] is not None:  # it is not in the spare memory
                state.put(name, results[number])
        state.exchange([name for number, name in writing.state.items() if results[number] is None])
        return results[: writing.first]

    def _run(self, values: Sequence[Any], passed: Sequence[Any], spare: Mapping[int, Memory]) -> list[Any]:
        """Call with what is ``passed`` for ``values``; all tensors that are returned.

        spare: where new values of the state are put, by number; where that was done there is None.
        """
        plan = self._plan(values)
        session = self._session
        if plan.all_empty and not session.place.driver.on_host:
            return self._empty(plan)
        with reported(f"{self.name} failed"):
            placed = self.signature.placed
            storage = [
                spare.get(numbers[0]) or session.allocate(each)
                for numbers, each in zip(placed, plan.storage, strict=True)
            ]
            memory = [view for _, view in storage]
            if plan.scratch is not None:
                memory.append(session.scratch(plan.scratch))
            views = session.invoke(self._function, passed, memory)
        tensors = [value for value in values if isinstance(value, Tensor)]
        if self.tensor_outputs is None:
            return _apart([session.to_torch(view, None) for view in views], tensors)
        returned = self._returned
        if len(returned) != len(views):
            raise RunError(f"{self.name} returned {len(views)} tensors, its signature says {len(returned)}")
        given = map(session.to_torch, views, self._returned_dtypes)
        results: dict[int, Any] = dict(zip(returned, _apart(given, tensors), strict=True))
        for numbers, (tensor, _) in zip(placed, storage, strict=True):
            results[numbers[0]] = None if numbers[0] in spare else tensor
            for number in numbers[1:]:
                results[number] = tensor.view(self._dtypes[number])
        for number, layout in self._strided:
            results[number] = ops.from_physical(results[number], plan.leading(number), layout)
        return [results[number] for number in range(len(results))]

    def _empty(self, plan: _Plan) -> list[Tensor]:
        """Results that are all empty, which no GPU driver of IREE's can make: CUDA refuses an empty grid and
        fails the device with it; HIP has no address for an empty buffer, and the driver waits for one for
        ever."""
        return [
            torch.empty([size or 0 for size in sizes], dtype=dtype, device=self.device)
            for sizes, dtype in zip(plan.sizes, self._dtypes, strict=True)
        ]

    def _plan(self, values: Sequence[Any]) -> _Plan:
        """Find what is known of a call with ``values``; a first one of its shapes and ints is checked."""
        key = tuple([(x.dtype, x.shape, x.device) if isinstance(x, Tensor) else _key(x) for x in values])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._planned(values)
            if len(self._plans) >= _REMEMBERED_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _planned(self, values: Sequence[Any]) -> _Plan:
        """Check the arguments of ``run`` and plan the call."""
        plan = _Plan(self._check(values), self._returned_tensors)
        layouts, session = dict(self._strided), self._session
        for number, *_ in self.signature.placed:
            shape = ops.physical_shape(plan.shape(number), layouts.get(number, "row"))
            plan.storage.append(session.storage(shape, self._dtypes[number]))
        if self._scratch_size is not None:
            with reported(f"{self.name} failed"):
                state = [self._state.view(spec.name) for spec in self.signature.state]
                plan.scratch = session.query(self._scratch_size, [*values, *state], len(plan.storage) + 1)
        elif plan.storage:
            plan.scratch = 0
        return plan

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The arguments of ``run``."""
        leaves = self._flatten(args, kwargs)
        inputs = self.signature.inputs
        if inputs is None:
            return leaves
        if len(leaves) != len(inputs):
            raise RunError(f"{self._describe()}, got {len(leaves)}")
        return without_constants(inputs, leaves)

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        if self._in_tree is None:
            if kwargs:
                raise RunError(f"{self._describe()} and no keywords, got {', '.join(kwargs)}")
            return args
        if set(kwargs) == set(self._keywords):
            # A dictionary's tree knows the order of its keys; a call may write them in any order.
            kwargs = {name: kwargs[name] for name in self._keywords}
        leaves, tree = pytree.tree_flatten((args, kwargs))
        if tree != self._in_tree:
            raise RunError(f"{self._describe()}, got {described(args, kwargs)}")
        return leaves

    def _check(self, values: Sequence[Any]) -> Symbols:
        """Check the arguments of ``run`` and return the value of every symbol."""
        specs = self.passed_inputs
        check_kinds(specs, values, self.device)
        if specs is None:
            return {}
        if len(values) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise RunError(f"{self.name} takes {len(specs)} tensors ({names}), got {len(values)}")
        symbols = bind(specs, values)
        for condition in self.signature.conditions:
            if holds(condition, symbols) is False:
                raise not_exported_for(condition, specs, values)
        return symbols

    def _with_others(self, tensors: Sequence[Tensor], values: Sequence[Any]) -> Iterator[Any]:
        """The leaves of the result: the tensors, between them burned-in constants and ints."""
        remaining, symbols = iter(tensors), self._plan(values).symbols
        for leaf in self.signature.outputs or ():
            if isinstance(leaf, TensorSpec):
                yield next(remaining)
            else:
                yield evaluate(leaf.size, symbols) if isinstance(leaf, Integer) else leaf.value
        yield from remaining

    def _describe(self) -> str:
        """'main takes 2 arguments (x, y)'."""
        leaves = self.signature.inputs
        if leaves is None:
            return f"{self.name} takes tensors"
        names = ", ".join(str(x.value) if isinstance(x, Constant) else x.name for x in leaves)
        keywords = f", keywords {', '.join(self._keywords)}" if self._keywords else ""
        plural = "" if len(leaves) == 1 else "s"
        return f"{self.name} takes {len(leaves)} argument{plural} ({names}{keywords})"


def _key(value: Any) -> Any:
    """What tells an int from another; every other value is refused."""
    return value if type(value) is int else None


def _apart(results: Iterable[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """The results, those copied that lie in an argument: IREE returns its memory where nothing changes it."""
    results = list(results)
    if not results:
        return results
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in arguments]
    return [
        result.clone() if any(begin <= result.data_ptr() < end for begin, end in spans) else result
        for result in results
    ]


class _Plan:
    """Hold what the arguments' dtypes and shapes decide about a call."""

    def __init__(self, symbols: Symbols, outputs: Sequence[TensorSpec]):
        self.outputs, self.symbols = outputs, symbols
        shapes = [(None,) if spec.shape is None else spec.shape for spec in outputs]
        self.sizes = [tuple(resolve(dim, symbols) for dim in shape) for shape in shapes]
        """Of each result; None is a size that only the call itself tells."""
        self.all_empty = bool(self.sizes) and all(0 in sizes and None not in sizes for sizes in self.sizes)
        self.storage: list[Storage] = []
        """The memory to pass for results."""
        self.scratch: int | None = None
        """The bytes of scratch memory to pass behind it; None where nothing is passed."""

    def shape(self, number: int) -> tuple[int, ...]:
        """Give the shape of result ``number``; RunError where a size does not follow from the arguments."""
        return self._known(number, self.sizes[number])

    def leading(self, number: int) -> tuple[int, ...]:
        """All but the last size of ``shape``."""
        return self._known(number, self.sizes[number][:-1])

    def _known(self, number: int, sizes: tuple[int | None, ...]) -> tuple[int, ...]:
        known = tuple(size for size in sizes if size is not None)
        if len(known) != len(sizes):
            spec = self.outputs[number]
            raise RunError(f"result {spec.name}: the size of {spec} does not follow from the arguments")
        return known
