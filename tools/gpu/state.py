"""Check state in place on a GPU: values, sessions, files, time that does not grow with the capacity.

    python -m tools.gpu.state pack DIR --target h200     # where the compilers are; needs no GPU
    python -m tools.gpu.state run DIR                    # on the GPU, or on the cpu for --target cpu

A cache of several capacities is updated and a window of it read, and a small Llama generates with
``export_decoder``.  Everything is compared with eager PyTorch on the same device.  Prints a line for each check
and writes all figures to DIR/state.json.  Exit codes: 0 all is well, 1 something failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowering

CAPACITIES = (1024, 65536)
HEADS, SIZE, READ = 8, 128, 512
_CALLS, _TOKENS, _GROWTH = 300, 60, 1.25


class Cache(nn.Module):
    """Append a token to a bfloat16 cache and read a window of fixed size of it."""

    def __init__(self, capacity: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(HEADS, capacity, SIZE, dtype=torch.bfloat16))
        self.register_buffer("length", torch.zeros(1, dtype=torch.long))

    def forward(self, key: Tensor) -> Tensor:
        self.keys.index_copy_(1, self.length, key)  # type: ignore[operator]
        self.length.add_(1)  # type: ignore[operator]
        return self.keys[:, :READ].float().sum(1)  # type: ignore[index]


def key() -> Tensor:
    return torch.randint(-4, 5, (HEADS, 1, SIZE)).bfloat16()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def decoder() -> dict[str, Any]:
    return lowering.export_decoder(llama(), batch=1, capacity=128, prompt=16)


def pack(directory: Path, target: str) -> None:
    """Compile all programs for ``target``."""
    directory.mkdir(parents=True, exist_ok=True)
    for capacity in CAPACITIES:
        compiled = lowering.compile(Cache(capacity), (key(),), target=target)
        compiled.save(directory / f"cache{capacity}.vmfb")
        print(f"cache of {capacity}: {compiled.report.state[0].functions}")
    lowering.compile(decoder(), target=target).save(directory / "llama.vmfb")


def check_cache(directory: Path, capacity: int) -> dict[str, float]:
    """Values, a session beside it, a file; the microseconds of a call, and the bytes that calls left behind."""
    program = lowering.load(directory / f"cache{capacity}.vmfb")
    device, model = program["main"].device, Cache(capacity)
    other, model = program.session(), model.to(device)
    for _ in range(20):
        new = key().to(device)
        assert torch.equal(program(new), model(new)), "a call differs from eager"
    kept = program.state_dict()
    assert torch.equal(kept["keys"], model.keys.cpu()), "the cache differs from eager's"  # type: ignore[union-attr]
    assert int(other.state_dict()["length"]) == 0, "a session has another's state"
    program.save(directory / "state.safetensors")
    other.load(directory / "state.safetensors")
    assert torch.equal(other(new), model(new)), "a state that was saved and loaded differs"
    program.reset()
    before = _allocated(device)
    times = [_seconds(program, new) for _ in range(_CALLS)]
    return {"us": statistics.median(times) * 1e6, "left": _allocated(device) - before}


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _seconds(program: lowering.Program, new: Tensor) -> float:
    begin = time.perf_counter()
    program(new)
    _wait(new.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    """A call of a program returns before the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_llama(directory: Path) -> dict[str, float]:
    """The greedy tokens of a prompt, compiled with its cache and eager without one; microseconds a token."""
    program = lowering.load(directory / "llama.vmfb")
    device, model = program["decode"].device, llama()
    model, prompt = model.to(device), torch.arange(7)[None].to(device)
    lengths = torch.tensor([7], device=device)
    tokens = [program.prefill(prompt, lengths).argmax(-1)[:, None]]
    begin = time.perf_counter()
    for _ in range(_TOKENS - 1):
        tokens.append(program.decode(tokens[-1]).argmax(-1)[:, None])
    _wait(device)
    seconds = time.perf_counter() - begin
    ids = prompt
    with torch.no_grad():
        for _ in range(_TOKENS):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(tokens, 1), ids[:, 7:]), "the tokens differ from eager's without a cache"
    return {"us": seconds / (_TOKENS - 1) * 1e6}


def run(directory: Path) -> bool:
    """Run every check; tells whether all is well."""
    figures: dict[str, Any] = {f"cache{capacity}": check_cache(directory, capacity) for capacity in CAPACITIES}
    figures["llama"] = check_llama(directory)
    small, large = (figures[f"cache{capacity}"]["us"] for capacity in CAPACITIES)
    figures["growth"] = large / small
    (directory / "state.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, found in figures.items():
        print(f"{name}: {found}")
    well = figures["growth"] < _GROWTH
    print("state is updated in place" if well else f"a call takes longer with the capacity: {large / small:.2f} x")
    return well


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.state", description=__doc__)
    parser.add_argument("step", choices=("pack", "run"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--target", default="h200")
    options = parser.parse_args(arguments)
    if options.step == "pack":
        pack(options.directory, options.target)
        return 0
    return 0 if run(options.directory) else 1


if __name__ == "__main__":
    sys.exit(main())
