"""A finished image as its callers get it, of this server or of another one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from darkroom_server.core.events import EncodedImage, ImageFields


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayedImage(ImageFields):
    """One that another server generated, as its ``messages``; ``decode`` reads the file in them.

    Streams pass the messages on. ``data`` decodes them each time that it is read.
    """

    messages: tuple[bytes, ...]
    decode: Callable[[Sequence[bytes]], bytes]

    @property
    def data(self) -> bytes:
        """As of ``EncodedImage``."""
        return self.decode(self.messages)


FinishedImage = EncodedImage | RelayedImage
