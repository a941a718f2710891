"""Numbers that a model keeps in Python are constants of its graph: what depends on them is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    StaticCache,
)

import lowering
from lowering import CompileError
from tests.checkpoints.test_decoder import SIZES


class Positions(nn.Module):
    """A cache whose next place is a number."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, 4))
        self.position = 0

    def forward(self, x: Tensor) -> Tensor:
        self.cache[self.position] = x
        self.position += 1
        return self.cache.sum(0)


class Counts(nn.Module):
    """What it counts is not computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


def test_a_place_that_is_a_number_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        lowering.compile(Positions(), (torch.ones(4),))
    said = str(caught.value)
    assert "position went from 0 to 1 while Positions was exported (" in said
    assert "test_python_numbers.py:" in said
    assert "make it a buffer, a tensor of int64" in said


def test_a_number_that_nothing_depends_on_is_left_alone() -> None:
    program = lowering.load(lowering.compile(Counts(), (torch.ones(4),)).vmfb)
    assert torch.equal(program(torch.arange(4.0)), torch.arange(4.0) * 2)


class Holder(nn.Module):
    """A model with transformers' own static cache."""

    def __init__(self, model: Any, argument: str = "past_key_values") -> None:
        super().__init__()
        self.argument = argument
        self.model, self.kept = model, StaticCache(config=model.config, max_cache_len=16)

    def initialize(self) -> None:
        self.kept.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=True, **{self.argument: self.kept}).logits


def test_a_static_cache_with_windows_names_what_to_do() -> None:
    """Beyond its window it takes another way, which its own number chooses."""
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=kinds)
    holder = Holder(Gemma3ForCausalLM(config).eval())
    holder.initialize()
    with pytest.raises(CompileError) as caught:
        lowering.compile(holder, (torch.ones(1, 1, dtype=torch.long),))
    said = str(caught.value)
    assert "kept.layers[0].cumulative_length_int went from 0 to 1 while Holder was exported" in said
    assert "of a StaticSlidingWindowLayer of transformers; lowering.export_decoder(model, capacity=" in said


def test_a_static_cache_of_all_tokens_is_the_programs_state() -> None:
    """Its length is a tensor: the tokens of a program are those of the model with the same cache."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    holder, eager = Holder(model), Holder(model)
    holder.initialize()
    eager.initialize()
    program = lowering.load(lowering.compile(holder, (torch.ones(1, 1, dtype=torch.long),)).vmfb)
    token = torch.tensor([[5]])
    for _ in range(12):
        with torch.no_grad():
            wanted = eager(token)
        torch.testing.assert_close(program(token), wanted, rtol=1e-4, atol=1e-5)
        token = wanted[:, -1:].argmax(-1)
    assert {each.name for each in program.state()} == {
        "kept_0_keys",
        "kept_0_values",
        "kept_0_cumulative_length",
    }
    assert not list(holder.buffers(recurse=False))


def test_a_state_that_was_read_into_goes_on_in_the_program() -> None:
    """Of a Mamba: the program begins with what an eager call left."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 97}
    sizes |= {"num_heads": 4, "head_dim": 16}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, n_groups=1, chunk_size=4)).eval()
    holder = Holder(model, "cache_params")
    with torch.no_grad():
        token = holder(torch.arange(5)[None] + 3)[:, -1:].argmax(-1)
        compiled = lowering.compile(holder, (token,))
    program = lowering.load(compiled.vmfb)
    for _ in range(12):
        with torch.no_grad():
            wanted = holder(token)
        torch.testing.assert_close(program(token), wanted, rtol=1e-4, atol=1e-5)
        token = wanted[:, -1:].argmax(-1)


def test_a_cache_that_is_made_in_a_call_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    with pytest.raises(CompileError, match="kept"):
        lowering.compile(Holder(model), (torch.ones(1, 4, dtype=torch.long),))
