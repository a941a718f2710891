"""Keep what a program remembers from call to call: named tensors, apart for each session.

They are memory of the runtime's own, passed to a program behind the arguments of a call, which updates them
in place.  A tensor that a call computes as a whole has a second memory, where the new value is put; then
the two change places.

An interrupt (Ctrl-C) leaves the state as it is before a call, or as it is after it: Python raises it as
soon as the program has run, when tensors updated in place are new already and no others.  So a call notes
first what is to be done behind it, and whoever takes the state next does what was left.  Each step may be
done twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from iree import runtime as iree
from torch import Tensor

from .. import temporary
from ..errors import RunError, UsageError
from ..signature import TensorSpec
from .session import Memory, Session, dtype_name

# In the metadata of a file.
_KEY = "vmfuse.state"


@dataclass(frozen=True)
class StateTensor:
    """Describe one tensor that a program remembers."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


@dataclass(slots=True)  # not frozen, which takes a microsecond more of each call
class _Begun:
    """A call that changes the state.

    names: of the tensors that it computes as a whole, by number of the result.  before, after: their memory.
    results: gives what the call returned, None for what is in the memory of ``after``; None until it is over.
    """

    names: Mapping[int, str]
    before: Mapping[int, Memory]
    after: Mapping[int, Memory]
    results: Callable[[], Sequence[Tensor | None] | None]


class State:
    """The state of one session; memory is taken when it is first used.

    initial: gives the values that tensors begin with, by name; all others begin as zeros.
    """

    def __init__(
        self, session: Session, specs: Sequence[TensorSpec], initial: Callable[[], Mapping[str, Tensor]]
    ):
        self._session, self._initial = session, initial
        self._specs = {spec.name: spec for spec in specs}
        self._memory: dict[str, Memory] = {}
        self._spare: dict[str, Memory] = {}
        self._begun: _Begun | None = None
        # The thread that has the state.  No lock: an interrupt between taking it and the ``try`` would leave
        # it taken, while a thread that is here again has been interrupted.
        self._user: dict[str, int] = {}
        self._stream: int | None = None

    def __bool__(self) -> bool:
        return bool(self._specs)

    def another(self) -> State:
        """A state of the same tensors, with its own values, which begin as these did."""
        return State(self._session, tuple(self._specs.values()), self._initial)

    def held(self) -> State:
        """Keep other threads from it in a ``with``; RunError where one has it.  Its memory is there."""
        return self

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if self._user.setdefault("thread", thread) != thread:
            raise RunError(
                "another thread is using this session: its state is for one at a time; give each thread a "
                "session of its own, program.session()"
            )
        try:
            self._stream = self._session.ordered_after(self._stream)
            if not self._memory:
                self._allocate()
            if self._begun is not None:
                self._finish_interrupted(self._begun)
        except BaseException:
            self._user.pop("thread", None)
            raise

    def __exit__(self, *_: object) -> None:
        self._user.pop("thread", None)

    def views(self, names: Sequence[str]) -> list[iree.HalBufferView]:
        """The memory of tensors, as a program is passed it; the state is held."""
        memory = self._memory
        return [memory[name][1] for name in names]

    def tensor(self, name: str) -> Tensor:
        """The memory of a tensor, as torch knows it; the state is held."""
        return self._memory[name][0]

    def spare(self, names: Mapping[int, str]) -> dict[int, Memory]:
        """The memory that the new values of tensors are to be put in; the state is held."""
        for name in names.values():
            if name not in self._spare:
                self._spare[name] = self._new(self._specs[name])
        return {number: self._spare[name] for number, name in names.items()}

    def begin(
        self,
        names: Mapping[int, str],
        spare: Mapping[int, Memory],
        results: Callable[[], Sequence[Tensor | None] | None],
    ) -> None:
        """Note that a call begins whose results of these numbers are new values; the state is held.

        spare: where it puts them.  results: gives all results, None for those there; None until it is over.
        """
        before = {number: self._memory[name] for number, name in names.items()}
        self._begun = _Begun(names, before, spare, results)

    def finish(self, results: Sequence[Tensor | None]) -> None:
        """Take the new values of the call that was begun, which gave these results; the state is held."""
        begun = self._begun
        if begun is None:
            return
        for number, name in begun.names.items():
            value = results[number]
            if value is None and self._session.is_captured():
                # Whoever plays it again reads and writes the same memory each time.
                self._memory[name][0].copy_(begun.after[number][0])
            elif value is None:
                self._memory[name], self._spare[name] = begun.after[number], begun.before[number]
            else:
                self.put(name, value)
        self._begun = None

    def _finish_interrupted(self, begun: _Begun) -> None:
        with suppress(RunError):  # the call was refused by a check of its own, and said so
            results = begun.results()
            if results is not None:
                self.finish(results)
        self._begun = None

    def put(self, name: str, value: Tensor) -> None:
        """Give a tensor a new value; the state is held."""
        self._memory[name] = self._session.set(self._memory[name], value)

    def describe(self) -> tuple[StateTensor, ...]:
        """The tensors, in the order of the program."""
        specs = self._specs.values()
        return tuple(StateTensor(spec.name, _dtype(spec), _shape(spec), _bytes(spec)) for spec in specs)

    def values(self) -> dict[str, Tensor]:
        """Copies of the tensors, on the CPU."""
        with self.held():
            return {name: tensor.to("cpu", copy=True) for name, (tensor, _) in self._memory.items()}

    def reset(self) -> None:
        """Give all tensors the values they began with."""
        with self.held():
            self._begin()

    def _allocate(self) -> None:
        self._memory = {name: self._new(spec) for name, spec in self._specs.items()}
        self._begin()

    def _new(self, spec: TensorSpec) -> Memory:
        tensor, memory = self._session.allocate(self._session.storage(_shape(spec), _dtype(spec)))
        return tensor, self._session.passable(tensor, memory)

    def _begin(self) -> None:
        initial = self._initial()
        for name, memory in self._memory.items():
            self._memory[name] = self._session.set(memory, initial.get(name))

    # -- files -------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to ``path``, a safetensors file, all of it or nothing."""
        from safetensors.torch import save_file

        self._refuse_none()
        tensors = self.values()
        try:
            temporary.replace(Path(path), lambda file: save_file(tensors, file, {_KEY: "1"}))
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read the state from ``path``, which ``save`` has written; of a file that does not fit, nothing.

        Raises RunError for a file that cannot be read, is damaged, or holds the state of another program.
        """
        from safetensors import SafetensorError, safe_open

        self._refuse_none()
        try:
            with safe_open(path, framework="pt") as file:
                if _KEY not in (file.metadata() or {}):
                    raise RunError(f"{path} is not the state of a program: save() writes such a file")
                read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise RunError(f"{path} is no safetensors file, or it is damaged: {error}") from error
        self._check(path, read)
        with self.held():
            for name, tensor in read.items():
                self.put(name, tensor)

    def _check(self, path: str | os.PathLike[str], read: Mapping[str, Tensor]) -> None:
        """Refuse other tensors than the program's."""
        found = {name: f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" for name, tensor in read.items()}
        wanted = {spec.name: f"{spec.dtype}{list(_shape(spec))}" for spec in self._specs.values()}
        for name in (*wanted, *found):
            has, needs = found.get(name, "nothing"), wanted.get(name, "nothing")
            if has != needs:
                raise RunError(
                    f"{path} holds the state of another program: of {name} it has {has}, this one {needs}"
                )

    def _refuse_none(self) -> None:
        if not self._specs:
            raise RunError("the program has no state: its model writes to no buffer")


def _dtype(spec: TensorSpec) -> torch.dtype:
    return getattr(torch, spec.dtype)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size for size in spec.shape or () if isinstance(size, int))


def _bytes(spec: TensorSpec) -> int:
    return torch.Size(_shape(spec)).numel() * _dtype(spec).itemsize
