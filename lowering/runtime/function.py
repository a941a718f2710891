"""Call one function of a loaded program: check what it is given, plan, run, and hand out what it returns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from iree import runtime as iree
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import containers, ops
from ..errors import RunError
from ..signature import (
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
from . import playing
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
from .files import function_of
from .graphs import Graphs, Tape
from .session import Memory, Outcome, Session, Storage, reported, returned
from .state import State
from .views import Views
from .writing import Writing

# Calls with new shapes are checked and planned; the plans of this many are kept, then all are made anew.
_REMEMBERED_PLANS = 1024
# Bytes of scratch memory that a plan keeps between calls.
_SMALL = 1 << 16


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
        self._reported = reported(f"{name} failed")
        self._writing = Writing(signature)
        into = bool(signature.placed)
        self._function = function_of(module, name + INTO if into else name)
        # A program that needs no scratch memory has no such function.
        self._scratch_size = module.lookup_function(name + INTO + SCRATCH_SIZE) if into else None
        self._in_tree = containers.load(signature.input_tree)
        self._result_tree = result_tree(signature.output_tree)
        # Nothing but a tuple, of more than one: what results are anyway.
        leaves = self._result_tree.num_leaves if self._result_tree else 0
        self._is_tuple = leaves > 1 and self._result_tree == pytree.tree_structure((0,) * leaves)
        self._keywords = keywords_of(signature.input_tree)
        self._remembered = tuple(spec.name for spec in signature.state)
        self._positional = positional_count(self._in_tree, signature.inputs)
        self._all_tensors = self.tensor_outputs == signature.outputs
        outputs = self._returned_tensors = returned_tensors(signature)
        self._strided = [(i, spec.strides) for i, spec in enumerate(outputs) if spec.strides]
        self._dtypes = tuple(getattr(torch, spec.dtype) for spec in outputs)
        placed = {number for numbers in signature.placed for number in numbers}
        self._first_check = len(outputs) - len(signature.checks)
        self._returned = [i for i in range(len(outputs)) if i not in placed]
        self._returned_dtypes = [self._dtypes[i] for i in self._returned]
        # Each result is a tensor of the caller's as it is, and nothing is asked about it.
        self._is_direct = (
            not session.on_host
            and not self._strided
            and not signature.checks
            and [*signature.placed] == [(number,) for number in range(len(outputs))]
        )
        self._plans: dict[Any, _Plan] = {}
        why_not = session.no_graphs or self._why_no_graph()
        self._graphs = Graphs(session.library, why_not)

    def _why_no_graph(self) -> str:
        """Say what keeps every call from being a graph, or nothing."""
        if self.tensor_outputs is None:
            return "the program does not say what it returns"
        if not self.signature.placed or self._returned:
            return "the call itself tells sizes, or returns what its caller has no memory for"
        return ""

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
        values = args if not kwargs and self._are_leaves(args) else self._leaves(args, kwargs)
        results: list[Any] = self.run(*values)
        if not self._all_tensors:
            results = list(self._with_others(results, values))
        tree = self._result_tree
        if tree is not None and tree.num_leaves == len(results) and not self._is_tuple:
            return pytree.tree_unflatten(results, tree)
        return results[0] if len(results) == 1 else tuple(results)

    def explain_call(self, *args: Any, **kwargs: Any) -> str:
        """Say whether a call with these arguments is one graph launch, or why it is not; nothing runs.

        Raises what the call would raise of its arguments.
        """
        values = self._leaves(args, kwargs)
        with self._state.held() if self.signature.state else nullcontext():
            plan = self._plan(values)
        return "no graph: all results are empty" if plan.all_empty else self._graphs.explain(plan)

    def wait(self) -> None:
        """Wait until all that calls have asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, *values: Any) -> list[Tensor]:
        """Call with the tensors and ints of ``passed_inputs``, flat; returns the tensors of the result.

        What the model writes to among them is written.
        """
        if self.signature.state:
            with self._state.held():
                return self._run_writing(values)
        if self._writing.arguments:
            return self._run_writing(values)
        plan = self._plan(values)
        if self._is_direct and (tape := self._graphs.tape(plan)) is not None:
            with self._reported:
                return playing.results(self._session, tape, values, plan.storage, plan.scratch or 0)
        call = self._prepared(plan, values, {})
        self._invoke(call, values, ())
        results = self._results(call)
        plan.keep(call)
        return results

    def _run_writing(self, values: Sequence[Any]) -> list[Tensor]:
        """Call a function that writes to arguments, or has a state, which is held."""
        writing, state = self._writing, self._state
        plan = self._plan(values)  # refuses what cannot be passed before anything is made of it
        passed, bring_back = writing.lend(values, self._session)
        spare = state.spare(writing.state)
        call = self._prepared(plan, values, spare)
        state.begin(writing.state, spare, lambda: self._results(call) if call.outcome else None)
        self._invoke(call, passed, state.views(self._remembered))
        results = self._results(call)
        for argument, number in writing.results.items():
            values[argument].detach().copy_(results[number])
        for each in bring_back:
            each()
        state.finish(results)
        plan.keep(call)
        return results[: writing.first]

    def _prepared(self, plan: _Plan, values: Sequence[Any], spare: Mapping[int, Memory]) -> _Call:
        """A call with the arguments of ``run``; spare: where new values of the state are put, by number."""
        tape = self._graphs.tape(plan)
        session, storage = self._session, []
        allocate = session.allocate if tape is None else partial(playing.room, session)
        with self._reported:
            for number, each, kept in plan.placed:
                if number in spare:
                    storage.append(spare[number])
                elif kept is None:
                    storage.append(allocate(each))
                else:
                    storage.append(_taken(kept) or _legible(allocate(each)))
        return _Call(plan, values, spare, storage, tape)

    def _invoke(self, call: _Call, passed: Sequence[Any], state: Sequence[Any]) -> None:
        """Run the program with what is ``passed`` for the arguments, and the memory of the state."""
        session, plan = self._session, call.plan
        if plan.all_empty and not session.place.driver.on_host:
            return
        with self._reported:
            if call.tape is not None:
                self._play(call.tape, call, passed)
                return
            memory: list[Any] = [view for _, view in call.storage]
            if plan.scratch is not None:
                call.scratch = _taken(plan.kept_scratch) or session.scratch(plan.scratch)
                memory.append(call.scratch)
            if self._graphs.due(plan):
                playing.record(
                    session, self._graphs, plan, self._function, [*passed, *state], memory, call.outcome
                )
            else:
                memory = [*state, *memory]
                session.invoke(self._function, plan.views.of(passed, session), memory, call.outcome)

    def _play(self, tape: Tape, call: _Call, passed: Sequence[Any]) -> None:
        """Do what ``_invoke`` does with what was recorded of another call with this plan."""
        session, state = self._session, self._state
        given = [playing.presented(session, value) for value in passed]
        given += [state.tensor(name) for name in self._remembered]
        given += [tensor for tensor, _ in call.storage]
        if call.plan.scratch is not None:
            given.append(playing.scratch(session, call.plan.scratch))
        playing.play(session, tape, given, call.outcome)

    def _results(self, call: _Call) -> list[Any]:
        """All tensors that a call returned, which is over: None for one that is in the spare memory."""
        session, plan = self._session, call.plan
        if not call.outcome:
            return self._empty(plan)
        numbers = self._returned
        views = returned(call.outcome) if numbers or self.tensor_outputs is None else ()
        if self.tensor_outputs is None:
            return self._apart([session.to_torch(view, None) for view in views], call.values)
        if len(numbers) != len(views):
            raise RunError(f"{self.name} returned {len(views)} tensors, its signature says {len(numbers)}")
        results: list[Any] = [None] * len(self._dtypes)
        if views:
            given = [*map(session.to_torch, views, self._returned_dtypes)]
            for number, tensor in zip(numbers, self._apart(given, call.values), strict=True):
                results[number] = tensor
        for (number, *others), (tensor, _) in zip(self.signature.placed, call.storage, strict=True):
            if number not in call.spare:
                results[number] = tensor
            for other in others:
                results[other] = tensor.view(self._dtypes[other])
        for number, layout in self._strided:
            results[number] = ops.from_physical(results[number], plan.leading(number), layout)
        return self._checked(results) if self.signature.checks else results

    def _checked(self, results: list[Any]) -> list[Any]:
        """The results without those that tell whether the values of the arguments are allowed."""
        first = self._first_check
        for check, holds_ in zip(self.signature.checks, results[first:], strict=True):
            if not (all(holds_) if isinstance(holds_, memoryview) else holds_.all()):
                raise RunError(f"{self.name}: {check.name}")
        return results[:first]

    def _apart(self, results: list[Tensor], values: Sequence[Any]) -> list[Tensor]:
        """The results, those copied that lie in an argument, which IREE returns where nothing changes it."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        tensors += [self._state.tensor(name) for name in self._remembered]
        spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
        return [
            result.clone() if any(begin <= result.data_ptr() < end for begin, end in spans) else result
            for result in results
        ]

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
        key = tuple([(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else _key(x) for x in values])
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
        for numbers in self.signature.placed:
            number = numbers[0]
            shape = ops.physical_shape(plan.shape(number), layouts.get(number, "row"))
            keeps = session.place.driver.on_host and min(numbers) >= self._first_check
            storage = session.storage(shape, self._dtypes[number])
            plan.storage.append(storage)
            plan.placed.append((number, storage, [] if keeps else None))
        if self._scratch_size is not None:
            with self._reported:
                state = self._state.views(self._remembered)
                plan.scratch = session.query(self._scratch_size, [*values, *state], len(plan.placed) + 1)
        elif plan.placed:
            plan.scratch = 0
        plan.keeps_scratch = session.place.driver.on_host and 0 < (plan.scratch or 0) <= _SMALL
        return plan

    def _are_leaves(self, args: tuple[Any, ...]) -> bool:
        """Tell whether a call's arguments are those of ``run`` as they are."""
        if len(args) != self._positional:
            return False
        for x in args:  # noqa: SIM110  a generator takes another microsecond
            if not isinstance(x, Tensor):
                return False
        return True

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


