"""A Hugging Face model as two functions with a cache: the tokens are those that it gives without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import lowering
from lowering import RunError, UsageError
from lowering.cli import compile as compile_command
from lowering.cli import run as run_command

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "head_dim": 16,
    "max_position_embeddings": 96,
}
BATCH, CAPACITY, LONGEST, NEW = 3, 68, 16, 60
WINDOW = 8
LENGTHS = torch.tensor([7, 4, 1])
PROMPT = torch.randint(0, 97, (BATCH, 7), generator=torch.Generator().manual_seed(1))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def gemma() -> Any:
    """A layer with a window, and one without."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "sliding_window": WINDOW, "layer_types": kinds, "tie_word_embeddings": False}
    config = Gemma3TextConfig(**sizes, initializer_range=0.1)
    return Gemma3ForCausalLM(config).eval()


def without_cache(model: Any, count: int, batch: int = BATCH) -> Tensor:
    """Greedy tokens behind each prompt, each read anew with all before it."""
    rows = []
    for row, length in zip(PROMPT[:batch], LENGTHS[:batch], strict=True):
        ids = row[None, :length]
        for _ in range(count):
            with torch.no_grad():
                token = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
        rows.append(ids[0, -count:])
    return torch.stack(rows)


def with_cache(
    prefill: Callable[..., Tensor], decode: Callable[..., Tensor], count: int, batch: int = BATCH
) -> Tensor:
    with torch.no_grad():
        tokens = [prefill(PROMPT[:batch], LENGTHS[:batch]).argmax(-1)[:, None]]
        for _ in range(count - 1):
            tokens.append(decode(tokens[-1]).argmax(-1)[:, None])
    return torch.cat(tokens, 1)


@pytest.fixture(scope="module")
def compiled() -> lowering.Compiled:
    functions = lowering.export_decoder(gemma(), batch=BATCH, capacity=CAPACITY, prompt=LONGEST)
    return lowering.compile(functions)


@pytest.fixture
def program(compiled: lowering.Compiled) -> lowering.Program:
    return lowering.load(compiled.vmfb)


def test_tokens_are_those_without_a_cache(program: lowering.Program) -> None:
    """For prompts of different lengths together, and for fewer of them."""
    expected = without_cache(gemma(), NEW)
    assert len(set(expected.flatten().tolist())) > 20
    assert torch.equal(with_cache(program.prefill, program.decode, NEW), expected)
    session = program.session()
    assert torch.equal(with_cache(session.prefill, session.decode, 5, batch=2), expected[:2, :5])
    assert session.state_dict()["decoder.lengths"].tolist() == [11, 8, 0]


def test_caches_are_updated_in_place(compiled: lowering.Compiled) -> None:
    for signature in compiled.signatures.values():
        first = len(signature.inputs or ())
        names = [signature.state[item.argument - first].name for item in signature.written if item.result]
        assert names == ["decoder.lengths"]


def test_a_window_is_a_ring(program: lowering.Program) -> None:
    """It has places for a window and a prompt, however large the capacity."""
    places = {each.name.removeprefix("decoder."): each.shape[2:3] for each in program.state()}
    ring, all_ = (WINDOW + LONGEST - 1,), (CAPACITY,)
    assert places == {"keys_0": ring, "values_0": ring, "keys_1": all_, "values_1": all_, "lengths": ()}


def test_a_long_prompt_goes_through_a_ring_in_parts(program: lowering.Program) -> None:
    """Padding behind a part is written where nothing looks any more, and beyond the capacity nowhere."""
    model, ids = gemma(), torch.randint(0, 97, (BATCH, CAPACITY), generator=torch.Generator().manual_seed(3))
    for first in range(0, CAPACITY, 13):
        part = ids[:, first : first + 13]
        count = part.shape[1]
        found = program.prefill(nn.functional.pad(part, (0, LONGEST - count)), torch.full((BATCH,), count))
        with torch.no_grad():
            wanted = model(input_ids=ids[:, : first + count], use_cache=False).logits[:, -1]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_lengths_that_no_sequence_has_are_refused(program: lowering.Program) -> None:
    for lengths in ([3, 8, 1], [-1, 2, 2]):
        with pytest.raises(RunError, match="a length is negative, or more than the tokens that ids has"):
            program.prefill(PROMPT, torch.tensor(lengths))
    assert not any(value.any() for value in program.state_dict().values())


