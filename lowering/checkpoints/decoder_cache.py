"""What the layers of a Hugging Face model keep of the tokens before: keys and values, and recurrent states.

A layer of attention has a memory of keys and values.  It has a place for each token of the capacity, or where
it looks back no further than a window, for those of a window and of one call: the memory is a ring, and token
n lies at place n modulo its length.  A recurrent layer (Mamba, linear attention, a short convolution) has
states that each call computes as a whole.

Imports transformers, whose classes these are: it is imported where a model of its is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from ..errors import UsageError

_KNOWN = (
    DummyLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
_ATTENTION = ("keys", "values")
_STATES = ("conv_states", "recurrent_states")
_MASKS = {"full": "full_attention", "sliding": "sliding_attention", "chunked": "chunked_attention"}


@dataclass(frozen=True)
class Kind:
    """Say what a layer keeps.

    looks: how it looks back, at all tokens (``full``), those of a window (``sliding``) or those of its own
    part of the sequence (``chunked``); None for no attention.  reach: the tokens of a window or part.
    places: those of its keys and values.  recurrent: as transformers names the mask of its recurrent part, if
    it has one.
    """

    looks: str | None
    reach: int
    places: int
    recurrent: str | None

    @property
    def mask(self) -> str | None:
        """The mask of its attention, as transformers names it."""
        return None if self.looks is None else _MASKS[self.looks]


@dataclass(frozen=True)
class Call:
    """Hold which tokens a call appends.

    rows [B]: the sequences; positions [B, T]: where in its sequence each token is, in order, padding too,
    which is negative before the first token; capacity: the most tokens of a sequence; fits: whether anything
    is written; anew: whether the sequences begin with this call.
    """

    rows: Tensor
    positions: Tensor
    capacity: int
    fits: Tensor
    anew: bool

    def places(self, kind: Kind) -> Tensor:
        """Where each token is kept, [B, T]; outside of the memory, where nothing is written, if nowhere.

        Padding has a place as well: that of a token which comes later, or which nothing looks at any more.
        """
        there = self.fits & (self.positions < self.capacity)
        return torch.where(there, self.positions % kind.places, kind.places)

    def mask(self, kind: Kind, dtype: torch.dtype) -> Tensor:
        """What is added to scores, [B, 1, T, places]: each token looks at itself and back."""
        there, here = torch.arange(kind.places, device=self.rows.device), self.positions[:, None, :, None]
        if kind.looks == "full":
            hidden = there > here
        else:
            # The last token that was put at each place; one before the first where there was none.
            last = self.positions[:, -1:].clamp(max=self.capacity - 1)
            there = (last - (last - there) % kind.places)[:, None, None]
            hidden = (there < 0) | (there > here) | self._is_out_of_reach(here, there, kind)
        zero = torch.zeros((), dtype=dtype, device=self.rows.device)
        return zero.masked_fill(hidden, torch.finfo(dtype).min)

    def _is_out_of_reach(self, here: Tensor, there: Tensor, kind: Kind) -> Tensor:
        if kind.looks == "chunked":
            return here // kind.reach != there // kind.reach
        return here - there >= kind.reach


def kinds(model: PreTrainedModel, capacity: int, prompt: int) -> list[Kind]:
    """What each layer keeps.  Raises UsageError for a layer that keeps something else."""
    config = model.config
    layers: list[Any] = StaticCache(config=config, max_cache_len=capacity).layers
    others = {type(layer).__name__ for layer in layers if type(layer) not in _KNOWN}
    if others:
        raise UsageError(
            f"the cache of {type(model).__name__} has layers of {', '.join(sorted(others))}, which "
            "export_decoder does not know: it keeps keys and values, and recurrent states. Write a module "
            "whose buffers are the cache, and compile its functions with lowering.compile({'prefill': ..., "
            "'decode': ...})"
        )
    names, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    found = [_kind(layer, name, capacity, prompt) for layer, name in zip(layers, names, strict=True)]
    reaches = {(kind.mask, kind.reach) for kind in found if kind.looks}
    if len(reaches) > len({mask for mask, _ in reaches}):
        raise UsageError(
            f"layers of {type(model).__name__} look back at {sorted(reach for _, reach in reaches)} tokens; "
            "export_decoder knows one window for all layers that have one"
        )
    return found


def _kind(layer: Any, name: str, capacity: int, prompt: int) -> Kind:
    recurrent = None
    if isinstance(layer, LinearAttentionLayer):
        recurrent = "conv" if name == "conv" else "linear_attention"
    if not isinstance(layer, StaticLayer):
        return Kind(None, 0, 0, recurrent)
    if not isinstance(layer, StaticSlidingWindowLayer):
        return Kind("full", capacity, capacity, recurrent)
    reach = layer.max_cache_len
    # What is within reach of the first token of a call, and the call.
    places = min(capacity, reach + prompt - 1)
    return Kind("chunked" if name == "chunked_attention" else "sliding", reach, places, recurrent)


def kept_of_a_token(model: Any, argument: str) -> list[dict[str, Tensor]]:
    """What each layer keeps of one token, by name.  argument: that of the model which a cache is."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{argument: cache})
    return [_attention(layer) | _states(layer) for layer in cache.layers]


