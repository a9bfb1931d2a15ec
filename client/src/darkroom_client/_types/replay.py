"""Everything that is needed to reproduce an image, and to check that it is the same."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from darkroom_client._types.inputs import Control, UploadedImage
from darkroom_client._types.picture import embedded_text, is_picture
from darkroom_client._types.request import GenerationRequest

_VERSION_KEY = "darkroom_replay"
_VERSION = 1
_NEWER = {
    field.name: field.default
    for field in dataclasses.fields(GenerationRequest)
    if field.name
    in (
        "embed_record",
        "true_cfg_scale",
        "max_sequence_length",
        "prompt_2",
        "negative_prompt_2",
        "prompt_3",
        "negative_prompt_3",
        "empty_negative_prompt",
        "guidance_rescale",
        "prompt_syntax",
        "image",
        "mask_image",
        "strength",
        "reference_images",
        "loras",
        "controls",
        "ip_adapter_image",
        "ip_adapter_scale",
    )
}
"""Fields of a request that clients of 0.1.0 do not know, and their defaults."""

_NEWER_OF_RECORD = {
    "channels_last": False,
    "memory_fallbacks": (),
    "quantization": "",
    "offload": "",
    "vae_channels_last": None,
}
"""Fields of a record that clients of 0.1.0 do not know, and their defaults."""

_OPTIONAL = {*_NEWER, *_NEWER_OF_RECORD, "request_id", "rows_in_last_pass"}
"""Keys that a record in a picture, or one of an older client, may lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRecord:
    """How one image was generated; ``Client.replay`` reproduces it.

    ``request`` generates this image alone, with every default of the model filled in. The images
    that it brings are named by the digests of their files.
    ``pixels_sha256`` is the SHA-256, in hex, of the height × width × 3 bytes of RGB before
    encoding. Two images are the same if their ``pixels_sha256`` are equal; if not,
    ``differences`` lists what else differs. ``rows_in_last_pass``: rows in the image's last
    denoiser pass; 0 in the record of a picture.
    ``channels_last``: the order of the denoiser's weights in memory; false from an older server.
    ``memory_fallbacks``: what the server did otherwise than its model's runtime says, because its
    device's memory was short: ``sdpa``, attention without slices, or ``tiled_decode``.
    ``quantization`` and ``offload``: those of ``ModelRuntime``. ``vae_channels_last``: the order of
    the VAE's weights; None if it is that of the denoiser's, as always on older servers.
    """

    request: GenerationRequest
    model_revision: str
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    dtype: str
    device: str
    preset: str
    library_versions: Mapping[str, str]
    rows_in_last_pass: int = 0
    pixels_sha256: str
    channels_last: bool = False
    memory_fallbacks: tuple[str, ...] = ()
    quantization: str = ""
    offload: str = ""
    vae_channels_last: bool | None = None

    def to_json(self) -> str:
        """This record as a readable JSON document, stable across versions of this client."""
        document: dict[str, Any] = {_VERSION_KEY: _VERSION, **dataclasses.asdict(self)}
        for name, default in _NEWER.items():
            if document["request"][name] == default:
                del document["request"][name]  # Older clients reject fields that they do not know.
        for name, default in _NEWER_OF_RECORD.items():
            if document[name] == default:
                del document[name]
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse a record that ``to_json`` wrote.

        Raises ``ValueError`` for any other text; the message says what is wrong.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not a replay record: {error}") from error
        if not isinstance(document, dict) or _VERSION_KEY not in document:
            raise ValueError(f"not a replay record: no key {_VERSION_KEY!r}")
        if (version := document.pop(_VERSION_KEY)) != _VERSION:
            raise ValueError(
                f"a replay record of version {version}; this client reads {_VERSION}: upgrade it"
            )
        request = _exactly(GenerationRequest, document.get("request"), "request")
        request.update(_inputs(request))
        record = _exactly(cls, document, "record")
        fallbacks = record.get("memory_fallbacks", [])
        if not isinstance(fallbacks, list):
            raise ValueError("not a replay record: memory_fallbacks is not a list")
        record["memory_fallbacks"] = tuple(map(str, fallbacks))
        return cls(**{**record, "request": GenerationRequest(**request)})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read the record of a file: what ``to_json`` wrote, or a picture with ``embed_record``.

        Raises ``ValueError`` for any other file; the message says what is wrong.
        """
        data = Path(path).read_bytes()
        if is_picture(data):
            text = embedded_text(data)
            if text is None:
                raise ValueError(f"{path} is a picture without a replay record")
            return cls.from_json(text)
        try:
            return cls.from_json(data.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is neither a replay record nor a picture") from error

    def differences(self, other: Self) -> dict[str, tuple[str, str]]:
        """Compare with ``other``: ``{name: (here, there)}`` of what differs, with dotted names.

        What does not affect the pixels is ignored: the request ids, and whether the record is in
        the file. So are the rows of the last pass, if a record lacks them.
        """
        here, there = _flat(self), _flat(other)
        if not (self.rows_in_last_pass and other.rows_in_last_pass):
            del here["rows_in_last_pass"], there["rows_in_last_pass"]
        names = sorted(here.keys() | there.keys())
        pairs = {name: (here.get(name, "-"), there.get(name, "-")) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def origin(record: ReplayRecord) -> dict[str, str]:
    """What images of one server share: its software, its kind of device and how the model runs."""
    return {
        "model_revision": record.model_revision,
        "dtype": record.dtype,
        "channels_last": str(record.channels_last).lower(),
        "vae_channels_last": str(_vae_layout(record)).lower(),
        "preset": record.preset,
        "quantization": record.quantization,
        "device": record.device.partition(":")[0],  # The engines of one server have numbers.
        **{f"library_versions.{name}": text for name, text in record.library_versions.items()},
    }


def _exactly(kind: type, value: object, where: str) -> dict[str, Any]:
    """``value`` as keyword arguments of the dataclass ``kind``: no key missing, none unknown."""
    if not isinstance(value, dict):
        raise ValueError(f"not a replay record: {where} is not an object")
    wanted = {field.name for field in dataclasses.fields(kind)}
    if missing := sorted(wanted - _OPTIONAL - value.keys()):
        raise ValueError(f"not a replay record: {where} lacks {', '.join(missing)}")
    if unknown := sorted(value.keys() - wanted):
        raise ValueError(f"not a replay record: {where} has unknown {', '.join(unknown)}")
    return value


def _inputs(request: Mapping[str, Any]) -> dict[str, Any]:
    """The images and ControlNets in the JSON of a request, as it has them."""
    try:
        found: dict[str, Any] = {
            name: UploadedImage(**request[name])
            for name in ("image", "mask_image", "ip_adapter_image")
            if request.get(name) is not None
        }
        found["reference_images"] = tuple(
            UploadedImage(**image) for image in request.get("reference_images", ())
        )
        found["controls"] = tuple(
            Control(**{**control, "image": UploadedImage(**control["image"])})
            for control in request.get("controls", ())
        )
    except (TypeError, KeyError) as error:
        raise ValueError("not a replay record: an image in the request is not one") from error
    return found


def _flat(record: ReplayRecord) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in dataclasses.asdict(record).items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": str(inner) for key, inner in value.items()})
        else:
            flat[name] = str(value)
    flat["vae_channels_last"] = str(_vae_layout(record))
    del flat["request.request_id"], flat["request.embed_record"]
    return flat


def _vae_layout(record: ReplayRecord) -> bool:
    """Whether the VAE's weights were stored channels last."""
    own = record.vae_channels_last
    return record.channels_last if own is None else own
