"""Argument specs: what each argument of a denoiser is, so that calls of it can be merged.

The kind of an argument is declared and never guessed from its value: a list of one tensor for each
block and a list of one entry for each row can have the same length. An argument without a kind
makes the call run alone, which is slow and never wrong.
"""

import functools
import hashlib
import inspect
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from darkroom_server.engine.device.transfer import send

Arguments = Mapping[str, Any]

_digests: MutableMapping[torch.Tensor, bytes] = WeakTensorKeyDictionary()
"""Digests of tensors that are alive, as they were when first seen."""


class StaleKey(RuntimeError):
    """Calls with equal keys have unequal arguments, because a pipeline wrote into a tensor."""


class Kind(Enum):
    """What an argument is, or an entry of an argument that is a dict."""

    ROWS = auto()
    """A tensor with the rows in its first dimension."""
    ROWS_IN_DIM_1 = auto()
    """A tensor with the rows in its second dimension."""
    ROW_LIST = auto()
    """A list with a tensor for each row; the shapes may differ."""
    PER_BLOCK = auto()
    """A list with a tensor for each block of the denoiser, each with the rows in dimension 0."""
    TIMESTEP = auto()
    """A number or a tensor of a timestep for all rows of the call or for each; of any dtype."""
    PADDED = auto()
    """As ROWS; dimension 1 is padded at its end with zeros to the longest of a batch."""
    MASK = auto()
    """The mask of the PADDED arguments, [rows, length], zero for padding; may be None."""
    SAME = auto()
    """A tensor that is equal in all calls of a batch, such as the positions of the pixels."""
    EQUAL_ROWS = auto()
    """A list with a plain value for each row, all of which are equal in all calls of a batch."""
    EQUAL = auto()
    """A plain value that is equal in all calls of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentSpec:
    """The arguments of one denoiser class.

    ``kinds`` are by name, ``name.entry`` for an entry of a dict. ``rows_in`` names an argument that
    says how many rows a call has. ``signature`` is ``signature_of`` the class that the spec was
    proved on, with any of the versions ``diffusers``. ``output_is_list``: the denoiser returns a
    list with a tensor for each row, else a tensor with the rows in its first dimension.
    ``mixes_sizes``: images of one ``common_square`` share batches. ``layout`` is that of
    four-dimensional rows.
    """

    denoiser: str
    kinds: Mapping[str, Kind]
    rows_in: str
    signature: str
    diffusers: str
    output_is_list: bool = False
    mixes_sizes: bool = False
    layout: torch.memory_format = torch.contiguous_format

    def rows(self, arguments: Arguments) -> int:
        """The rows of a call."""
        first = arguments[self.rows_in]
        # Faster than the length of a tensor.
        return int(first.shape[0]) if isinstance(first, torch.Tensor) else len(first)

    def group_key(self, arguments: Arguments) -> Hashable:
        """Calls with equal keys can be merged; None if an argument has no kind."""
        keys: list[Hashable] = []
        for name, value in flat(arguments):
            kind = self.kinds.get(name)
            if kind is Kind.ROWS and value is not None:  # Most arguments are of this kind.
                keys.append((name, value.dtype, value.shape[1:]))
            elif kind is None and value is not None:
                return None
            elif value is not None or kind is Kind.MASK:
                keys.append((name, _key(kind, value)))
        return frozenset(keys)

    def alone(self, arguments: Arguments) -> dict[str, Any]:
        """The arguments of a call that is not merged: as given, but where the denoiser is."""
        device = self._device(arguments)
        given = dict(arguments)
        for name, value in arguments.items():
            kind = self.kinds.get(name)
            if kind is Kind.TIMESTEP and isinstance(value, torch.Tensor):
                given[name] = send(value, device)
            elif kind is Kind.ROWS and self.layout is not torch.contiguous_format:
                # Otherwise as given: another layout may change the last bits.
                given[name] = self._laid_out(value)
        return given

    def select(self, arguments: Arguments, rows: Sequence[int]) -> Arguments:
        """The arguments of one call with some of the rows of ``arguments``, such as [2, 3].

        ``arguments`` are those of ``alone`` or of ``collate``; all must be known.
        """
        if list(rows) == list(range(self.rows(arguments))):
            return arguments
        index = send(torch.tensor(rows), self._device(arguments))
        selected: dict[str, Any] = {}
        for name, value in arguments.items():
            if isinstance(value, dict):
                selected[name] = {
                    entry: self._select(f"{name}.{entry}", each, rows, index)
                    for entry, each in value.items()
                }
            else:
                selected[name] = self._select(name, value, rows, index)
        return selected

    def collate(self, calls: Sequence[Arguments]) -> dict[str, Any]:
        """The arguments of one call that stands for ``calls``, which have equal keys.

        An argument that is None in some calls may be absent in others. Raises ``StaleKey`` if the
        calls are not equal any more.
        """
        self._check_same(calls)
        rows = [self.rows(call) for call in calls]
        lengths = self._lengths(calls)
        device = self._device(calls[0])
        merged: dict[str, Any] = {}
        for name, value in calls[0].items():
            given = [call.get(name) for call in calls]
            if isinstance(value, dict):
                merged[name] = {
                    entry: self._merge(
                        f"{name}.{entry}",
                        [each and each.get(entry) for each in given],
                        rows,
                        lengths,
                    )
                    for entry in value
                }
            elif self.kinds.get(name) is Kind.TIMESTEP and value is not None:
                merged[name] = send(merge_timesteps(given, rows), device)
            else:
                merged[name] = self._merge(name, given, rows, lengths)
        return merged

    def split(self, output: Any, rows: Sequence[int]) -> list[tuple[Any, ...]]:
        """What the denoiser returns for each of the calls that were merged."""
        found = output[0]
        if not self.output_is_list:
            return [(part,) for part in found.split(list(rows))]
        parts, start = [], 0
        for count in rows:
            parts.append((list(found[start : start + count]),))
            start += count
        return parts

    def _select(self, name: str, value: Any, rows: Sequence[int], index: torch.Tensor) -> Any:
        if value is None:
            return None
        match self.kinds[name]:
            case Kind.ROWS:
                return self._laid_out(value[index])
            case Kind.PADDED | Kind.MASK:
                return value[index]
            case Kind.ROWS_IN_DIM_1:
                return value[:, index]
            case Kind.PER_BLOCK:
                return [each[index] for each in value]
            case Kind.ROW_LIST | Kind.EQUAL_ROWS:
                return [value[row] for row in rows]
            case Kind.TIMESTEP if isinstance(value, torch.Tensor) and value.ndim:
                return value[index.to(value.device)]
        return value

    def _check_same(self, calls: Sequence[Arguments]) -> None:
        """Compare the SAME arguments on their device, and wait for it once."""
        names = [name for name, kind in self.kinds.items() if kind is Kind.SAME]
        if not names:
            return
        named = [dict(flat(call)) for call in calls]
        distinct: list[list[torch.Tensor]] = []
        for name in names:
            given = {id(call[name]): call[name] for call in named if call.get(name) is not None}
            distinct.append(list(given.values()))
        differences = [(same[0] != other).any() for same in distinct for other in same[1:]]
        if not differences or not torch.stack(differences).any():
            return
        for value in (value for same in distinct for value in same):
            _digests.pop(value, None)  # So that the next calls have other keys.
        raise StaleKey("a pipeline wrote into a tensor that must be equal in a batch")

    def _device(self, arguments: Arguments) -> torch.device:
        first = arguments[self.rows_in]
        device: torch.device = first.device if isinstance(first, torch.Tensor) else first[0].device
        return device

    def _laid_out(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim != 4:
            return value
        return value.contiguous(memory_format=self.layout)

    def _lengths(self, calls: Sequence[Arguments]) -> list[int]:
        """The length of each call's PADDED arguments, 0 without one."""
        padded = [name for name, kind in self.kinds.items() if kind is Kind.PADDED]
        if not padded:
            return [0] * len(calls)
        return [max((call[n].shape[1] for n in padded if n in call), default=0) for call in calls]

    def _merge(self, name: str, values: list[Any], rows: list[int], lengths: list[int]) -> Any:
        kind = self.kinds.get(name)
        longest = max(lengths)
        if kind is Kind.MASK:
            return _merge_masks(values, rows, lengths)
        first = values[0]
        if first is None:
            return None
        match kind:
            case Kind.ROWS:
                return self._laid_out(torch.cat(values))
            case Kind.ROWS_IN_DIM_1:
                return torch.cat(values, dim=1)
            case Kind.ROW_LIST | Kind.EQUAL_ROWS:
                return [row for value in values for row in value]
            case Kind.PER_BLOCK:
                return [torch.cat(block) for block in zip(*values, strict=True)]
            case Kind.PADDED:
                return torch.cat([_pad(value, longest) for value in values])
        return first


