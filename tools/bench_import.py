"""How long importing and fusing takes as a model grows: Llamas of 2, 4, 8 and 16 quantized layers.

    python tools/bench_import.py
    python tools/bench_import.py --layers 2,4 --target h200

Steps 1 to 5 of the compiler, each timed: import, normalize, raise, sink, fuse.  Then the size of the IR as
text, which must not hold any weight, and what a layer adds.  Weights are allocated and never touched, so a
model of gigabytes needs little memory; hidden size 2048, a small vocabulary.

Exit codes: 0 within --goal seconds at the largest size, 1 not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from iree.compiler import ir
from torch import Tensor, nn

import lowering
from lowering.dispatch import supported
from lowering.fuse import fuse
from lowering.importer import Program, import_module
from lowering.normalize import normalize
from lowering.raising import raise_function
from lowering.targets import resolve
from lowering.views import sink_views
from patterns.sites import Ledger


class Logits(nn.Module):
    """Token ids [1, T] to logits: a Llama of the given depth with quantized linear layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=1024,
        )
        with torch.device("meta"):
            model = nn.Module.to(LlamaForCausalLM(config), torch.bfloat16)
            model = lowering.quantize(model)
        self.model = model.to_empty(device="cpu").eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Measured:
    """One depth: seconds of each step, sites, bytes of weights and of IR text."""

    layers: int
    seconds: dict[str, float]
    fused: int
    unfused: int
    weights: int
    text: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own
    measure(1, options.target)  # warm: modules are imported, dialects are loaded
    found = []
    print(f"load {os.getloadavg()[0]:.1f}; seconds, the faster of {options.repeat}")
    for layers in options.layers:
        runs = [measure(layers, options.target) for _ in range(options.repeat)]
        found.append(min(runs, key=lambda run: run.total))
        print(line(found[-1]), flush=True)
    if len(found) > 1:
        print(growth(found[0], found[-1]))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    return 0 if found[-1].total < options.goal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=_numbers, default=[2, 4, 8, 16], help="default: 2,4,8,16")
    parser.add_argument("--target", default="cpu", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each depth (default: %(default)s)")
    parser.add_argument("--goal", type=float, default=20.0, help="seconds allowed (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found to FILE")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(layers: int, target_name: str) -> Measured:
    """Import and fuse a model of ``layers`` layers."""
    model, target, ledger = Logits(layers), resolve(target_name), Ledger()
    ids = torch.zeros(1, 16, dtype=torch.int64)
    tokens = torch.export.Dim("T", min=2, max=2048)
    seconds: dict[str, float] = {}
    gc.collect()
    with ir.Context() as context, ir.Location.unknown():
        start = time.perf_counter()
        program = import_module(model, (ids,), context, dynamic_shapes=({1: tokens},))
        seconds["import"] = time.perf_counter() - start
        function = program.main()
        steps: dict[str, Callable[[], object]] = {
            "normalize": lambda: normalize(function),
            "raise": lambda: raise_function(function, ledger),
            "sink": lambda: sink_views(function),
            "fuse": lambda: fuse(function, ledger, supported(target)),
        }
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - start
        text = len(program.module.operation.get_asm())
    fused = sum(record.fused for record in ledger.records)
    return Measured(layers, seconds, fused, len(ledger.records) - fused, weight_bytes(program), text)


def weight_bytes(program: Program) -> int:
    """Bytes of the tensors the program's globals name."""
    return sum(tensor.nbytes for tensor in program.parameters.values())


def line(one: Measured) -> str:
    """One depth in a line."""
    steps = "  ".join(f"{name} {value:.2f}" for name, value in one.seconds.items())
    sizes = f"IR text {one.text / 1e3:.0f} kB, weights {one.weights / 1e6:.0f} MB"
    return (
        f"{one.layers:3d} layers: {one.total:6.2f} = {steps}; {one.fused} fused, {one.unfused} not; {sizes}"
    )


def growth(first: Measured, last: Measured) -> str:
    """What a layer adds, and the total beside what proportional growth would give."""
    more = last.layers - first.layers
    seconds, text = (last.total - first.total) / more, (last.text - first.text) / more
    ratio, depth = last.total / first.total, last.layers / first.layers
    costs = f"a layer adds {seconds:.2f} s and {text / 1e3:.1f} kB"
    return f"{costs}; {depth:.0f}x the layers take {ratio:.1f}x the time"


if __name__ == "__main__":
    sys.exit(main())
