"""What a call of a program costs beside IREE's own invocation, on this CPU.

    python -m tools.bench.host

Calls alternate with bare ones: the same function of the same IREE context, with the very buffers of a call
before, so that threads that sleep between calls do so for both.  The difference of a pair is the host's part:
checks, memory for results, tensors that cross in both directions, and what the runtime guarantees.  Medians
are printed, and the difference of the fastest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from iree import runtime as iree
from transformers import LlamaConfig, LlamaForCausalLM

import lowering

_EPS = 1e-6
_CAPACITY = 256


class Norm(torch.nn.Module):
    """One kernel: two tensors in, one out."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.lowering.rms_norm(x, weight, _EPS)


class _Recorded:
    """An IREE context that remembers what it was called with last."""

    def __init__(self, context: Any):
        self._context = context
        self._last: tuple[Any, Any] | None = None

    def invoke(self, function: iree.VmFunction, arguments: iree.VmVariantList, results: Any) -> None:
        self._last = function, arguments
        self._context.invoke(function, arguments, results)

    def again(self) -> Callable[[], None]:
        """The last invocation, by itself."""
        assert self._last is not None
        invoke, (function, arguments) = self._context.invoke, self._last
        return lambda: invoke(function, arguments, iree.VmVariantList(4))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=3000, help="of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(f"load {os.getloadavg()[0]:.1f}, {options.calls} calls of each, microseconds")
    print(f"{'':24s} {'call':>8s} {'bare':>8s} {'host':>8s} {'fastest':>8s}")
    with torch.inference_mode():
        for name, (program, call) in {"norm, 3 tensors": norm(), "decode, 2 layers": decode()}.items():
            show(name, *pairs(program, call, options.calls))
    return 0


def norm() -> tuple[lowering.Program, Callable[[], Any]]:
    """A program of one kernel, and a call of it."""
    x, weight = torch.randn(1, 256), torch.randn(256)
    program = lowering.load(lowering.compile(Norm(), (x, weight)).vmfb)
    return program, lambda: program(x, weight)


def decode() -> tuple[lowering.Program, Callable[[], Any]]:
    """A decoder of a small Llama, and a call for one token."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=_CAPACITY,
    )
    model = LlamaForCausalLM(config).eval()
    functions = lowering.export_decoder(model, capacity=_CAPACITY)
    program = lowering.load(lowering.compile(functions).vmfb)
    token = torch.zeros(1, 1, dtype=torch.long)
    return program, lambda: program.decode(token)


def pairs(program: lowering.Program, call: Callable[[], Any], count: int) -> tuple[list[float], list[float]]:
    """Seconds of calls and of bare invocations, in turn; a state begins anew before it is full."""
    session = program._session
    context = session._context
    recorded = _Recorded(context)
    session._context = recorded  # pyright: ignore[reportAttributeAccessIssue]
    call()
    session._context = context
    bare, whole, alone = recorded.again(), [], []
    for number in range(count):
        if number % (_CAPACITY // 4) == 0:
            program.reset()
        for of, times in ((call, whole), (bare, alone)):
            start = time.perf_counter()
            of()
            times.append(time.perf_counter() - start)
    return whole, alone


def show(name: str, whole: list[float], alone: list[float]) -> None:
    """One line: medians of the calls, of the bare ones and of their differences; the fastest's difference."""
    differences = [1e6 * (one - other) for one, other in zip(whole, alone, strict=True)]
    call, bare = 1e6 * statistics.median(whole), 1e6 * statistics.median(alone)
    fastest = 1e6 * (min(whole) - min(alone))
    print(f"{name:24s} {call:8.1f} {bare:8.1f} {statistics.median(differences):8.1f} {fastest:8.1f}")


if __name__ == "__main__":
    sys.exit(main())
