"""The flags for the images and adapters of a request, and the request's fields."""

import argparse
import functools
from dataclasses import replace
from pathlib import Path

from darkroom_client._canny import canny
from darkroom_client._types.inputs import Control
from darkroom_client._types.request import GenerationOptions


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    title = "images and adapters, for models that take them (see `darkroom models`)"
    add = parser.add_argument_group(title).add_argument
    add("--image", metavar="FILE", type=Path, help="the image to start from: PNG, JPEG or WebP")
    add(
        "--mask",
        metavar="FILE",
        type=Path,
        help="an image of the same size: white parts are generated again, black ones stay",
    )
    add("--strength", metavar="0-1", type=float, help="how much of --image is replaced")
    add(
        "--reference",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="an image to edit or to refer to; may be given several times",
    )
    add(
        "--lora",
        metavar="ID[:SCALE]",
        type=_lora,
        action="append",
        default=[],
        help="a LoRA adapter, such as outline:0.8; may be given several times",
    )
    add(
        "--control",
        metavar="ID:FILE[:SCALE]",
        type=_control,
        action="append",
        default=[],
        help="a ControlNet, its image and its scale, such as pose:edges.png:0.8; may be given "
        "several times",
    )
    add(
        "--canny",
        metavar="ID:FILE[:SCALE]",
        type=_control,
        action="append",
        default=[],
        help="as --control, with the edges of an image, such as edges:photo.jpg; needs Pillow and "
        "numpy; may be given several times",
    )
    add("--ip-adapter-image", metavar="FILE", type=Path, help="the image of the IP-Adapter")
    add("--ip-adapter-scale", metavar="0-1", type=float, help="how strong the IP-Adapter is")


def inputs_of(arguments: argparse.Namespace) -> GenerationOptions:
    """The fields of a request.

    Raises ``ValueError`` for a LoRA that is there twice and for a file of ``--canny`` that is no
    image, ``OSError`` for one that cannot be read.
    """
    loras = dict(arguments.lora)
    if len(loras) < len(arguments.lora):
        raise ValueError("--lora: each adapter may be given once")
    return {
        "image": arguments.image,
        "mask_image": arguments.mask,
        "strength": arguments.strength,
        "reference_images": tuple(arguments.reference),
        "loras": loras or None,
        "controls": (
            *arguments.control,
            *(replace(each, image=_edges(each.image)) for each in arguments.canny),
        ),
        "ip_adapter_image": arguments.ip_adapter_image,
        "ip_adapter_scale": arguments.ip_adapter_scale,
    }


def _lora(text: str) -> tuple[str, float]:
    id, colon, scale = text.rpartition(":")
    try:
        return (id, float(scale)) if colon else (text, 1.0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID or ID:SCALE") from None


def _control(text: str) -> Control:
    id, _, rest = text.partition(":")
    path, _, scale = rest.rpartition(":")
    if not path:
        path, scale = rest, "1"
    try:
        strength = float(scale)
    except ValueError:
        path, strength = rest, 1.0  # The colon is part of the file's name.
    if not (id and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:FILE or ID:FILE:SCALE")
    return Control(id, Path(path), scale=strength)


@functools.cache  # The requests of all prompts have the same controls.
def _edges(path: Path) -> bytes:
    try:
        return canny(path)
    except ImportError as error:
        raise ValueError(
            "--canny needs Pillow and numpy: pip install 'darkroom-client[cli,numpy]'"
        ) from error
    except ValueError as error:
        raise ValueError(f"--canny: {path}: {error}") from error
