"""What a UNet computes once for both rows of a guided image: all before the first prompt enters.

The rows of classifier-free guidance (Ho and Salimans 2022) have equal latents and timesteps, and
differ in their prompts only. Up to the first cross-attention a UNet computes the same for both.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

OTHER_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds")
"""Settings of UNets whose rows may differ from the first layer on, such as SDXL's."""


@dataclass(frozen=True, slots=True)
class _Images:
    """``rows`` of a batch; ``first`` [images] is the first row of each, ``of`` [rows] its image."""

    rows: int
    first: torch.Tensor
    of: torch.Tensor


class SharedRows:
    """Lets the first layers of ``unet`` compute each image once, for calls inside ``sharing``.

    Not for calls with adapters, whose layers count the rows of a batch.
    """

    def __init__(self, unet: Any) -> None:
        self._images: _Images | None = None
        for layer in _layers_before_prompts(unet):
            layer.forward = self._sharing(layer.forward)

    @contextmanager
    def sharing(self, rows: Sequence[int]) -> Iterator[None]:
        """Calls inside have ``rows`` rows of each image, one after another."""
        self._images = _images_of(tuple(rows)) if max(rows) > 1 else None
        try:
            yield
        finally:
            self._images = None

    def _sharing(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            images = self._images
            if images is None:
                return compute(*args, **kwargs)

            def once(value: Any) -> Any:
                has_rows = isinstance(value, torch.Tensor) and value.shape[:1] == (images.rows,)
                return value.index_select(0, images.first) if has_rows else value

            found = compute(*map(once, args), **{name: once(each) for name, each in kwargs.items()})
            if isinstance(found, torch.Tensor):
                return found.index_select(0, images.of)
            # A block returns its output, and what it passes to the way up; the last is the output.
            _, passed = found
            passed = tuple(each.index_select(0, images.of) for each in passed)
            return passed[-1], passed

        return forward


def sharing(shared: SharedRows | None, rows: Sequence[int]) -> AbstractContextManager[None]:
    """As ``SharedRows.sharing``; nothing without ``shared``."""
    return nullcontext() if shared is None else shared.sharing(rows)


@functools.lru_cache(maxsize=256)
def _images_of(rows: tuple[int, ...]) -> _Images:
    counts = torch.tensor(rows)
    return _Images(
        rows=sum(rows),
        first=counts.cumsum(0) - counts,
        of=torch.arange(len(rows)).repeat_interleave(counts),
    )


def _layers_before_prompts(unet: Any) -> list[Any]:
    """The layers that see neither a prompt nor what one has changed; none for another kind of UNet.

    Small ones between them are left out: to select rows takes longer.
    """
    if type(unet) is not UNet2DConditionModel:
        return []
    if any(getattr(unet.config, name, None) is not None for name in OTHER_CONDITIONS):
        return []
    layers = [unet.conv_in]
    for block in unet.down_blocks:
        if type(block) is DownBlock2D:
            layers.append(block)
            continue
        if type(block) is CrossAttnDownBlock2D:
            layers.append(block.resnets[0])
            first = getattr(block.attentions[0], "transformer_blocks", [None])[0]
            if first is not None and not first.only_cross_attention:
                layers.append(first.attn1)
        break
    return layers
