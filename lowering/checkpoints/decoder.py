"""Make of a Hugging Face causal language model two functions of one program that share a cache.

``prefill`` reads tokens, any number of them for each sequence, ``decode`` one for each; both give the logits
that come next.  The cache is of a fixed capacity, and how much of it each sequence has filled is a tensor
beside it: no length is an integer of Python, so nothing is compiled again for another.
"""

from __future__ import annotations

import inspect
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
    decoder = Decoder(model, batch, capacity, prompt)
    rows = {0: torch.export.Dim("batch", min=1, max=batch)} if batch > 1 else {}
    tokens = {1: torch.export.Dim("tokens", min=1, max=prompt)} if prompt > 1 else {}
    ids = torch.zeros(batch, min(_PROMPT, prompt), dtype=torch.long)
    lengths = torch.full((batch,), ids.shape[1], dtype=torch.long)
    return {
        "prefill": (Prefill(decoder), (ids, lengths), {"ids": {**rows, **tokens}, "lengths": rows}),
        "decode": (Decode(decoder), (ids[:, :1].clone(),), {"ids": rows}),
    }


class Decoder(nn.Module):
    """A causal language model and its cache: what each layer keeps, of ``batch`` sequences."""

    lengths: Tensor

    def __init__(self, model: nn.Module, batch: int, capacity: int, prompt: int):
        super().__init__()
        self.model = _causal_language_model(model)
        self.batch, self.capacity, self.prompt = batch, capacity, prompt
        self.takes = inspect.signature(self.model.forward).parameters
        self.cache = "past_key_values" if "past_key_values" in self.takes else "cache_params"
        self.kinds = decoder_cache().kinds(self.model, capacity, prompt)
        self.kept: list[dict[str, str]] = []
        for number, tensors in enumerate(decoder_cache().kept_of_a_token(self.model, self.cache)):
            self.kept.append({name: f"{name}_{number}" for name in tensors})
            for name, tensor in tensors.items():
                memory = decoder_cache().memory(name, tensor, self.kinds[number], batch)
                self.register_buffer(f"{name}_{number}", memory, persistent=False)
        lengths = torch.zeros(batch, dtype=torch.long, device=self.model.device)
        self.register_buffer("lengths", lengths, persistent=False)

    def forward(self, ids: Tensor, counts: Tensor | None = None) -> Tensor:
        """Append the first ``counts[b]`` of ids [B, T] to each sequence; the logits [B, V] behind them.

        Without counts each sequence gets the one token that ids has of it.
        """
        rows = torch.arange(ids.shape[0], device=ids.device)
        before = self.lengths[: ids.shape[0]] if self.batch > 1 else self.lengths
        anew = counts is not None and any(kind.recurrent for kind in self.kinds)
        counts = torch.ones_like(rows) if counts is None else counts
        fits = self._checked(ids, before, counts, anew)
        ids, numbers, last = self._to_the_right(ids, counts) if anew else _to_the_left(ids, counts)
        call = decoder_cache().Call(rows, before[:, None] + numbers, self.capacity, fits, anew)
        logits = self._logits(ids, call, last)
        self.lengths.index_copy_(0, rows, torch.where(fits, before + counts, before))
        return logits

    def _checked(self, ids: Tensor, before: Tensor, counts: Tensor, anew: bool) -> Tensor:
        """Assert that the call can be computed; tells whether that is so."""
        wrong = (before + counts > self.capacity).long()
        wrong = torch.where((counts < 0) | (counts > ids.shape[1]), 2, wrong)
        if anew:
            wrong = torch.where(before > 0, 3, wrong)
        wrong = wrong.amax()
        said = (
            f"a sequence would have more than {self.capacity} tokens, the cache's capacity",
            "a length is negative, or more than the tokens that ids has of each sequence",
            "a model with recurrent layers reads a prompt as a whole: reset() before its prefill",
        )
        for number, what in enumerate(said[: 3 if anew else 2], 1):
            torch._assert_async(wrong != number, what)
        return wrong == 0

    def _to_the_right(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pad each sequence in front: a state that nothing was read into is the same behind padding.

        Gives as many tokens as a prompt has at most, however many there are: layers go through them one by
        one, or in parts.
        """
        numbers = torch.arange(self.prompt, device=ids.device) - self.prompt + counts[:, None]
        return ids.gather(1, numbers.clamp(min=0)), numbers, torch.full_like(counts, self.prompt - 1)

    def _logits(self, ids: Tensor, call: Any, last: Tensor) -> Tensor:
        memories = [{name: getattr(self, kept) for name, kept in names.items()} for names in self.kept]
        cache = decoder_cache().CallCache(self.kinds, memories, call)
        given = {self.cache: cache, "attention_mask": self._masks(call)}
        if "position_ids" in self.takes or any(kind.looks for kind in self.kinds):
            given["position_ids"] = call.positions.clamp(0, self.capacity - 1)
        # The largest product of all, of the tokens alone whose logits are wanted.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, states: (states[0][call.rows, last][:, None], *states[1:])
        )
        try:
            result = self.model(input_ids=ids, use_cache=True, **given)
        finally:
            hook.remove()
        cache.keep_states()
        return result.logits[:, 0]

    def _masks(self, call: Any) -> Any:
        """What each kind of layer looks at, or for a recurrent one, what is no padding.

        The names of the kinds are those that transformers has.
        """
        dtype = self.model.dtype
        masks = {kind.mask: call.mask(kind, dtype) for kind in self.kinds if kind.looks}
        for kind in self.kinds:
            if kind.recurrent:
                masks[kind.recurrent] = (call.positions >= 0).to(dtype) if call.anew else None
        return masks if len(masks) > 1 else next(iter(masks.values()))


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
        return self.decoder(ids)


def decoder_cache() -> Any:
    """The module that needs transformers."""
    from . import decoder_cache

    return decoder_cache


def _causal_language_model(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UsageError(
            f"export_decoder takes a causal language model of transformers, not {type(model).__name__}"
        )
    return model


def _to_the_left(ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave the padding behind each sequence: tokens do not look at what comes later."""
    numbers = torch.arange(ids.shape[1], device=ids.device)[None]
    return ids, numbers, (counts - 1).clamp(min=0)
