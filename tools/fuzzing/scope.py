"""What grows a graph: values that are computed at both sizes as steps are added, so that shapes are known.

A step is kept if eager PyTorch computes it; there is no second account of what shape or dtype an operation
has.  An axis is dynamic where its size at the two calls is not the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .graph import HEADER, SIZES, Graph, Shape, Step, Tensor

_ELEMENTS = 50_000  # no value is larger
_MAGNITUDE = 1e5  # of ordinary values: beyond, 16-bit floats overflow at the next product
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)


class Value:
    """One value of a graph: its name, and itself at each size."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        self.name, self.tensors = name, tuple(tensors)

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def rank(self) -> int:
        return self.tensors[0].dim()

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The size of each axis, None for a dynamic one."""
        shapes = zip(*(t.shape for t in self.tensors), strict=True)
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in shapes)

    @property
    def last(self) -> int:
        """The size of the last axis; 0 where it is dynamic or there is none."""
        return (self.sizes[-1] if self.rank else 0) or 0

    @property
    def is_float(self) -> bool:
        """Tell whether arithmetic is done in it: fp8 is only stored."""
        return self.dtype in FLOATS

    def static(self) -> list[int]:
        """The axes that are not dynamic."""
        return [axis for axis, size in enumerate(self.sizes) if size is not None]

    def like(self, other: Value) -> bool:
        """Tell whether it has the shape of ``other``, at each size."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return self.rank == other.rank and all(a.shape == b.shape for a, b in pairs)

    def finite(self) -> bool:
        """Tell whether all of it is finite, at each size."""
        return not self.dtype.is_floating_point or all(bool(t.float().isfinite().all()) for t in self.tensors)

    def magnitude(self) -> float:
        """The largest magnitude at any size."""
        return max((float(t.float().abs().max()) for t in self.tensors if t.numel()), default=0.0)


class Unsuitable(Exception):
    """No value of the graph has what a step needs."""


class Scope:
    """A graph as it grows."""

    def __init__(self, seed: int, special: bool, sizes: tuple[tuple[int, ...], ...]) -> None:
        self.random, self.seed, self.special, self.call_sizes = random.Random(seed), seed, special, sizes
        self.arguments: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.steps: list[Step] = []
        self.values: dict[str, Value] = {}
        self.used: set[str] = set()
        self.count = 0
        self._made: dict[str, Any] = {}
        exec(HEADER, self._made)
        self._self = SimpleNamespace()

    # What steps ask for -----------------------------------------------------------------------------

    def choice(self, options: Sequence[Any]) -> Any:
        """One of ``options``."""
        return options[self.random.randrange(len(options))]

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.random.random() < share

    def pick(self, *needs: Callable[[Value], bool]) -> Value:
        """A value that has what is asked for; later ones more often."""
        fit = [v for v in self.values.values() if all(need(v) for need in needs)]
        if not fit:
            raise Unsuitable
        fresh = [v for v in fit if v.name not in self.used]
        return self.choice(fresh if fresh and self.chance(0.7) else fit)

    def real(self, *needs: Callable[[Value], bool]) -> Value:
        """A value of a float type that arithmetic is done in."""
        return self.pick(lambda v: v.is_float, *needs)

    def out(self) -> str:
        """The name of a new value."""
        self.count += 1
        return f"v{self.count}"

    def axis(self, value: Value, *, static: bool = False) -> int:
        """One of its axes, counted from the front or from the back."""
        axes = value.static() if static else list(range(value.rank))
        if not axes:
            raise Unsuitable
        axis = self.choice(axes)
        return axis - value.rank if self.chance(0.5) else axis

    def weight(self, shape: Shape, dtype: torch.dtype, kind: str = "weight") -> str:
        """A new parameter."""
        made = Tensor(f"self.w{len(self.weights)}", shape, _name(dtype), kind, self._seed())
        self.weights.append(made)
        setattr(self._self, made.name.removeprefix("self."), self._evaluated(made, ()))
        return made.name

    # How it grows -----------------------------------------------------------------------------------

    def argument(self, shape: Shape, dtype: torch.dtype, kind: str, same: str | None = None) -> None:
        """A new argument, or the argument ``same`` once more."""
        made = Tensor(f"a{len(self.arguments)}", shape, _name(dtype), kind, self._seed(), same)
        self.arguments.append(made)
        tensors = [self._evaluated(made, sizes) for sizes in self.call_sizes]
        self.values[made.name] = self.values[same] if same else Value(made.name, tensors)
        self.values[made.name] = Value(made.name, self.values[made.name].tensors)

    def add(self, step: Step) -> bool:
        """Add ``step`` if eager PyTorch computes it, at every size, to tensors of a reasonable size."""
        outs = []
        for turn in range(len(self.call_sizes)):
            names = {v.name: v.tensors[turn] for v in self.values.values()}
            try:
                with torch.no_grad():
                    exec(step.code, names := {**self._made, **names, "self": self._self})
            except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
                return False
            outs.append([names[out] for out in step.outs])
        found = [
            Value(name, tensors) for name, tensors in zip(step.outs, zip(*outs, strict=True), strict=True)
        ]
        if not all(map(self._reasonable, found)):
            return False
        self.steps.append(step)
        self.used |= step.reads
        self.values.update({value.name: value for value in found})
        return True

    def graph(self) -> Graph:
        """Give what has grown: every value that nothing reads is a result, and a few others are."""
        self.used -= {name for name in self.used if not name[1:].isdigit()}
        results = [name for name in self.values if name[0] == "v" and name not in self.used]
        results += [name for name in self.values if name in self.used and self.chance(0.08)]
        if self.chance(0.1):
            results.append(self.choice(results or list(self.values)))
        self.random.shuffle(results)
        return Graph(
            self.seed,
            self.special,
            self.call_sizes,
            tuple(self.arguments),
            tuple(self.weights),
            tuple(self.steps),
            tuple(results),
        ).live()

    def _seed(self) -> int:
        return self.random.randrange(10**6)

    def _evaluated(self, made: Tensor, sizes: Sequence[int]) -> torch.Tensor:
        if made.same:
            return self.values[made.same].tensors[0]
        return eval(made.source(), {**self._made, **dict(zip(SIZES, sizes, strict=False))})

    def _reasonable(self, value: Value) -> bool:
        if any(not isinstance(t, torch.Tensor) or t.numel() > _ELEMENTS for t in value.tensors):
            return False
        if self.special or value.dtype == torch.int64:
            return True
        return value.finite() and value.magnitude() < _MAGNITUDE


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
