"""Everything that is needed to reproduce an image, and to check that it is the same."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from darkroom_client._types.request import GenerationRequest

_VERSION_KEY = "darkroom_replay"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRecord:
    """How one image was generated; ``Client.replay`` reproduces it.

    ``request`` generates this image alone, with every field set. ``pixels_sha256`` is the SHA-256,
    in hex, of the height × width × 3 bytes of RGB before encoding. Two images are the same if
    their ``pixels_sha256`` are equal; if not, ``differences`` lists what else differs.
    ``rows_in_last_pass``: rows in the image's last denoiser pass.
    """

    request: GenerationRequest
    model_revision: str
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    dtype: str
    device: str
    preset: str
    library_versions: Mapping[str, str]
    rows_in_last_pass: int
    pixels_sha256: str

    def to_json(self) -> str:
        """This record as a readable JSON document, stable across versions of this client."""
        document = {_VERSION_KEY: _VERSION, **dataclasses.asdict(self)}
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
        return cls(**{**_exactly(cls, document, "record"), "request": GenerationRequest(**request)})

    def differences(self, other: Self) -> dict[str, tuple[str, str]]:
        """Compare with ``other``: ``{name: (here, there)}`` of what differs, with dotted names.

        The request ids are ignored: they do not affect the pixels.
        """
        here, there = _flat(self), _flat(other)
        names = sorted(here.keys() | there.keys())
        pairs = {name: (here.get(name, "-"), there.get(name, "-")) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _exactly(kind: type, value: object, where: str) -> dict[str, Any]:
    """``value`` as keyword arguments of the dataclass ``kind``: no key missing, none unknown."""
    if not isinstance(value, dict):
        raise ValueError(f"not a replay record: {where} is not an object")
    wanted = {field.name for field in dataclasses.fields(kind)}
    if missing := sorted(wanted - value.keys()):
        raise ValueError(f"not a replay record: {where} lacks {', '.join(missing)}")
    if unknown := sorted(value.keys() - wanted):
        raise ValueError(f"not a replay record: {where} has unknown {', '.join(unknown)}")
    return value


def _flat(record: ReplayRecord) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in dataclasses.asdict(record).items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": str(inner) for key, inner in value.items()})
        else:
            flat[name] = str(value)
    flat.pop("request.request_id", None)
    return flat