def _legible(memory: Memory) -> Memory:
    """Memory of the host with the elements of its tensor of bools as Python reads them, which is quicker."""
    tensor, view = memory
    return (tensor.view(-1).numpy().data if isinstance(tensor, Tensor) else tensor), view


def _taken(kept: list[Any]) -> Any:
    """Memory that no other call has, or None; another thread may take the last first."""
    try:
        return kept.pop() if kept else None
    except IndexError:
        return None


@dataclass(slots=True)  # not frozen, which takes a microsecond more of each call
class _Call:
    """Hold one call: its plan and arguments, and the memory for results; ``spare`` is that of the state's."""

    plan: _Plan
    values: Sequence[Any]
    spare: Mapping[int, Memory]
    storage: list[Memory]
    tape: Tape | None
    outcome: Outcome = field(default_factory=list)
    scratch: Any = None


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
        self.placed: list[tuple[int, Storage, list[Memory] | None]] = []
        """For each of them the number of a result, and what is kept of it between calls; None where each call
        needs memory of its own, to hand it out."""
        self.kept_scratch: list[Any] = []
        self.keeps_scratch = False
        self.views = Views()
        self.scratch: int | None = None
        """The bytes of scratch memory to pass behind it; None where nothing is passed."""

    def keep(self, call: _Call) -> None:
        """Have the memory of a call, which is over, for later ones, as far as it is nobody's."""
        for (_, _, kept), memory in zip(self.placed, call.storage, strict=True):
            if kept is not None:
                kept.append(memory)
        if self.keeps_scratch and call.scratch is not None:
            self.kept_scratch.append(call.scratch)

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
