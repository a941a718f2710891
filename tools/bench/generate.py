"""Hugging Face ``generate()`` through torch.compile on this CPU, beside a program compiled ahead of time.

    python -m tools.bench.generate                 # a Llama of four layers with random weights
    python -m tools.bench.generate --smollm2       # SmolLM2-135M with its own, in float32

Each continues a prompt by 64 tokens, greedily: the program of ``lowering.export_decoder`` in a loop,
``generate()`` through torch.compile and in eager PyTorch, with each kind of cache.  The first calls of what
is compiled are listed with the programs that each compiled; then all take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lowering
from lowering import compiler
from tools.decoding import greedy, times
from tools.gpu.generate import TOKENS, llama

_CAPACITY, _PROMPT, _FIRST = 128, 16, 4
_CACHES = ("dynamic", "static")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", action="store_true", help="the model with its own weights")
    parser.add_argument(
        "--cache", nargs="+", choices=_CACHES, default=_CACHES, help="kinds of cache (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = _smollm2() if options.smollm2 else llama("cpu", torch.float32)
    with torch.inference_mode():
        calls = _contenders(model, options.cache)
        found = times(calls, options.rounds, 1)
    print(f"{TOKENS} tokens, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    own = statistics.median(next(iter(found.values())))
    for name, seconds in found.items():
        one = statistics.median(seconds)
        print(f"  {name:26s} {1e3 * one / TOKENS:7.2f} ms a token, {one / own:5.2f} x program")
    return 0


def _smollm2() -> Any:
    from tools.demo import load_model

    _, model = load_model()
    for parameter in model.parameters():  # at an address that is passed as it is
        parameter.data = parameter.data.clone()
    return model


def _contenders(model: Any, caches: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Calls that continue the prompt, by name; all that is compiled has been."""
    ids = torch.randint(1, 4096, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    program = lowering.load(lowering.compile(lowering.export_decoder(model, capacity=_CAPACITY)).vmfb)
    calls: dict[str, Callable[[], Any]] = {
        "program": lambda: list(itertools.islice(greedy(program, ids), TOKENS)),
    }
    eager = model.forward
    compiled = {kind: torch.compile(eager, backend="lowering") for kind in caches}
    for way, forwards in (("torch.compile", compiled), ("eager", dict.fromkeys(compiled, eager))):
        for cache, forward in forwards.items():
            calls[f"{way}, {cache} cache"] = _generating(model, ids, cache, forward)
    for name, call in calls.items():
        if name.startswith("torch.compile"):
            _settle(name, call)
    return calls


def _generating(model: Any, ids: torch.Tensor, cache: str, forward: Any) -> Callable[[], torch.Tensor]:
    """A call of ``generate()`` with a cache, and a forward of its own."""

    def generate() -> torch.Tensor:
        model.forward = forward
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )

    return generate


def _settle(name: str, call: Callable[[], Any]) -> None:
    """Make the first calls, a line for each."""
    compile = compiler.compile
    made = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        compiled = compile(*args, **kwargs)
        made += 1
        return compiled

    compiler.compile = counted
    try:
        for number in range(1, _FIRST + 1):
            made, start = 0, time.perf_counter()
            call()
            print(f"{name}, call {number}: {made} programs, {time.perf_counter() - start:.2f} s", flush=True)
    finally:
        compiler.compile = compile


if __name__ == "__main__":
    sys.exit(main())
