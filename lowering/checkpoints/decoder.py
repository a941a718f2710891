"""Make of a Hugging Face causal language model two functions of one program that share a cache.

``prefill`` reads tokens, any number of them for each sequence, ``decode`` one for each; both give the logits
that come next.  The cache is of a fixed capacity, and how much of it each sequence has filled is a tensor
beside it: no length is an integer of Python, so nothing is compiled again for another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

_PROMPT = 8  # tokens of the example


def export_decoder(
    model: nn.Module, *, batch: int = 1, capacity: int, prompt: int | None = None
) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], Any]]:
    """Give the functions ``prefill`` and ``decode`` of a causal language model, for ``lowering.compile``.

    batch: the most sequences at a time; where it is more than one a call may have fewer.  capacity: the most
    tokens of a sequence, prompt included.  prompt: the most tokens of one call of ``prefill``; default: the
    capacity.

    ``prefill(ids, lengths)``, int64 ids [B, T] and lengths [B]: the first ``lengths[b]`` of row b are
    appended to what sequence b has in the cache, and what stands behind them is padding.  ``decode(ids)``,
    int64 ids [B, 1]: they are appended.  Both give the logits [B, V] behind the last token of each sequence.
    ``program.reset()`` empties the cache.  A call with which a sequence would have more tokens than the
    capacity is a RunError, and nothing is written.

    Raises UsageError for sizes that make no sense, and for a model whose cache is of another kind than keys
    and values of all tokens or of a window of them.
    """
    if batch < 1 or capacity < 1:
        raise UsageError(
            f"a decoder is for 1 sequence of 1 token or more, not batch={batch}, capacity={capacity}"
        )
    prompt = capacity if prompt is None else prompt
    if not 1 <= prompt <= capacity:
        raise UsageError(f"a prompt of {prompt} tokens does not fit the capacity, {capacity}")
    decoder = Decoder(model, batch, capacity)
    rows = {0: torch.export.Dim("batch", min=1, max=batch)} if batch > 1 else {}
    tokens = {1: torch.export.Dim("tokens", min=1, max=prompt)} if prompt > 1 else {}
    ids = torch.zeros(batch, min(_PROMPT, prompt), dtype=torch.long)
    lengths = torch.full((batch,), ids.shape[1], dtype=torch.long)
    return {
        "prefill": (Prefill(decoder), (ids, lengths), {"ids": {**rows, **tokens}, "lengths": rows}),
        "decode": (Decode(decoder), (ids[:, :1].clone(),), {"ids": rows}),
    }


class Decoder(nn.Module):
    """A causal language model and its cache, of each layer keys and values [batch, heads, capacity, size]."""

    keys_0: Tensor
    lengths: Tensor

    def __init__(self, model: nn.Module, batch: int, capacity: int):
        super().__init__()
        self.model: Any = model
        self.batch, self.capacity = batch, capacity
        self.windows = _windows(model, capacity)
        for number, tensors in enumerate(_keys_and_values(model)):
            for name, tensor in zip(("keys", "values"), tensors, strict=True):
                _, heads, _, size = tensor.shape
                memory = tensor.new_zeros(batch, heads, capacity, size)
                self.register_buffer(f"{name}_{number}", memory, persistent=False)
        device = next(iter(self.buffers())).device
        lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.register_buffer("lengths", lengths, persistent=False)

    def forward(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Append the first ``counts[b]`` of ids [B, T] to each sequence; the logits [B, V] behind them."""
        rows = torch.arange(ids.shape[0], device=ids.device)
        before = self.lengths[: ids.shape[0]] if self.batch > 1 else self.lengths
        fits = (before + counts <= self.capacity).all()
        torch._assert_async(
            fits, f"a sequence would have more than {self.capacity} tokens, the cache's capacity"
        )
        # Where one does not fit, nothing is written: there is no such place.
        first = torch.where(fits, before, self.capacity)
        positions = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
        last = (counts - 1).clamp(min=0)
        # The largest product of all, of the tokens alone whose logits are wanted.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: (given[0][rows, last][:, None], *given[1:])
        )
        try:
            result = self.model(
                input_ids=ids,
                position_ids=positions.clamp(max=self.capacity - 1),
                attention_mask=self._masks(positions),
                past_key_values=self._cache(rows, positions),
                use_cache=True,
            )
        finally:
            hook.remove()
        self.lengths.index_copy_(0, rows, torch.where(fits, before + counts, before))
        return result.logits[:, 0]

    def _cache(self, rows: Tensor, positions: Tensor) -> Any:
        """What the layers put their keys and values into, and read all that is there."""
        from transformers.cache_utils import Cache

        kept = [
            (getattr(self, f"keys_{number}"), getattr(self, f"values_{number}"))
            for number in range(len(self.windows))
        ]
        return Cache(layers=[_layer(*each, rows, positions) for each in kept])

    def _masks(self, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to scores: each token looks at itself and back, no further than a window.

        Of models with windows in some layers, by the kind of layer.
        """
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        masks = {window: self._mask(positions, window) for window in dict.fromkeys(self.windows)}
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {kind: masks[window] for kind, window in zip(types, self.windows, strict=True)}

    def _mask(self, positions: Tensor, window: int) -> Tensor:
        dtype, places = self.keys_0.dtype, torch.arange(self.capacity, device=positions.device)
        distance = positions[:, None, :, None] - places
        hidden = (distance < 0) | (distance >= window)
        return torch.zeros((), dtype=dtype, device=positions.device).masked_fill(
            hidden, torch.finfo(dtype).min
        )


class Prefill(nn.Module):
    """Append tokens, as many of each row of ids as ``lengths`` says."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.decoder(ids, lengths)


class Decode(nn.Module):
    """Append a token to each sequence."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(ids, torch.ones_like(ids[:, 0]))


def _windows(model: nn.Module, capacity: int) -> list[int]:
    """How many tokens each layer looks back at.  Raises UsageError for layers that keep something else."""
    from transformers import PreTrainedModel, StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UsageError(
            f"export_decoder takes a causal language model of transformers, not {type(model).__name__}"
        )
    layers: list[Any] = StaticCache(config=model.config, max_cache_len=capacity).layers
    others = {type(layer).__name__ for layer in layers} - {
        StaticLayer.__name__,
        StaticSlidingWindowLayer.__name__,
    }
    if others:
        raise UsageError(
            f"the cache of {type(model).__name__} has layers of {', '.join(sorted(others))}, which "
            "export_decoder does not know: it keeps keys and values. Write a module whose buffers are the "
            "cache, and compile its functions with lowering.compile({'prefill': ..., 'decode': ...})"
        )
    return [layer.max_cache_len for layer in layers]


def _keys_and_values(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What the layers keep of one token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _layer(keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor) -> Any:
    """One layer's part of a cache, for one call."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):
        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            return self._put(keys, key_states), self._put(values, value_states)

        def _put(self, memory: Tensor, new: Tensor) -> Tensor:
            memory[rows[:, None], :, positions] = new.transpose(1, 2)
            return memory[: rows.shape[0]] if memory.shape[0] > 1 else memory

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return keys.shape[2]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return keys.shape[2], 0

        def lazy_initialization(self, *_: Any) -> None:
            pass

    layer = Layer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer
