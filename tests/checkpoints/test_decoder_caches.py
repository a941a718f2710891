"""Decoders of models that keep other things than all keys and values: windows, parts, recurrent states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lowering
from lowering import RunError, UsageError
from tests.checkpoints.test_decoder import BATCH, LENGTHS, PROMPT, SIZES

CAPACITY, LONGEST, NEW = 40, 8, 24
SSM: dict[str, Any] = {"n_groups": 1, "chunk_size": 4}
MAMBA: dict[str, Any] = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 97}
BOTH = ["linear_attention", "full_attention"]
FEWER = {name: size for name, size in SIZES.items() if name != "head_dim"}
DELTA = {f"linear_{name}": size for name, size in {"num_key_heads": 2, "num_value_heads": 4}.items()}
DELTA |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

# By the name of the class, its sizes.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "attn_implementation": "eager"},
    "Gemma3": {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {**SIZES, "sliding_window": 8},
    "GptOss": {
        **SIZES,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
    },
    "Llama4": {
        **SIZES,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    },
    "Mamba": MAMBA,
    "FalconMamba": MAMBA,
    "Mamba2": {**MAMBA, **SSM, "num_heads": 4, "head_dim": 16},
    "Lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {
        **SIZES,
        **DELTA,
        **EXPERTS,
        "layer_types": BOTH,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Jamba": {**FEWER, "num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "FalconH1": {
        **SIZES,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 4,
    },
    "NemotronH": {
        **SIZES,
        **SSM,
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
    },
}


def made(name: str) -> Any:
    """A random model whose weights are large enough for tokens that differ."""
    config = "Gemma3Text" if name == "Gemma3" else "Llama4Text" if name == "Llama4" else name
    torch.manual_seed(0)
    sizes = getattr(transformers, f"{config}Config")(
        **MODELS[name], initializer_range=0.1, tie_word_embeddings=False
    )
    return getattr(transformers, f"{name}ForCausalLM")(sizes).eval()


def without_cache(model: Any, tokens: Tensor) -> Tensor:
    """The logits behind each token from the last of the prompt on: [batch, NEW, vocabulary]."""
    rows = []
    for prompt, length, new in zip(PROMPT, LENGTHS, tokens, strict=False):
        ids = torch.cat([prompt[:length], new[:-1]])[None]
        with torch.no_grad():
            rows.append(model(input_ids=ids, use_cache=False).logits[0, length - 1 :])
    return torch.stack(rows)


def generated(prefill: Any, decode: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [batch, NEW], and the logits that they come from."""
    with torch.no_grad():
        logits = [prefill(PROMPT[:batch], LENGTHS[:batch])]
        for _ in range(NEW - 1):
            logits.append(decode(logits[-1].argmax(-1)[:, None]))
    stacked = torch.stack(logits, 1)
    return stacked.argmax(-1), stacked


def assert_generates(model: Any, prefill: Any, decode: Any, batch: int = BATCH) -> None:
    """The tokens behind prompts of different lengths, beyond windows of 8, are those without a cache."""
    tokens, logits = generated(prefill, decode, batch)
    wanted = without_cache(model, tokens)
    # Sums of 64 products in other orders, through two or three layers.
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(tokens, wanted.argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_modules_do_what_the_model_does(name: str) -> None:
    model = made(name)
    functions = lowering.export_decoder(model, batch=BATCH, capacity=CAPACITY, prompt=LONGEST)
    assert_generates(model, functions["prefill"][0], functions["decode"][0])


def test_states_of_recurrent_layers_live_in_the_program() -> None:
    model = made("NemotronH")
    functions = lowering.export_decoder(model, capacity=CAPACITY, prompt=LONGEST)
    program = lowering.load(lowering.compile(functions).vmfb)
    names = {each.name.removeprefix("decoder.") for each in program.state()}
    assert names == {"conv_states_0", "recurrent_states_0", "keys_1", "values_1", "lengths"}
    assert_generates(model, program.prefill, program.decode, 1)
    before = program.state_dict()
    with pytest.raises(RunError, match="with recurrent layers reads a prompt as a whole: reset\\(\\) before"):
        program.prefill(PROMPT[:1], LENGTHS[:1])
    for name, value in program.state_dict().items():
        assert torch.equal(value, before[name]), name
    program.reset()
    assert_generates(model, program.prefill, program.decode, 1)


def test_another_cache_is_refused_by_name() -> None:
    config = transformers.Gemma3TextConfig(**{**MODELS["Gemma3"], "layer_types": ["indexed_attention"] * 2})
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**MODELS["Gemma3"]))
    model.config = config
    said = (
        "the cache of Gemma3ForCausalLM has layers of StaticIndexedLayer, which export_decoder does not know"
    )
    with pytest.raises(UsageError, match=said):
        lowering.export_decoder(model, capacity=8)
