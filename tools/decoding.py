"""Decode with compiled programs and with eager PyTorch alike, and time them side by side.

What ``make demo`` and ``tools.bench.decode`` share.  A decoder is a program of ``lowering.export_decoder``,
or ``Eager``, which has the same two functions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import lowering

_SETTLE = 1  # calls of a turn that are not counted: threads of the contender before still spin


class Eager:
    """A causal language model of transformers with its own cache: one that grows, or of a capacity."""

    def __init__(self, model: Any, capacity: int | None = None) -> None:
        self._model, self._capacity = model, capacity
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        if self._capacity is None:
            self._cache = DynamicCache(config=config)
        else:
            self._cache = StaticCache(config=config, max_cache_len=self._capacity)

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Append all of int64 ids [1, T]; the logits [1, V] behind them."""
        assert lengths.tolist() == [ids.shape[1]]
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """The same of one token, [1, 1]."""
        given = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": 1}
        return self._model(input_ids=ids, **given).logits[:, -1]


Decoder = lowering.Program | Eager


def read(decoder: Decoder, ids: Tensor) -> Tensor:
    """Empty the cache and append ids [1, T]; the logits [1, V] behind them."""
    decoder.reset()
    return decoder.prefill(ids, torch.tensor([ids.shape[1]], device=ids.device))


def greedy(decoder: Decoder, ids: Tensor) -> Iterator[Tensor]:
    """Logits [1, V] behind ids [1, T], then behind each most probable token, for as long as one asks."""
    logits = read(decoder, ids)
    while True:
        yield logits
        logits = decoder.decode(logits.argmax(-1)[:, None])


def seconds_per_token(
    decoders: Mapping[str, Decoder], ids: Tensor, rounds: int, turn: int = 3
) -> dict[str, float]:
    """Median time of ``decode`` behind ids [1, T], the decoders in turn (see ``medians``)."""
    streams = {name: greedy(decoder, ids) for name, decoder in decoders.items()}
    for stream in streams.values():
        next(stream)
    return medians({name: lambda each=each: next(each) for name, each in streams.items()}, rounds, turn)


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int, turn: int) -> dict[str, float]:
    """Median seconds of each call: see ``times``."""
    return {name: statistics.median(each) for name, each in times(calls, rounds, turn).items()}


def times(calls: Mapping[str, Callable[[], Any]], rounds: int, turn: int) -> dict[str, list[float]]:
    """Seconds of each call: in each of ``rounds`` one that does not count, then ``turn`` of them."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for number in range(_SETTLE + turn):
                start = time.perf_counter()
                call()
                if number >= _SETTLE:
                    found[name].append(time.perf_counter() - start)
    return found
