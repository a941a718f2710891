"""Compile for ``torch.compile(model, backend="lowering")``: one program per graph, whatever its sizes are.

Dynamo makes the graphs and decides which sizes are open; those are dynamic dimensions of the program.  It is
for inference: a program has no gradient.  Weights are arguments of the graphs, so they are shared with the
model, and only what the graph writes is written.  A graph that cannot be compiled runs in eager PyTorch,
after one warning.  A program lives as long as its graph.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from .errors import ArgumentError, CompileError, UnfusedError, UsageError
from .report.report import Report
from .targets import TARGETS

if TYPE_CHECKING:
    from .runtime.program import Program

# What torch.compile calls modes; programs are compiled in one way, so they say nothing here.
_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# A size that the graph's own code decides by has a program of its own; this many, and the rest is eager's.
_MOST_PROGRAMS = 8
# What IREE's CPU driver takes as it is, and how much of other memory is worth a word.
_ALIGNMENT, _MUCH = 64, 2**20


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(options={...})`` may ask for.

    require_fused: raise UnfusedError at the first call of a graph with a site that no kernel computes.
    report: a file (.json or .html) for the report of the first graph that is compiled; those of others are
    beside it, numbered.
    """

    require_fused: bool = False
    report: str | os.PathLike[str] | None = None

    @staticmethod
    def of(options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Those given; UsageError names what there is not."""
        known = Options.__dataclass_fields__
        unknown = [name for name in options or {} if name not in known]
        if unknown:
            raise UsageError(f"no option {', '.join(unknown)}: there are {', '.join(known)}")
        if mode not in _MODES:
            raise UsageError(f"no mode {mode!r}: there are {', '.join(filter(None, _MODES))}")
        return Options(**(options or {}))


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A callable for ``graph`` that compiles at its first call.

    mode: any of torch.compile's, without effect.  options: see ``Options``.  At a call it raises UsageError
    where a gradient is asked for or tensors are on a device that no target is for, UnfusedError as
    ``options`` say; it warns once where the graph runs in eager PyTorch, and says why.
    """
    return _Compiled(graph, Options.of(options, mode))


class _Compiled:
    """The programs of one graph."""

    alive: ClassVar[weakref.WeakSet[_Compiled]] = weakref.WeakSet()

    def __init__(self, graph: fx.GraphModule, options: Options):
        self.alive.add(self)
        self.graph, self.options = graph, options
        self._programs: list[Callable[..., Any]] = []
        self._sizes: set[Any] = set()  # that programs have been compiled for
        self._complete = False  # no other program is compiled
        self._compiling = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            raise UsageError(
                'torch.compile(backend="lowering") is for inference, and a gradient is asked for: call the '
                "model under torch.inference_mode() or torch.no_grad(), or model.requires_grad_(False)"
            )
        with torch.no_grad():
            number, refused = 0, None
            while True:
                try:
                    return self._program(number, inputs, refused)(*inputs)
                except ArgumentError as error:  # it has not begun
                    number, refused = number + 1, error

    def _program(
        self, number: int, inputs: tuple[Any, ...], refused: ArgumentError | None
    ) -> Callable[..., Any]:
        """The program to try after ``number`` others, the last of which ``refused``.

        A new one is compiled for sizes that there is none for; where that cannot be, it is the graph itself,
        now and for all sizes to come, since each attempt would take as long.
        """
        if number < len(self._programs):
            return self._programs[number]
        with self._compiling:
            if number < len(self._programs):  # by another thread
                return self._programs[number]
            sizes = tuple(x.shape if isinstance(x, Tensor) else x for x in inputs)
            if self._complete or sizes in self._sizes or number == _MOST_PROGRAMS:
                return self._eager(refused)
            self._sizes.add(sizes)
            try:
                self._programs.append(_compile(self.graph, inputs, self.options))
            except CompileError as error:
                return self._eager(error)
            return self._programs[number]

    def forget(self) -> None:
        """Let go of the programs."""
        self._programs.clear()

    def _eager(self, why: Exception | None) -> Callable[..., Any]:
        if not self._complete:
            self._complete = True
            warnings.warn(
                f'torch.compile(backend="lowering") leaves a graph to eager PyTorch: {why}', stacklevel=4
            )
        return self.graph


@atexit.register
def _forget() -> None:
    """Dynamo keeps its graphs until the interpreter has gone, when IREE's objects can no longer be freed."""
    for each in list(_Compiled.alive):
        each.forget()


def _compile(graph: fx.GraphModule, inputs: tuple[Any, ...], options: Options) -> Callable[..., Any]:
    from . import compiler
    from .importing.dynamo_graphs import Parts
    from .runtime import program as runtime

    device, parts = _device(inputs), Parts.of(graph)

    def compiled_for(shapes: Any) -> compiler.Compiled:
        args = parts.passed(inputs)
        return compiler.compile(parts.module, args, dynamic_shapes=shapes, target=_target(device))

    try:
        compiled = compiled_for(parts.shapes(named=True))
    except CompileError:
        if not any(parts.open):
            raise
        # Sizes that the graph ties together, or to a number, without Dynamo's knowing.
        compiled = compiled_for(parts.shapes(named=False))
    _report(compiled.report, options)
    _warn_of_copies(parts.passed(inputs))
    # It has been in this memory ever since it was made.
    loaded = runtime.load(compiled.vmfb, _place(device), check="headers")
    return parts.called_with(_across_devices(loaded, device, parts.homes))


_reports: Counter[Path] = Counter()  # that this process wrote, by the path that was asked for


def _report(report: Report, options: Options) -> None:
    if options.report is not None:
        path = Path(options.report)
        number, _reports[path] = _reports[path], _reports[path] + 1
        report.write(path.with_stem(f"{path.stem}-{number}") if number else path)
    if options.require_fused and report.unfused:
        sites = [f"  {s.op} at {s.location}: {s.reason}" for s in dict.fromkeys(report.unfused)]
        raise UnfusedError("\n".join([f"require_fused: {len(sites)} sites did not fuse", *sites]))


def _warn_of_copies(inputs: Sequence[Any]) -> None:
    """Say how to keep large tensors from being copied in each call, as weights mapped from a file are."""
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.device.type == "cpu"]
    copied = sum(x.nbytes for x in tensors if x.data_ptr() % _ALIGNMENT or not x.is_contiguous())
    if copied >= _MUCH:
        warnings.warn(
            f'torch.compile(backend="lowering") copies {copied / 2**20:.0f} MiB of tensors in each call, '
            f"which do not begin at a multiple of {_ALIGNMENT} bytes or are not contiguous; for weights, "
            "once: for p in model.parameters(): p.data = p.data.clone(memory_format=torch.contiguous_format)",
            stacklevel=6,
        )


