"""Finds and loads the IP-Adapter of a model: its weights, and the image encoder that fits them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from safetensors import safe_open

from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.failures import is_out_of_memory, one_line
from darkroom_server.engine.loading.folder import check_weights

ENCODER = "image_encoder"

WIDTHS = {
    "image_proj.proj.weight": "projection_dim",
    "image_proj.proj.0.weight": "hidden_size",
    "image_proj.proj_in.weight": "hidden_size",
}
"""Weights that take an image's embedding, and what their width is in the encoder's configuration.

They are those of IP-Adapter, its Full Face, and Plus.
"""


@dataclass(frozen=True, slots=True)
class IpAdapterFiles:
    """The weights of an IP-Adapter, and the folder of its image encoder."""

    weights: Path
    encoder: Path


def find_ip_adapter(source: AdapterSource) -> IpAdapterFiles:
    """The files of ``source``: a path, or ``owner/name/path`` of the hub. Raises ``StartupError``.

    The image encoder is the folder ``image_encoder`` beside the weights, or that in ``models``
    beside their folder: the first one whose width fits.
    """
    path = Path(source.location).expanduser()
    try:
        if path.is_file():
            return _files(path, source)
        return _download(source)
    except StartupError:
        raise
    except Exception as error:
        # The hub and safetensors raise errors of any type.
        raise _failed(source, error) from error


def load_ip_adapter(pipeline: Any, files: IpAdapterFiles, source: AdapterSource) -> None:
    """Load an IP-Adapter into ``pipeline``, which is on the CPU. Raises ``StartupError``."""
    try:
        encoder, report = transformers.CLIPVisionModelWithProjection.from_pretrained(
            str(files.encoder),
            dtype=pipeline.unet.dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise StartupError(
                f"IP-Adapter {source.location!r}: its image encoder lacks {len(missing)} weights, "
                f"such as {missing[0]}; copy or download it again"
            )
        pipeline.register_modules(image_encoder=encoder)
        pipeline.load_ip_adapter(
            str(files.weights.parent),
            subfolder="",
            weight_name=files.weights.name,
            image_encoder_folder=None,
            local_files_only=True,
        )
    except StartupError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _failed(source, error) from error


def _download(source: AdapterSource) -> IpAdapterFiles:
    owner, name, *parts = source.location.split("/")
    options: dict[str, Any] = {"revision": source.revision, "token": source.token}

    def snapshot(*patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                f"{owner}/{name}", allow_patterns=list(patterns), **options
            )
        )

    file = "/".join(parts)
    folder = snapshot(file, *(f"{each}/config.json" for each in _encoders(Path(file))))
    if not (folder / file).is_file():
        raise StartupError(f"IP-Adapter {source.location!r}: {owner}/{name} has no file {file}")
    encoder = _encoder_that_fits(folder / file, source).relative_to(folder)
    folder = snapshot(file, *(f"{encoder}/{each}" for each in ("*.json", "*.safetensors")))
    return _files(folder / file, source)


def _files(weights: Path, source: AdapterSource) -> IpAdapterFiles:
    if weights.suffix != ".safetensors":
        raise StartupError(
            f"IP-Adapter {source.location!r} is not a .safetensors file: convert it to one"
        )
    encoder = _encoder_that_fits(weights, source)
    check_weights(encoder.parent, encoder.name, source.location)
    return IpAdapterFiles(weights, encoder)


def _encoders(weights: Path) -> Iterator[Path]:
    """The folders in which the image encoder of ``weights`` may be."""
    folder = weights.parent
    yield folder / ENCODER
    yield folder.parent / "models" / ENCODER


def _encoder_that_fits(weights: Path, source: AdapterSource) -> Path:
    with safe_open(weights, framework="pt") as opened:
        keys = set(opened.keys())
        key = _width_key(keys, source)
        width = opened.get_slice(key).get_shape()[1]
    entry = WIDTHS[key]
    folders = list(_encoders(weights))
    for folder in folders:
        config = folder / "config.json"
        if config.is_file() and json.loads(config.read_text("utf-8")).get(entry) == width:
            return folder
    places = " and ".join(str(folder) for folder in folders)
    raise StartupError(
        f"IP-Adapter {source.location!r}: no image encoder with a {entry} of {width} in {places}; "
        "put its folder there"
    )


def _width_key(keys: Iterable[str], source: AdapterSource) -> str:
    """The weight of ``WIDTHS`` among ``keys``."""
    found = [key for key in WIDTHS if key in keys]
    # Face ID reads the embedding of a face, which no image encoder here makes.
    is_face_id = "image_proj.perceiver_resampler.proj_in.weight" in keys or (
        "image_proj.proj.0.weight" in keys and "image_proj.proj.3.weight" not in keys
    )
    if is_face_id or len(found) != 1:
        raise StartupError(
            f"IP-Adapter {source.location!r}: not the weights of an IP-Adapter of a kind that is "
            "supported (IP-Adapter, Plus, Full Face)"
        )
    return found[0]


def _failed(source: AdapterSource, error: Exception) -> StartupError:
    return StartupError(
        f"IP-Adapter {source.location!r} cannot be loaded ({one_line(error)}); check that it is of "
        "the model's architecture, and its file"
    )
