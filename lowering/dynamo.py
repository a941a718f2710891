"""Compile for ``torch.compile(model, backend="lowering")``: one program per graph and set of sizes.

For inference: the program has no gradient.  Weights are arguments of the graphs Dynamo makes, so
they are shared with the model, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import UsageError
from .targets import TARGETS


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A callable for ``graph`` that compiles at its first call with each set of sizes.

    Raises CompileError at that call when the graph cannot be compiled, UsageError when its tensors
    are on a device no target is for.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    def call(*inputs: Any) -> Any:
        key = tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in inputs)
        if key not in programs:
            programs[key] = _compile(graph, inputs)
        return programs[key](*inputs)

    return torch.no_grad()(call)


def _compile(graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    from . import compiler
    from .runtime import program as runtime

    program = compiler.compile(graph, inputs, target=_target(inputs)).vmfb
    return runtime.load(program, check="headers")  # it has been in this memory ever since it was made


def _target(inputs: tuple[Any, ...]) -> str:
    """The target of the device the tensors are on."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)} or {torch.device("cpu")}
    kinds = {device.type for device in devices}
    if kinds == {"cpu"}:
        return "cpu"
    if kinds == {"cuda"}:
        properties = torch.cuda.get_device_properties(next(iter(devices)))
        # A ROCm build of torch calls its devices cuda too, and knows their gfx name.
        name = (
            getattr(properties, "gcnArchName", "").split(":")[0] or f"sm_{properties.major}{properties.minor}"
        )
        if name in {target.name for target in TARGETS}:
            return name
        raise UsageError(f"no target for this GPU, {name}")
    raise UsageError(f"tensors on {', '.join(sorted(kinds))}: a graph must be on the cpu or on one GPU")
