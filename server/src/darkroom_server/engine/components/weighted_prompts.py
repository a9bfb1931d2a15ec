"""Weighted prompts of any length to the embeddings of the CLIP families, through compel."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from darkroom_server.core.errors import StartupError
from darkroom_server.core.model import EXTRAS
from darkroom_server.core.prompt_syntax import MAX_WINDOWS, Part, PromptTooLong, parse
from darkroom_server.engine.components.embedding import Embedding


def compel_is_installed() -> bool:
    """Whether the extra for weighted prompts is installed."""
    return find_spec("compel") is not None


class WeightedPromptEncoder:
    """Encodes prompts in the weighted syntax with the CLIP text encoders of one pipeline.

    Stable Diffusion has one encoder, of which the denoiser reads the last hidden states;
    ``sdxl`` is for two encoders, of which it reads the last layer but one, side by side, and the
    second one's pooled output. ``dtype`` is the denoiser's.

    A prompt longer than the encoders' window is encoded in several windows, split at the end of a
    sentence if there is one, else of a phrase, else of a word. Each prompt is encoded alone, so its
    embedding depends on no other prompt. The caller's thread is in inference mode.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        dtype: torch.dtype,
        precision: Callable[[], AbstractContextManager[Any]],
        *,
        sdxl: bool = False,
    ) -> None:
        """Raises ``StartupError`` if the optional package compel is missing."""
        try:
            from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
        except ImportError as error:
            raise StartupError(
                f"weighted prompts need compel ({error.name} is missing): "
                f"pip install 'darkroom-server[{EXTRAS['prompt_syntax']}]'"
            ) from None
        kinds = ReturnedEmbeddingsType
        self._dtype = dtype
        self._precision = precision
        self._has_pooled = sdxl
        self._providers = [
            EmbeddingsProvider(
                tokenizer,
                text_encoder,
                truncate=False,
                split_long_text_mode=SplitLongTextMode.SENTENCES,
                padding_attention_mask_value=_padding_mask(text_encoder),
                returned_embeddings_type=kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
                if sdxl
                else kinds.LAST_HIDDEN_STATES_NORMALIZED,
            )
            for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True)
        ]

    @property
    def window(self) -> int:
        """Tokens of one window, the start and end marks included."""
        return int(self._providers[0].max_token_count)

    def encode(self, *prompts: str) -> Embedding:
        """The embedding of a prompt: one text for all encoders, or one for each.

        Its length is a multiple of ``window``, and no token is cut off. Weights change ``hidden``
        only: ``pooled`` is that of the first window of the last encoder's text without its weights.

        Raises ``PromptSyntaxError`` or ``PromptTooLong`` before a text encoder runs.
        """
        texts = prompts * len(self._providers) if len(prompts) == 1 else prompts
        parsed = [parse(text) for text in texts]
        kept = [
            _with_tokens(provider, parts)
            for provider, parts in zip(self._providers, parsed, strict=True)
        ]
        for provider, text, parts in zip(self._providers, texts, kept, strict=True):
            if _windows(provider, parts) > MAX_WINDOWS:
                raise PromptTooLong(text, self.window)
        with self._precision():
            rows = [
                _hidden(provider, parts)
                for provider, parts in zip(self._providers, kept, strict=True)
            ]
            tokens = max(row.shape[1] for row in rows)
            rows = [
                _lengthened(row, provider.empty_z, tokens)
                for provider, row in zip(self._providers, rows, strict=True)
            ]
            hidden = torch.cat(rows, dim=-1)
            pooled = _pooled(self._providers[-1], parsed[-1]) if self._has_pooled else None
        return Embedding(
            hidden.to(self._dtype),
            truncated=False,
            pooled=None if pooled is None else pooled.to(self._dtype),
        )

    def padded(self, *embeddings: Embedding) -> list[Embedding]:
        """The same embeddings, all as long as the longest: windows of an empty prompt are added.

        The rows of one image, its prompt and its negative prompt, must have one length.
        """
        with self._precision():
            empty = torch.cat([provider.empty_z for provider in self._providers], dim=-1)
        empty = empty.to(self._dtype)
        tokens = max(embedding.hidden.shape[1] for embedding in embeddings)
        return [
            replace(embedding, hidden=_lengthened(embedding.hidden, empty, tokens))
            for embedding in embeddings
        ]


def _padding_mask(text_encoder: Any) -> int:
    """What an attention mask has for padding: 1, if the encoder was trained to read it."""
    return 0 if getattr(text_encoder.config, "use_attention_mask", False) else 1


def _hidden(provider: Any, parts: Sequence[Part]) -> torch.Tensor:
    """The hidden states of one encoder: [1, tokens, width]."""
    hidden: torch.Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
        [[part.text for part in parts]],
        [[part.weight for part in parts]],
        device=provider.text_encoder.device,
    )
    return hidden


def _with_tokens(provider: Any, parts: Sequence[Part]) -> list[Part]:
    """``parts`` without those that have no token, such as a space: compel fails for them."""
    if not parts:
        return [Part("", 1.0)]
    ids = provider.get_token_ids([part.text for part in parts], include_start_and_end_markers=False)
    return [part for part, found in zip(parts, ids, strict=True) if found] or [Part("", 1.0)]


def _windows(provider: Any, parts: Sequence[Part]) -> int:
    """The windows into which compel splits ``parts``."""
    ids, _, _ = provider.get_token_ids_and_expand_weights(
        [part.text for part in parts], [part.weight for part in parts], device="cpu"
    )
    return len(ids) // int(provider.max_token_count)


def _pooled(provider: Any, parts: Sequence[Part]) -> torch.Tensor:
    text = "".join(part.text for part in parts)
    pooled: torch.Tensor = provider.get_pooled_embeddings([text])
    return pooled


def _lengthened(hidden: torch.Tensor, empty: torch.Tensor, tokens: int) -> torch.Tensor:
    """``hidden`` with windows of an empty prompt behind it, ``tokens`` long together."""
    missing = (tokens - hidden.shape[1]) // empty.shape[1]
    return torch.cat([hidden, *[empty] * missing], dim=1) if missing else hidden