def _attention(layer: Any) -> dict[str, Tensor]:
    pairs = {name: getattr(layer, name, None) for name in _ATTENTION}
    return {name: value for name, value in pairs.items() if isinstance(value, Tensor)}


def _states(layer: Any) -> dict[str, Tensor]:
    found = {name: getattr(layer, name, {}).items() for name in _STATES}
    pairs = [(_numbered(name, number), state) for name, states in found.items() for number, state in states]
    return {name: state for name, state in pairs if isinstance(state, Tensor)}


def _numbered(name: str, number: int) -> str:
    """The name of one of a layer's states: few layers have several."""
    return f"{name}{number or ''}"


def memory(name: str, tensor: Tensor, kind: Kind, batch: int) -> Tensor:
    """An empty memory of every sequence's, for what a layer keeps of one token of one."""
    shape = [batch, *tensor.shape[1:]]
    if name in _ATTENTION:
        shape[2] = kind.places
    return tensor.new_zeros(shape)


class CallCache(Cache):
    """What the layers put into, and read what is there, during one call."""

    def __init__(self, kinds: list[Kind], memories: list[dict[str, Tensor]], call: Call):
        self._memories, self._call = memories, call
        pairs = zip(kinds, memories, strict=True)
        super().__init__(layers=[_layer(kind, kept, call) for kind, kept in pairs])

    def keep_states(self) -> None:
        """Put the recurrent states that the call computed where they are kept."""
        for layer, kept in zip(self.layers, self._memories, strict=True):
            for name, state in _states(layer).items():
                before = kept[name][: state.shape[0]]
                state = torch.where(self._call.fits, state, before)
                kept[name].index_copy_(0, self._call.rows, state)


def _layer(kind: Kind, kept: Mapping[str, Tensor], call: Call) -> Any:
    if kind.recurrent is not None:
        return (_Recurrent if kind.looks is None else _Both)(kind, kept, call)
    return DummyLayer() if kind.looks is None else _Attention(kind, kept, call)


class _Attention(CacheLayerMixin):
    """The keys and values of a layer."""

    def __init__(self, kind: Kind, kept: Mapping[str, Tensor], call: Call):
        self.keys, self.values = self._kept = kept["keys"], kept["values"]
        self.is_initialized = True
        self._rows, self._places = call.rows, call.places(kind)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._put(self._kept[0], key_states), self._put(self._kept[1], value_states)

    def _put(self, memory: Tensor, new: Tensor) -> Tensor:
        memory[self._rows[:, None], :, self._places] = new.transpose(1, 2)
        return memory[: self._rows.shape[0]] if memory.shape[0] > 1 else memory

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._kept[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kept[0].shape[2], 0

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        pass


class _Recurrent(LinearAttentionLayer):
    """The states of a layer, which transformers computes."""

    def __init__(self, kind: Kind, kept: Mapping[str, Tensor], call: Call):
        super().__init__(number_of_states=sum(name.startswith(_STATES[0]) for name in kept))
        for number in range(self.number_of_states):
            for name in _STATES:
                memory = kept.get(_numbered(name, number))
                if memory is not None:
                    # A copy, of the sequences of the call: it is kept when all is computed.
                    getattr(self, name)[number] = memory[: call.rows.shape[0]].clone()
                    getattr(self, f"is_{name}_initialized")[number] = True
            self.conv_kernel_size[number] = kept[_numbered(_STATES[0], number)].shape[-1]
            self.has_previous_state[number] = not call.anew


class _Both(_Recurrent, _Attention):
    """A layer that has states, and keys and values."""

    def __init__(self, kind: Kind, kept: Mapping[str, Tensor], call: Call):
        _Recurrent.__init__(self, kind, kept, call)
        _Attention.__init__(self, kind, kept, call)