def merge_timesteps(values: Sequence[Any], rows: Sequence[int]) -> torch.Tensor:
    """The timestep of each row in float32: schedulers differ in the dtype of theirs.

    Half precision stays: a pipeline converts timesteps to it if its denoiser computes in theirs.
    """
    tensors = [v if isinstance(v, torch.Tensor) else torch.as_tensor(v) for v in values]
    dtype = functools.reduce(torch.promote_types, {_timestep_dtype(each) for each in tensors})
    if any(each.device.type != "cpu" for each in tensors):
        # Reading them would wait for the device.
        parts = [t.to(dtype).reshape(-1).expand(n) for t, n in zip(tensors, rows, strict=True)]
        return torch.cat(parts)
    numbers: list[float] = []
    for tensor, count in zip(tensors, rows, strict=True):
        found: Any = tensor.tolist()  # A number if it has no dimension.
        found = found if isinstance(found, list) else [found]
        numbers += found * count if len(found) == 1 else found
    return torch.tensor(numbers, dtype=dtype)


def _timestep_dtype(timestep: torch.Tensor) -> torch.dtype:
    half = timestep.dtype in (torch.float16, torch.bfloat16)
    return timestep.dtype if half else torch.float32


def signature_of(denoiser: type) -> str:
    """A digest of the arguments of ``denoiser``'s forward: names, order and defaults."""
    parameters = inspect.signature(denoiser.forward).parameters.values()  # type: ignore[attr-defined]
    text = ", ".join(f"{p.kind.name} {p.name}={p.default!r}" for p in parameters)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(arguments: Arguments) -> Iterable[tuple[str, Any]]:
    """The arguments, and in place of a dict its entries."""
    if not any(isinstance(value, dict) for value in arguments.values()):
        return arguments.items()
    found: list[tuple[str, Any]] = []
    for name, value in arguments.items():
        if isinstance(value, dict):
            found += [(f"{name}.{entry}", each) for entry, each in value.items()]
        else:
            found.append((name, value))
    return found