def _across_devices(
    program: Program, device: torch.device, homes: Sequence[torch.device | None]
) -> Callable[..., Any]:
    """``program`` for arguments that are not all on its device, such as a length on the CPU.

    homes: where its results are to be; None: no tensor.
    """
    written = [item.argument for item in program[next(iter(program.functions))].signature.written]

    def call(*args: Any) -> Any:
        given = [x.to(device) if isinstance(x, Tensor) else x for x in args]
        results = program(*given) or ()  # a graph may do nothing but write
        for number in written:
            if given[number] is not args[number]:
                args[number].copy_(given[number])
        return tuple(x if home is None else x.to(home) for x, home in zip(results, homes, strict=True))

    return call


def _device(inputs: tuple[Any, ...]) -> torch.device:
    """Where a graph runs: on the GPU that any of its tensors are on, or on the CPU."""
    devices = {x.device for x in inputs if isinstance(x, Tensor)} - {torch.device("cpu")}
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        found = ", ".join(sorted(map(str, devices)))
        raise UsageError(f"tensors on {found}: a graph must be on the cpu or on one GPU")
    return devices.pop() if devices else torch.device("cpu")


def _place(device: torch.device) -> str:
    """The device as the runtime names it; a ROCm build of torch calls its devices cuda too."""
    return str(device).replace("cuda", "hip") if torch.version.hip else str(device)


def _target(device: torch.device) -> str:
    """The name of the target of a device."""
    name = "cpu" if device.type == "cpu" else _gpu(torch.cuda.get_device_properties(device))
    if name not in {target.name for target in TARGETS}:
        raise UsageError(f"no target for this GPU, {name}")
    return name


def _gpu(properties: Any) -> str:
    """The same of what torch says of a GPU; a ROCm build calls its devices cuda too."""
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"  # gcnArchName is the name of the product there
