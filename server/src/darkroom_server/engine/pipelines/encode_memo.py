"""The memo of encoded prompts: what ``encode_prompt`` returned, by its arguments."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from PIL import Image


class EncodeMemo:
    """A cache of at most ``max_bytes`` bytes of embeddings, the last used ones.

    They are kept in host memory. ``find`` returns them on ``device``: on a GPU as copies, on a CPU
    as they are, so a pipeline must not write into them.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self._max_bytes = max_bytes
        self._device = device
        self._bytes = 0
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """The bytes of all embeddings in the cache."""
        return self._bytes

    def clear(self) -> None:
        """Remove every embedding."""
        self._found.clear()
        self._bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._found

    def find(self, key: Hashable) -> Any:
        """What was encoded for ``key``. Raises ``KeyError``."""
        encoded, _ = self._found[key]
        self._found.move_to_end(key)
        return _moved(encoded, self._device)

    def keep(self, key: Hashable, encoded: Any) -> None:
        """Keep ``encoded``, unless it alone has more bytes than the cache may have."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(encoded))
        if size > self._max_bytes or key in self._found:
            return
        self._found[key] = (_moved(encoded, torch.device("cpu")), size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (_, freed) = self._found.popitem(last=False)
            self._bytes -= freed


def memo_key(value: Any) -> Hashable:
    """``value`` as part of a key: prompts, flags, numbers, images, and lists of them.

    Raises ``TypeError`` for a value that cannot be one, such as a tensor.
    """
    if isinstance(value, list | tuple):
        return tuple(memo_key(each) for each in value)
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return (type(value).__name__, value)
    if isinstance(value, Image.Image):
        digest = hashlib.blake2b(value.tobytes(), digest_size=16).digest()
        return ("Image", value.mode, value.size, digest)
    raise TypeError(f"a {type(value).__name__} cannot be part of a key")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
