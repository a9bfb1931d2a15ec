"""Prompts to embeddings: each distinct text once, in batches, with a cache."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.core.events import Counted
from darkroom_server.engine.counters import Counts

MAX_CACHED = 256
"""Most embeddings in the LRU cache, which is on the device: 118 kB each for SD 1.x in half
precision."""

MAX_BATCH = 16
"""Prompts in one call, which bounds the memory of a burst of requests."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt as the denoiser's input: ``hidden`` is [1, tokens, width]."""

    hidden: torch.Tensor
    truncated: bool

    @property
    def bytes(self) -> int:
        """The bytes of ``hidden``."""
        return self.hidden.numel() * self.hidden.element_size()


class PromptEncoder:
    """Encodes prompts with a pipeline's tokenizer and text encoder.

    ``dtype`` is the denoiser's. The cache has at most ``max_cache_bytes`` bytes. A prompt of an
    exact job is encoded in a call of its own, because a batch may change the last bits, and has a
    cache entry of its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        dtype: torch.dtype,
        precision: Callable[[], AbstractContextManager[Any]],
        max_cache_bytes: int,
    ) -> None:
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._dtype = dtype
        self._precision = precision
        self._max_cache_bytes = max_cache_bytes
        self._cache: OrderedDict[tuple[str, bool], Embedding] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""
        return int(self._tokenizer.model_max_length)

    @property
    def cache_bytes(self) -> int:
        """The bytes of all embeddings in the cache."""
        return sum(embedding.bytes for embedding in self._cache.values())

    def encode(self, wanted: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], Embedding]:
        """The embedding of each wanted (prompt, alone); at most ``MAX_BATCH`` prompts a call."""
        keys = list(dict.fromkeys(wanted))
        missing = [key for key in keys if key not in self._cache]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        self.counts[Counted.PROMPTS_CACHED] += len(found)
        for key in found:
            self._cache.move_to_end(key)
        shared = [key for key in missing if not key[1]]
        batches = [shared[i : i + MAX_BATCH] for i in range(0, len(shared), MAX_BATCH)]
        batches += [[key] for key in missing if key[1]]
        for batch in batches:
            encoded = dict(zip(batch, self._encode([text for text, _ in batch]), strict=True))
            self.counts[Counted.PROMPTS_ENCODED] += len(batch)
            found.update(encoded)
            self._cache.update(encoded)  # Before the next batch, which may fail.
            while len(self._cache) > MAX_CACHED or self.cache_bytes > self._max_cache_bytes:
                self._cache.popitem(last=False)
        return found

    def encode_uncached(self, text: str) -> Embedding:
        """The embedding of ``text``, from a call of its own; the cache stays as it is."""
        return self._encode([text])[0]

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
            mask = batch.attention_mask.to(device)
        with self._precision():
            hidden = self._text_encoder(batch.input_ids.to(device), attention_mask=mask)[0]
        hidden = hidden.to(self._dtype)
        return [
            Embedding(hidden[i : i + 1].clone(), truncated=length > limit)
            for i, length in enumerate(lengths)
        ]
