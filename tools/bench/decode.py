"""One token of SmolLM2-135M on this CPU: compiled, quantized to fp8, beside eager PyTorch with its cache.

    make demo
    python -m tools.bench.decode

Every contender has read the same tokens.  They take turns, with a plain read of memory among them, which
tells how long the bytes of the weights and of the cache take at least; medians and fastest calls are printed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lowering
from tools import demo
from tools.decoding import Decoder, Eager, read, times

_READ = 1 << 28  # bytes of a read, far more than any cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if not demo.VMFB.exists():
        raise SystemExit(f"{demo.VMFB} is missing: run `make demo` first")
    with torch.inference_mode():
        program = lowering.load(demo.VMFB)
        _, model = demo.load_model()
        ids = torch.randint(1000, 40000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        calls = _contenders(program, model, ids)
        found = times(calls, options.rounds, options.turn)
    show(found, needed_bytes(program), len(ids[0]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=900, help="in the cache before (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each (default: %(default)s)")
    parser.add_argument("--turn", type=int, default=4, help="calls of a turn (default: %(default)s)")
    return parser


def _contenders(program: lowering.Program, model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Calls that decode one token each, by name, and one that reads memory."""
    memory = torch.ones(_READ // 4)
    narrow, capacity = copy.deepcopy(model).to(torch.bfloat16), demo.CAPACITY
    decoders: dict[str, Decoder] = {
        "vmfb, fp8 quantized": program,
        "eager, fp32, growing": Eager(model),
        "eager, fp32, static": Eager(model, capacity),
        "eager, bf16, growing": Eager(narrow),
        "eager, bf16, static": Eager(narrow, capacity),
    }
    tokens = {name: read(each, ids).argmax(-1)[:, None] for name, each in decoders.items()}
    return {
        "read": memory.sum,
        **{name: lambda n=name, each=each: each.decode(tokens[n]) for name, each in decoders.items()},
    }


def needed_bytes(program: lowering.Program) -> int:
    """Bytes that a token reads: all weights, of which the program mainly consists, and all of the cache."""
    return demo.VMFB.stat().st_size + sum(each.bytes for each in program.state())


def show(found: dict[str, list[float]], needed: int, tokens: int) -> None:
    """A line for each contender: median and fastest, over the time of the bytes, and over the program's."""
    kinds = (("median", statistics.median), ("fastest", min))
    print(f"{tokens} tokens before, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for kind, of in kinds:
        rate = _READ / of(found["read"])
        floor, own = needed / rate, of(found["vmfb, fp8 quantized"])
        print(f"{kind}: memory {rate / 1e9:.1f} GB/s, {needed / 1e6:.0f} MB take {1e3 * floor:.1f} ms")
        for name, seconds in found.items():
            if name != "read":
                one = of(seconds)
                print(
                    f"  {name:20s} {1e3 * one:7.1f} ms, {one / floor:5.2f} x bytes, {one / own:5.2f} x vmfb"
                )


if __name__ == "__main__":
    sys.exit(main())
