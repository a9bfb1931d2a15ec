"""One model of the trace as a peer's server holds it: diffusers' pipelines, as users call them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from bench.inprocess.pipelines import load_pipeline, png, precision
from bench.peers.servers.sd_pipeline import in_calls
from bench.peers.servers.trace import Trace
from bench.trace.peers.config import ImageRequest, PeerConfig
from bench.trace.requests import Kind

CLASSES: dict[Kind, Any] = {
    Kind.IMAGE: diffusers.AutoPipelineForImage2Image,
    Kind.INPAINT: diffusers.AutoPipelineForInpainting,
}


class PeerModel:
    """A pipeline for each kind of request, which share their weights; adapters come when needed.

    ``generate`` is always called on the same thread: OpenMP keeps a pool for each.
    """

    def __init__(self, name: str, config: PeerConfig) -> None:
        self._config = config
        self._pipelines = {
            Kind.TEXT: load_pipeline(str(Path(config.folder) / name), config.runtime)
        }
        self._trace = Trace(config.trace)
        self._adapters: set[str] = set()
        self._active: tuple[str, ...] = ()

    def generate(self, requests: Sequence[ImageRequest]) -> list[bytes]:
        """The PNG files of ``requests``, in their order; one call for those of equal settings."""
        return in_calls(requests, self._config.max_batch_images, self._images, self._trace)

    def _images(self, call: Sequence[ImageRequest]) -> list[bytes]:
        first = call[0]
        self._use(first.loras)
        pipeline = self._pipeline(first.kind)
        with precision(self._config.runtime):
            images = pipeline(
                [each.prompt for each in call],
                num_inference_steps=first.steps,
                guidance_scale=first.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(each.seed) for each in call],
                **_pictures(call),
            ).images
        return [png(image) for image in images]

    def _pipeline(self, kind: Kind) -> Any:
        if kind not in self._pipelines:
            pipeline = CLASSES[kind].from_pipe(self._pipelines[Kind.TEXT])
            pipeline.set_progress_bar_config(disable=True)
            self._pipelines[kind] = pipeline
        return self._pipelines[kind]

    def _use(self, loras: tuple[str, ...]) -> None:
        """Let the denoiser use these adapters and no others."""
        if loras == self._active:
            return
        pipeline = self._pipelines[Kind.TEXT]
        for id in loras:
            if id not in self._adapters:
                pipeline.load_lora_weights(self._config.loras[id], adapter_name=id)
                self._adapters.add(id)
        if loras:
            pipeline.enable_lora()
            pipeline.set_adapters(list(loras))
        else:
            pipeline.disable_lora()
        self._active = loras


def warm_up(config: PeerConfig) -> None:
    """Generate an image of each kind, on this thread: the first ones import libraries."""
    name = min(each.name for each in Path(config.folder).iterdir())
    model = PeerModel(name, config)
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    loras: tuple[str, ...] = ()
    for kind in Kind:
        request = ImageRequest(
            index=-1,
            prompt="",
            steps=2,
            guidance_scale=7.5,
            seed=0,
            width=64,
            height=64,
            kind=kind,
            loras=loras,
            image=file.getvalue(),
        )
        model.generate([request])
        loras = tuple(config.loras)


def _pictures(call: Sequence[ImageRequest]) -> dict[str, Any]:
    """The arguments of a kind. With strength 1 an image takes the same steps as one from text."""
    first = call[0]
    size = {"width": first.width, "height": first.height}
    if first.kind is Kind.TEXT:
        return size
    pictures = [Image.open(io.BytesIO(each.image)).convert("RGB") for each in call]
    if first.kind is Kind.IMAGE:
        return {"image": pictures, "strength": 1.0}
    return {"image": pictures, "mask_image": pictures, "strength": 1.0, **size}
