"""Prompts to embeddings: each distinct text once, in batches, with a cache."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from darkroom_server.core.events import Counted
from darkroom_server.core.job import PromptSyntax
from darkroom_server.engine.adapters.model_adapters import ModelAdapters, encoding
from darkroom_server.engine.adapters.weights import Mix
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.weighted_prompts import WeightedPromptEncoder
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.device.transfer import send

MAX_CACHED = 256
"""Windows of tokens in the LRU cache of embeddings, which is on the device: 118 kB each for SD 1.x
in half precision."""

MAX_BATCH = 16
"""Prompts in one call, which bounds the memory of a burst of requests."""


class PromptKey(NamedTuple):
    """What decides a prompt's embedding, to the last bit; ``alone``: in a call of its own.

    ``mix`` are the adapters of the text encoder.
    """

    text: str
    alone: bool
    syntax: PromptSyntax = PromptSyntax.PLAIN
    mix: Mix = ()


class PromptEncoder:
    """Encodes prompts with a pipeline's tokenizer and text encoder.

    ``dtype`` is the denoiser's. The cache has at most ``max_cache_bytes`` bytes. A prompt of an
    exact job is encoded in a call of its own, because a batch may change the last bits, and has a
    cache entry of its own; so has one with adapters. So is each weighted prompt, which needs
    ``weighted``. ``adapters`` are the model's, None if it has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        dtype: torch.dtype,
        precision: Callable[[], AbstractContextManager[Any]],
        max_cache_bytes: int,
        weighted: WeightedPromptEncoder | None = None,
    ) -> None:
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._dtype = dtype
        self._precision = precision
        self._weighted = weighted
        self._max_cache_bytes = max_cache_bytes
        self.adapters: ModelAdapters | None = None
        self._cache: OrderedDict[PromptKey, Embedding] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""
        return int(self._tokenizer.model_max_length)

    @property
    def cache_bytes(self) -> int:
        """The bytes of all embeddings in the cache."""
        return sum(embedding.bytes for embedding in self._cache.values())

    def clear(self) -> None:
        """Remove every embedding from the cache."""
        self._cache.clear()

    def encode(self, wanted: Iterable[PromptKey]) -> dict[PromptKey, Embedding]:
        """The embedding of each wanted prompt; at most ``MAX_BATCH`` prompts a call.

        Raises ``PromptTooLong`` for a weighted prompt of too many windows, and what a text encoder
        raises. What was encoded before is in the cache then.
        """
        keys = list(dict.fromkeys(wanted))
        missing = [key for key in keys if key not in self._cache]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        self.counts[Counted.PROMPTS_CACHED] += len(found)
        for key in found:
            self._cache.move_to_end(key)
        for batch in _batches(missing):
            with encoding(self.adapters, batch[0].mix):
                encoded = dict(zip(batch, self._encode_batch(batch), strict=True))
            self.counts[Counted.PROMPTS_ENCODED] += len(batch)
            found.update(encoded)
            self._cache.update(encoded)  # Before the next batch, which may fail.
            while self._cached_windows > MAX_CACHED or self.cache_bytes > self._max_cache_bytes:
                self._cache.popitem(last=False)
        return found

    def encode_uncached(self, text: str) -> Embedding:
        """The embedding of ``text``, from a call of its own; the cache stays as it is."""
        return self._encode([text])[0]

    def padded(self, *embeddings: Embedding) -> tuple[Embedding, ...]:
        """The embeddings of the prompts of one image, all as long as the longest."""
        if len({embedding.hidden.shape[1] for embedding in embeddings}) == 1:
            return embeddings
        assert self._weighted is not None, "plain prompts have one length"
        return tuple(self._weighted.padded(*embeddings))

    @property
    def _cached_windows(self) -> float:
        return sum(each.hidden.shape[1] for each in self._cache.values()) / self.tokens

    def _encode_batch(self, batch: list[PromptKey]) -> list[Embedding]:
        if batch[0].syntax is PromptSyntax.PLAIN:
            return self._encode([key.text for key in batch])
        assert self._weighted is not None, "the model does not take weighted prompts"
        return [self._weighted.encode(key.text) for key in batch]

    def _encode(self, texts: list[str]) -> list[Embedding]:
        limit = self.tokens
        # verbose=False: the response says if a prompt was cut, so no warning is needed.
        lengths = [len(ids) for ids in self._tokenizer(texts, verbose=False).input_ids]
        batch = self._tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        device = self._text_encoder.device
        mask = None
        if getattr(self._text_encoder.config, "use_attention_mask", False):
            mask = send(batch.attention_mask, device)
        with self._precision():
            hidden = self._text_encoder(send(batch.input_ids, device), attention_mask=mask)[0]
        hidden = hidden.to(self._dtype)
        return [
            Embedding(hidden[i : i + 1].clone(), truncated=length > limit)
            for i, length in enumerate(lengths)
        ]


def _batches(keys: Sequence[PromptKey]) -> list[list[PromptKey]]:
    """The prompts of each call; those of one call have the same adapters."""
    shared: dict[Mix, list[PromptKey]] = {}
    for key in keys:
        if not key.alone:
            shared.setdefault(key.mix, []).append(key)
    batches = [
        together[i : i + MAX_BATCH]
        for together in shared.values()
        for i in range(0, len(together), MAX_BATCH)
    ]
    return batches + [[key] for key in keys if key.alone]
