"""Tell how long importing and fusing takes as a model grows.

    python -m tools.bench.import_time                       # Llamas of 2, 4, 8 and 16 quantized layers
    python -m tools.bench.import_time --model deepseek      # DeepSeek-V3, real sizes, 8, 16, 32 and 61 layers
    python -m tools.bench.import_time --layers 2,4 --target h200

Steps 1 to 5 of the compiler, each timed: import, normalize, raise, sink, fuse.  Then the size of the IR as
text, which must not hold any weight, and what a layer adds.  Models are built on the meta device, so weights
of hundreds of gigabytes take no memory; Llama has hidden size 2048 and a small vocabulary.

Exit codes: 0 within --goal seconds of processor time at the largest size, 1 not.  For Llama all steps
count (20), for DeepSeek-V3 those behind import (10): import is PyTorch's own work first of all.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from iree.compiler import ir
from torch import Tensor, nn

import lowering
from lowering.importing.importer import Program, import_module
from lowering.steps import BY_NAME, State
from lowering.targets import resolve
from patterns.sites import Ledger
from tools.command_line import numbers, write_json


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config)


def _deepseek(layers: int) -> nn.Module:
    """DeepSeek-V3 as published, but for its depth; the first three layers are dense there."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(num_hidden_layers=layers, first_k_dense_replace=3))


@dataclass(frozen=True)
class Model:
    """Hold what is measured: how to build it, at which depths, and the goal for which steps."""

    build: Callable[[int], nn.Module]
    layers: tuple[int, ...]
    goal: float
    first_step: int


MODELS = {
    "llama": Model(_llama, (2, 4, 8, 16), 20.0, first_step=0),
    "deepseek": Model(_deepseek, (8, 16, 32, 61), 10.0, first_step=1),
}


class Logits(nn.Module):
    """Token ids [1, T] to logits: a model of some depth with quantized linear layers, on the meta device."""

    def __init__(self, model: Model, layers: int) -> None:
        super().__init__()
        with torch.device("meta"):
            built = nn.Module.to(model.build(layers), torch.bfloat16)
            built = lowering.quantize(built)
        self.model = built.eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Measured:
    """One depth: seconds of processor time of each step, sites, bytes of weights and of IR text."""

    layers: int
    seconds: dict[str, float]
    elapsed: float
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
    model = MODELS[options.model]
    measure(model, 4, options.target)  # warm: modules are imported, dialects are loaded
    found = []
    print(f"load {os.getloadavg()[0]:.1f}; seconds of processor time, the fastest of {options.repeat}")
    for layers in options.layers or model.layers:
        runs = [measure(model, layers, options.target) for _ in range(options.repeat)]
        found.append(min(runs, key=lambda run: run.total))
        print(line(found[-1]), flush=True)
    if len(found) > 1:
        print(growth(found[0], found[-1]))
    write_json(options.json, [asdict(one) for one in found])
    goal = model.goal if options.goal is None else options.goal
    counted = sum(list(found[-1].seconds.values())[model.first_step :])
    print(f"{counted:.2f} s counted at {found[-1].layers} layers; the goal is {goal:g}")
    return 0 if counted < goal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama", help="default: %(default)s")
    parser.add_argument("--layers", type=numbers, help="depths, as 2,4,8 (default: the model's own)")
    parser.add_argument("--target", default="cpu", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each depth (default: %(default)s)")
    parser.add_argument("--goal", type=float, help="seconds allowed (default: the model's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found to FILE")
    return parser


def measure(model: Model, layers: int, target_name: str) -> Measured:
    """Import and fuse a model of ``layers`` layers."""
    module, target, ledger = Logits(model, layers), resolve(target_name), Ledger()
    ids = torch.zeros(1, 16, dtype=torch.int64, device="meta")
    tokens = torch.export.Dim("T", min=2, max=2048)
    seconds: dict[str, float] = {}
    gc.collect()
    begun = time.perf_counter()
    with ir.Context() as context, ir.Location.unknown():
        start = time.process_time()
        program = import_module(module, (ids,), context, dynamic_shapes=({1: tokens},))
        seconds["import"] = time.process_time() - start
        function = program.main()
        state = State(program.module, function, target, ledger, Path())
        for step in (BY_NAME[name] for name in ("normalize", "raise", "sink", "fuse")):
            start = time.process_time()
            step.run(state)
            seconds[step.name] = time.process_time() - start
        elapsed = time.perf_counter() - begun
        text = len(program.module.operation.get_asm())
    fused = sum(record.fused for record in ledger.records)
    unfused = len(ledger.records) - fused
    return Measured(layers, seconds, elapsed, fused, unfused, weight_bytes(program), text)


def weight_bytes(program: Program) -> int:
    """Bytes of the tensors the program's globals name."""
    return sum(tensor.nbytes for tensor in program.parameters.values())


def line(one: Measured) -> str:
    """One depth in a line."""
    steps = "  ".join(f"{name} {value:.2f}" for name, value in one.seconds.items())
    sizes = f"IR text {one.text / 1e3:.0f} kB, weights {one.weights / 1e6:.0f} MB"
    return (
        f"{one.layers:3d} layers: {one.total:6.2f} = {steps} ({one.elapsed:.1f} elapsed); "
        f"{one.fused} fused, {one.unfused} not; {sizes}"
    )


def growth(first: Measured, last: Measured) -> str:
    """Give what a layer adds, and the total beside what proportional growth would give."""
    more = last.layers - first.layers
    seconds, text = (last.total - first.total) / more, (last.text - first.text) / more
    ratio, depth = last.total / first.total, last.layers / first.layers
    costs = f"a layer adds {seconds:.2f} s and {text / 1e3:.1f} kB"
    return f"{costs}; {depth:.0f}x the layers take {ratio:.1f}x the time"


if __name__ == "__main__":
    sys.exit(main())
