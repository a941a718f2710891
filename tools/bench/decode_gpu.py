"""One token of a model of SmolLM2-135M's shape on a GPU, beside PyTorch, eager and compiled with CUDA graphs.

    python -m tools.bench.decode_gpu pack DIR --target h200   # where the compilers are; needs no GPU
    python -m tools.bench.decode_gpu run DIR                  # on the GPU

The weights are random, the same wherever they are drawn.  The program's are quantized to fp8, PyTorch's are
bfloat16, and both have a static cache.  Before anything is timed the program's logits are compared with those
of the same quantized model in eager PyTorch.  The contenders take turns; printed are the median wall time of
a call with its wait, how many times the program's it is, and whether the program's calls are graphs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowering
from tools.decoding import Decoder, Eager, medians, read

CAPACITY, GROUP = 1024, 64
LARGEST = 6e-2  # of the range of the logits: bfloat16 sums decide steps of fp8, in each of 30 layers


def model() -> Any:
    """The model in bfloat16, on the cpu."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=CAPACITY,
        tie_word_embeddings=True,
    )
    return torch.nn.Module.to(LlamaForCausalLM(config), torch.bfloat16).eval().requires_grad_(False)


def quantized() -> Any:
    """The same with fp8 weights in all layers but the head."""
    return lowering.quantize(model(), group_size=GROUP)


def pack(directory: Path, target: str) -> None:
    """Compile both functions, the weights in a file of their own."""
    directory.mkdir(parents=True, exist_ok=True)
    functions = lowering.export_decoder(quantized(), batch=1, capacity=CAPACITY)
    compiled = lowering.compile(functions, target=target, parameters=directory / "decoder.irpa")
    compiled.save(directory / "decoder.vmfb")
    print(compiled.report.summary())


class Compiled(Eager):
    """The model through torch.compile, its calls CUDA graphs."""

    def __init__(self, model: Any, capacity: int) -> None:
        super().__init__(model, capacity)
        self._step = torch.compile(super().decode, mode="reduce-overhead")

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return super().decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(ids)


def run(directory: Path, tokens: int, rounds: int) -> None:
    """Compare, then time everything behind ``tokens`` tokens."""
    device, plain = torch.device("cuda"), model().to("cuda")
    program = lowering.load(directory / "decoder.vmfb", device="cuda", parameters=directory / "decoder.irpa")
    ids = torch.randint(49152, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    token, reference = ids[:, -1:], Eager(quantized().to(device), CAPACITY)
    expected, found = ([read(each, ids), each.decode(token)] for each in (reference, program))
    for want, got in zip(expected, found, strict=True):
        error = ((got - want).abs().max() / (want.max() - want.min())).item()
        print(f"largest difference from eager {error:.1e} of the range")
        if not error <= LARGEST:
            raise SystemExit("the program's logits are not those of the quantized model")
    contenders: dict[str, Decoder] = {
        "vmfb, fp8": program,
        "eager, bf16": Eager(plain, CAPACITY),
        "torch.compile graphs, bf16": Compiled(plain, CAPACITY),
    }
    for decoder in contenders.values():
        read(decoder, ids)
        for _ in range(4):  # what is compiled or recorded is so by then
            decoder.decode(token)

    def call(decoder: Decoder) -> None:
        decoder.decode(token)
        torch.cuda.synchronize()

    calls = {name: lambda each=each: call(each) for name, each in contenders.items()}
    seconds = medians(calls, rounds, 5)
    print(f"decode: {program['decode'].explain_call(token)}")
    for name, each in seconds.items():
        print(f"{name:28s} {1e6 * each:9.0f} us {each / seconds['vmfb, fp8']:6.2f} x")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("pack", "run"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--target", default="h200", help="what to compile for (pack)")
    parser.add_argument("--tokens", type=int, default=900, help="in the cache before (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        pack(options.directory, options.target)
    else:
        with torch.inference_mode():
            run(options.directory, options.tokens, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