def _key(kind: Kind | None, value: Any) -> Hashable:
    match kind:
        case Kind.ROWS_IN_DIM_1:
            return (value.dtype, value.shape[0], value.shape[2:])
        case Kind.ROW_LIST:
            return (value[0].dtype, value[0].ndim)
        case Kind.PER_BLOCK:
            return tuple((each.dtype, each.shape[1:]) for each in value)
        case Kind.PADDED:
            return (value.dtype, value.shape[2:])
        case Kind.SAME:
            return (value.dtype, value.shape, _digest(value))
        case Kind.EQUAL_ROWS:
            return frozenset(map(repr, value))
        case Kind.EQUAL:
            return repr(value)
    return None


def _digest(value: torch.Tensor) -> bytes:
    """The digest of ``value``, computed once: a run gives the same tensor to each of its calls.

    Reading it waits for a GPU. Tensors of the inference mode do not count their changes, so
    ``collate`` compares what it merges.
    """
    digest = _digests.get(value)
    if digest is None:
        digest = _digests[value] = _compute_digest(value)
    return digest


def _compute_digest(value: torch.Tensor) -> bytes:
    data = value.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()


def _pad(value: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - value.shape[1]
    if not missing:
        return value
    return F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing))


def _merge_masks(values: list[Any], rows: list[int], lengths: list[int]) -> torch.Tensor | None:
    """One mask for all rows; None if no call has one and no length differs.

    The fastest attention kernels take no mask.
    """
    given = next((value for value in values if value is not None), None)
    longest = max(lengths)
    if given is None:
        if min(lengths) == longest:
            return None
        given = torch.ones((), dtype=torch.bool)
    masks = [
        torch.ones((count, length), dtype=given.dtype, device=given.device)
        if value is None
        else value
        for value, count, length in zip(values, rows, lengths, strict=True)
    ]
    return torch.cat([_pad(mask, longest) for mask in masks])
