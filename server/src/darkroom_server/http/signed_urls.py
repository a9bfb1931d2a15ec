"""URLs of results that a browser can open without a token, for as long as results are kept."""

import hmac
import secrets
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from darkroom_server.core.errors import StartupError, UnknownRequest
from darkroom_server.core.job import ImageFormat

MIN_KEY_BYTES = 32

PATH = "/v1/images/results/{caller}/{request_id}/{file}"

EXTENSIONS = {
    ImageFormat.PNG: "png",
    ImageFormat.JPEG: "jpg",
    ImageFormat.WEBP: "webp",
    ImageFormat.RAW_RGB: "rgb",
}


class SignedUrls:
    """Makes and checks URLs. ``seconds``: how long results are kept, 0 if they are not.

    ``key_file`` holds the key, without one the key is random. ``by_default``: requests that do not
    say how they want their images get URLs. Raises ``StartupError``.
    """

    def __init__(
        self, seconds: float, key_file: str | None = None, *, by_default: bool = False
    ) -> None:
        if by_default and not seconds:
            raise StartupError(
                "--http-response-format url: needs results that are kept, by --result-ttl and "
                "--result-bytes"
            )
        self.seconds = seconds
        self.by_default = by_default
        self._key = _read_key(key_file) if key_file else secrets.token_bytes(MIN_KEY_BYTES)

    def make(
        self, base_url: str, caller: str, request_id: str, index: int, format: ImageFormat
    ) -> str:
        """The URL of image ``index`` of a job that ended."""
        expires = str(int(time.time() + self.seconds))
        signature = self._signature(caller, request_id, index, expires)
        path = PATH.format(
            caller=quote(caller, safe=""),
            request_id=quote(request_id, safe=""),
            file=f"{index}.{EXTENSIONS[format]}",
        )
        return f"{base_url}{path}?expires={expires}&signature={signature}"

    def check(self, path: Mapping[str, str], query: Mapping[str, str]) -> tuple[str, str, int]:
        """The caller, request id and index that a URL names, from its path and its query.

        Raises ``UnknownRequest`` if the URL is not one of ours, or has expired: the answer is the
        same as for a result that is not kept.
        """
        caller, request_id = path["caller"], path["request_id"]
        number = path["file"].partition(".")[0]
        expires, signature = query.get("expires", ""), query.get("signature", "")
        if not _is_number(number) or not _is_number(expires):
            raise UnknownRequest(request_id)
        right = self._signature(caller, request_id, int(number), expires)
        valid = hmac.compare_digest(right.encode(), signature.encode())
        if not valid or int(expires) < time.time():
            raise UnknownRequest(request_id)
        return caller, request_id, int(number)

    def _signature(self, caller: str, request_id: str, index: int, expires: str) -> str:
        # No part can hold a line break, so no two URLs have the same text.
        text = f"{caller}\n{request_id}\n{index}\n{expires}"
        return hmac.new(self._key, text.encode(), sha256).hexdigest()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 12


def _read_key(path: str) -> bytes:
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"--http-url-key {path}: cannot be read: {error.strerror}") from None
    if len(key) < MIN_KEY_BYTES:
        raise StartupError(f"--http-url-key {path}: must hold at least {MIN_KEY_BYTES} bytes")
    return key
