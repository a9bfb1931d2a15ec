"""What the cross-attention layers of a denoiser make of prompts, kept from one step to the next."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import Any

import torch

Forward = Callable[..., torch.Tensor]


class PromptProjections:
    """Keeps the keys and values of a batch's prompts for as long as batches have the same prompts.

    They depend neither on the latents nor on the timestep, so they are the same at each step until
    a sample joins or leaves. What is kept is what would be computed again, bit for bit.
    """

    def __init__(self, denoiser: Any) -> None:
        self._prompts: tuple[torch.Tensor, ...] = ()
        self._context: torch.Tensor | None = None
        self._kept: dict[str, torch.Tensor] = {}
        self._is_keeping = False
        for name, layer in _layers(denoiser).items():
            layer.forward = self._keeping(name, layer.forward)

    def context(self, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The prompts of all rows, [rows, tokens, width]; one is [1, tokens, width].

        It is the same tensor as before if the prompts are the same tensors.
        """
        same = len(prompts) == len(self._prompts) and all(map(is_, prompts, self._prompts))
        if self._context is None or not same:
            self._kept.clear()
            self._prompts, self._context = tuple(prompts), torch.cat(tuple(prompts))
        return self._context

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Calls inside compute each projection of ``context`` once.

        Not for calls with adapters: they add to what a layer returns, in place.
        """
        self._is_keeping = True
        try:
            yield
        finally:
            self._is_keeping = False

    def _keeping(self, name: str, compute: Forward) -> Forward:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not self._is_keeping or x is not self._context:
                return compute(x, *args, **kwargs)
            kept = self._kept.get(name)
            if kept is None:
                kept = self._kept[name] = compute(x, *args, **kwargs)
            return kept

        return forward


def keeping(projections: PromptProjections | None) -> AbstractContextManager[None]:
    """As ``PromptProjections.keeping``; nothing without ``projections``."""
    return nullcontext() if projections is None else projections.keeping()


def bytes_per_prompt(denoiser: Any, tokens: int) -> int:
    """The bytes that are kept of a prompt of ``tokens`` tokens."""
    layers = _layers(denoiser).values()
    return sum(tokens * each.out_features * denoiser.dtype.itemsize for each in layers)


def _layers(denoiser: Any) -> dict[str, Any]:
    """The layers that project prompts, by name: those of keys and of values."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in denoiser.named_modules()
        if getattr(module, "is_cross_attention", False)
        for part in ("to_k", "to_v")
    }
