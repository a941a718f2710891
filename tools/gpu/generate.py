"""Generate with an unedited Hugging Face model through torch.compile, on a GPU or the CPU, beside eager PyTorch.

    python -m tools.gpu.generate                   # where compiler, transformers and GPU are
    python -m tools.gpu.generate --device cpu

A small Llama with random weights continues two prompts, one of them padded, by 64 tokens, with each kind of cache:
in float32, where the tokens must be eager's, and in bfloat16, where two logits may be equal and the tokens are
counted.  Prints a line for each, with the programs that were compiled and the seconds of a second run.

Exit codes: 0 all is well, 1 other tokens in float32 or more than three programs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowering import compiler, dynamo

TOKENS, MOST_PROGRAMS = 64, 3


def llama(device: str, dtype: torch.dtype) -> nn.Module:
    """Four layers; two prompts are its input in ``generated``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        pad_token_id=0,
        eos_token_id=None,
    )
    return nn.Module.to(LlamaForCausalLM(config).eval(), device, dtype)


def generated(model: nn.Module, device: str, cache: str) -> tuple[Tensor, float]:
    """The tokens, and the seconds of a second run."""
    ids = torch.randint(1, 4096, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        tokens = model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        ).cpu()
        seconds = time.perf_counter() - begin
    return tokens, seconds


def check(device: str, dtype: torch.dtype, cache: str) -> bool:
    """Compare one way of generating; tells whether it is right."""
    model, programs = llama(device, dtype), 0
    compile = compiler.compile

    def counted(*args, **kwargs):
        nonlocal programs
        programs += 1
        return compile(*args, **kwargs)

    torch.compiler.reset()
    expected, eager = generated(model, device, cache)
    model.forward = torch.compile(model.forward, backend=dynamo.backend)
    compiler.compile = counted
    try:
        found, ours = generated(model, device, cache)
    finally:
        compiler.compile = compile
    same = int((found == expected).long().cumprod(-1)[:, 9:].sum())
    print(
        f"{dtype} {cache} cache: {same} of {2 * TOKENS} tokens as in eager before any other, {programs} programs, "
        f"{ours:.3f} s (eager {eager:.3f} s)",
        flush=True,
    )
    return programs <= MOST_PROGRAMS and (dtype != torch.float32 or bool(same == 2 * TOKENS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    options = parser.parse_args(arguments)
    with torch.inference_mode():
        right = [
            check(options.device, dtype, cache)
            for dtype in (torch.float32, torch.bfloat16)
            for cache in ("dynamic", "static")
        ]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
