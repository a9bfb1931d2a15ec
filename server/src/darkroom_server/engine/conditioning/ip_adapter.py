"""The IP-Adapter of a model: image prompts, with a scale for each row of a batch."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image

from darkroom_server.core.job import Job
from darkroom_server.core.model import Guidance
from darkroom_server.engine.conditioning.input_images import pil_image
from darkroom_server.engine.device.transfer import send
from darkroom_server.engine.failures import ImageNotEncoded, is_fatal, is_out_of_memory

KEPT_IMAGES = 16
"""Images whose embeddings are kept: a job's images, and those of a series, share one."""


class RowScales:
    """Takes the place of a scale in diffusers' attention processors, which is one for all rows.

    They compare it with 0, and multiply the states [rows, tokens, width] of the image by it.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def __eq__(self, other: object) -> bool:
        """Whether it is 0 for all rows: then the image's states are not computed."""
        return other == 0 and self.rows is None

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, states: torch.Tensor) -> torch.Tensor:
        """The states of each row times its scale."""
        assert self.rows is not None, "the scale is 0"
        # In float32, as a number is multiplied: another type would round the scale.
        return (self.rows.to(states.device) * states).to(states.dtype)


class IpAdapter:
    """The IP-Adapter that diffusers has loaded into ``pipeline``.

    Its image encoder runs in the context that ``precision`` makes. Once it is loaded, each row of
    the UNet needs an image embedding; a row without an image has zeros, and a scale of 0.
    """

    def __init__(self, pipeline: Any, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self._pipeline = pipeline
        self._precision = precision
        self._scales = RowScales()
        self._kept: OrderedDict[tuple[object, ...], list[torch.Tensor]] = OrderedDict()
        self._zeros: list[torch.Tensor] | None = None
        for processor in pipeline.unet.attn_processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = [self._scales]

    def embeddings(self, job: Job, *, guided: bool) -> list[torch.Tensor]:
        """The embeddings of the image of ``job``, for the rows of an image that it makes.

        They are as diffusers' pipelines take them: a tensor for each adapter, [rows, 1, ...].
        Raises an error that means that the device is lost or has no memory, and otherwise
        ``ImageNotEncoded``.
        """
        image = job.ip_adapter_image
        if image is None:
            return self.no_image(2 if guided else 1)
        key = (image.digest, image.width, image.height, guided)
        if key not in self._kept:
            try:
                self._kept[key] = self._encode(pil_image(image), guided=guided)
            except Exception as error:
                if is_fatal(error) or is_out_of_memory(error):
                    raise
                raise ImageNotEncoded(str(error)) from error
            if len(self._kept) > KEPT_IMAGES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def no_image(self, rows: int) -> list[torch.Tensor]:
        """The embeddings of ``rows`` rows without an image; their scale must be 0."""
        if self._zeros is None:
            white = Image.new("RGB", (64, 64), "white")
            self._zeros = [torch.zeros_like(each) for each in self._encode(white, guided=False)]
        return [each.expand(rows, *each.shape[1:]) for each in self._zeros]

    @contextmanager
    def rows(self, jobs: Sequence[tuple[Job, int]]) -> Iterator[None]:
        """The UNet's calls inside have the scales of ``jobs``, each with a number of rows."""
        scales = [
            0.0 if job.ip_adapter_image is None else job.ip_adapter_scale
            for job, rows in jobs
            for _ in range(rows)
        ]
        if any(scales):
            rows = send(torch.tensor(scales), self._pipeline.unet.device)
            self._scales.rows = rows.view(-1, 1, 1)
        try:
            yield
        finally:
            self._scales.rows = None

    def _encode(self, image: Image.Image, *, guided: bool) -> list[torch.Tensor]:
        with torch.no_grad(), self._precision():
            encoded: list[torch.Tensor] = self._pipeline.prepare_ip_adapter_image_embeds(
                image, None, self._pipeline.unet.device, 1, guided
            )
        return encoded


def image_prompt(ip_adapter: IpAdapter | None, job: Job, guidance: Guidance) -> dict[str, Any]:
    """The argument of a pipeline's call for the image of ``job``; {} without an ``ip_adapter``."""
    if ip_adapter is None:
        return {}
    embeddings = ip_adapter.embeddings(job, guided=guidance.applies_to(job))
    return {"ip_adapter_image_embeds": embeddings}


def no_image_arguments(ip_adapter: IpAdapter | None, rows: int) -> dict[str, Any]:
    """What a call of the UNet takes in addition for ``rows`` rows without an image."""
    if ip_adapter is None:
        return {}
    return {"added_cond_kwargs": {"image_embeds": ip_adapter.no_image(rows)}}


def row_scales(
    ip_adapter: IpAdapter | None, jobs: Sequence[tuple[Job, int]]
) -> AbstractContextManager[None]:
    """As ``IpAdapter.rows``; nothing for a model without ``ip_adapter``."""
    return nullcontext() if ip_adapter is None else ip_adapter.rows(jobs)