def test_a_prompt_in_parts_is_the_prompt(program: lowering.Program) -> None:
    """What is appended goes on where the cache ends."""
    whole = program.prefill(PROMPT, LENGTHS)
    parts = program.session()
    first = LENGTHS.clamp(max=3)
    parts.prefill(PROMPT[:, :3].contiguous(), first)
    rest = torch.stack([row.roll(-int(n)) for row, n in zip(PROMPT, first, strict=True)])
    found = parts.prefill(rest[:, :4].contiguous(), LENGTHS - first)
    torch.testing.assert_close(found[:2], whole[:2], rtol=1e-4, atol=1e-5)  # the third has nothing to add


def test_what_does_not_fit_is_refused_and_nothing_is_written(program: lowering.Program) -> None:
    program.prefill(PROMPT, LENGTHS)
    for count in (16, 16, 16, CAPACITY - 7 - 48):
        ids, full = torch.ones(BATCH, count, dtype=torch.long), torch.full((BATCH,), count)
        program.prefill(ids, full)
    before = program.state_dict()
    said = f"more than {CAPACITY} tokens, the cache's capacity"
    for call in (
        lambda: program.decode(torch.ones(BATCH, 1, dtype=torch.long)),
        lambda: program.prefill(PROMPT, LENGTHS),
    ):
        with pytest.raises(RunError, match=said):
            call()
        for name, value in program.state_dict().items():
            assert torch.equal(value, before[name]), name
    with pytest.raises(RunError, match=rf"size {LONGEST + 1} of axis 1"):
        program.prefill(torch.ones(BATCH, LONGEST + 1, dtype=torch.long), full)
    with pytest.raises(RunError, match="size 4 of axis 0"):
        program.decode(torch.ones(4, 1, dtype=torch.long))
    program.reset()
    assert torch.equal(with_cache(program.prefill, program.decode, 3), without_cache(gemma(), 3))


@pytest.mark.parametrize(
    ("model", "sizes", "said"),
    [
        (llama, {"capacity": 0}, "1 sequence of 1 token or more, not batch=1, capacity=0"),
        (llama, {"capacity": 8, "batch": 0}, "not batch=0"),
        (llama, {"capacity": 8, "prompt": 9}, "a prompt of 9 tokens does not fit the capacity, 8"),
        (lambda: nn.Linear(2, 2), {"capacity": 8}, "a causal language model of transformers, not Linear"),
    ],
)
def test_what_cannot_be_exported_is_refused(model: Callable[[], Any], sizes: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lowering.export_decoder(model(), **sizes)


def test_the_commands_make_a_decoder_of_a_folder(tmp_path: Path) -> None:
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "folder")
    vmfb = tmp_path / "m.vmfb"
    assert compile_command.main([f"hf:{tmp_path}/folder", "-o", str(vmfb), "--decoder", "16"]) == 0
    out = tmp_path / "logits.safetensors"
    call = [str(vmfb), "--output", f"@{out}", "--function"]
    assert run_command.main([*call, "prefill", "--input", "1x3xi64=5,7,9", "--input", "1xi64=3"]) == 0
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[5, 7, 9]])).logits[:, -1]
    torch.testing.assert_close(load_file(out)["output_0"], wanted, rtol=1e-4, atol=1e-5)
    assert run_command.main([*call, "decode", "--input", "1x1xi64=5"]) == 0
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[5]])).logits[:, -1]
    torch.testing.assert_close(load_file(out)["output_0"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["model.py:build", "--decoder", "8"],
            "--decoder makes functions of a checkpoint, hf:FOLDER, not of",
        ),
        (["hf:{}", "--batch", "2"], "--batch and --prompt are sizes of a decoder: give --decoder CAPACITY"),
        (["hf:{}", "--decoder", "0"], "1 sequence of 1 token or more, not batch=1, capacity=0"),
        (["hf:{}", "--decoder", "4", "--prompt", "5"], "a prompt of 5 tokens does not fit the capacity, 4"),
    ],
)
def test_a_decoder_that_cannot_be_is_a_wrong_request(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").write_text("")
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).save_pretrained(tmp_path / "folder")
    words = [word.format(tmp_path / "folder").replace("model.py", f"{tmp_path}/model.py") for word in words]
    assert compile_command.main([*words, "-o", str(tmp_path / "m.vmfb")]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "m.vmfb").exists()
