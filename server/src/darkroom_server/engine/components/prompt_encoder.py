"""Prompts to embeddings: each distinct text once, in batches, with a cache."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from darkroom_server.core.events import Counted
from darkroom_server.engine.adapters.model_adapters import ModelAdapters
from darkroom_server.engine.adapters.weights import Mix
from darkroom_server.engine.counters import Counts

MAX_CACHED = 256
"""Size of the LRU cache of embeddings: 118 kB each for SD 1.x in half precision."""

MAX_BATCH = 16
"""Prompts in one call, which bounds the memory of a burst of requests."""


class PromptKey(NamedTuple):
    """A prompt, whether it is encoded in a call of its own, and the encoder's adapters."""

    text: str
    alone: bool
    mix: Mix = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt as the denoiser's input: ``hidden`` is [1, tokens, width]."""

    hidden: torch.Tensor
    truncated: bool


class PromptEncoder:
    """Encodes prompts with a pipeline's tokenizer and text encoder.

    ``dtype`` is the denoiser's. A prompt of an exact job is encoded in a call of its own, because
    a batch may change the last bits, and has a cache entry of its own; so has one with adapters.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        dtype: torch.dtype,
        precision: Callable[[], AbstractContextManager[Any]],
        adapters: ModelAdapters | None = None,
    ) -> None:
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._dtype = dtype
        self._precision = precision
        self._adapters = adapters
        self._cache: OrderedDict[PromptKey, Embedding] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""
        return int(self._tokenizer.model_max_length)

    def encode(self, wanted: Iterable[PromptKey]) -> dict[PromptKey, Embedding]:
        """The embedding of each wanted prompt; at most ``MAX_BATCH`` prompts a call."""
        keys = list(dict.fromkeys(wanted))
        missing = [key for key in keys if key not in self._cache]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        self.counts[Counted.PROMPTS_CACHED] += len(found)
        for key in found:
            self._cache.move_to_end(key)
        for batch in _batches(missing):
            texts = [key.text for key in batch]
            with nullcontext() if self._adapters is None else self._adapters.encoding(batch[0].mix):
                encoded = dict(zip(batch, self._encode(texts), strict=True))
            self.counts[Counted.PROMPTS_ENCODED] += len(batch)
            found.update(encoded)
            self._cache.update(encoded)  # Before the next batch, which may fail.
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return found

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
