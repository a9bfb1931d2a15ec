"""The input images of a job, as diffusers takes them."""

import random
from typing import Any

from PIL import Image

from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job, Task

MODES = {1: "L", 3: "RGB"}
"""PIL's names of the kinds of image, by the number of channels."""


def pil_image(image: InputImage) -> Image.Image:
    """``image`` as PIL holds it."""
    return Image.frombytes(MODES[image.channels], (image.width, image.height), image.pixels)


def image_arguments(job: Job) -> dict[str, Any]:
    """The arguments of a pipeline's call that hold the images of ``job``; {} without any."""
    if job.task is Task.EDIT:
        pictures = [pil_image(each) for each in job.reference_images]
        # A pipeline for one image takes no list.
        return {"image": pictures if len(pictures) > 1 else pictures[0]}
    if job.image is None:
        return {}
    arguments = {"image": pil_image(job.image).convert("RGB"), "strength": job.strength}
    if job.mask_image is not None:
        arguments["mask_image"] = pil_image(job.mask_image).convert("L")
    return arguments


def noise_image(size: int, channels: int) -> InputImage:
    """A square of ``size`` random pixels on each side, the same ones in each call.

    For measurements of speed: constant values can be faster than those of real images.
    """
    pixels = random.Random(0).randbytes(size * size * channels)
    return InputImage(digest="", width=size, height=size, channels=channels, pixels=pixels)
