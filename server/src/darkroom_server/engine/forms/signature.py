"""What the arguments of a denoiser look like, for forms that take one kind of call only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.engine.pipelines.arguments import Arguments, flat

EXAMPLE_ROWS = 8
"""Rows of the arguments from which the shapes are read."""

FEWER_ROWS = EXAMPLE_ROWS - 1

Values = Mapping[str, Any]
"""Arguments by name, ``name.entry`` for an entry of a dict."""


class OtherArguments(Exception):
    """Arguments of a kind that only the eager denoiser takes; the message says which."""


@dataclass(frozen=True, slots=True)
class TensorKind:
    """A tensor among the arguments; ``shape`` has None for the number of rows."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def of_rows(self, rows: int) -> tuple[int, ...]:
        """The shape with ``rows`` rows."""
        return tuple(rows if size is None else size for size in self.shape)


Kinds = Mapping[str, TensorKind | bool | int | float | str]
"""Tensors and plain values, by the names of ``Values``."""


class Signature:
    """The calls with arguments of ``kinds``, whose four-dimensional tensors have ``layout``.

    Raises ``OtherArguments`` if no tensor has the rows in its first dimension.
    """

    def __init__(self, kinds: Kinds, layout: torch.memory_format) -> None:
        self.kinds = kinds
        self.layout = layout
        self._rows_in = _rows_in(kinds)

    def arranged(self, given: Arguments) -> dict[str, Any] | None:
        """``given`` as values that lie in memory as tensors of ``kinds`` do.

        None if they are of other kinds.
        """
        values = {name: value for name, value in flat(given) if value is not None}
        if values.keys() != self.kinds.keys():
            return None
        first = values[self._rows_in]
        if not isinstance(first, torch.Tensor):
            return None
        rows = len(first)
        for name, kind in self.kinds.items():
            if not isinstance(kind, TensorKind):
                if values[name] != kind:
                    return None
                continue
            value = values[name]
            if kind.shape == (None,) and getattr(value, "ndim", 0) == 0:
                # A timestep for all rows.
                value = torch.as_tensor(value).to(kind.dtype).expand(rows)
            tensor = laid_out(kind, value, rows, self.layout)
            if tensor is None:
                return None
            values[name] = tensor
        return values

    def reshaped(self, given: Arguments) -> "Signature | None":
        """The signature of calls like ``given``, whose tensors have other sizes than these.

        None if they have other names or dimensions. Other types are for ``arranged`` to find.
        """
        values = {name: value for name, value in flat(given) if value is not None}
        if values.keys() != self.kinds.keys():
            return None
        kinds: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            kinds[name] = kind
            if not isinstance(kind, TensorKind) or kind.shape == (None,):
                continue
            found = getattr(values[name], "shape", ())
            if len(found) != len(kind.shape):
                return None
            sizes = zip(kind.shape, found, strict=True)
            shape = tuple(None if size is None else other for size, other in sizes)
            kinds[name] = TensorKind(shape, kind.dtype)
        return Signature(kinds, self.layout)

    def laid_out(self, values: Values, rows: int) -> dict[str, Any]:
        """``values`` of these kinds and ``rows`` rows, as they lie in memory in a call."""
        return {
            name: laid_out(kind, values[name], rows, self.layout)
            if isinstance(kind, TensorKind)
            else values[name]
            for name, kind in self.kinds.items()
        }

    def filled_up(self, values: Values, rows: int) -> dict[str, Any]:
        """``values`` with their last row repeated, so that they have ``rows`` rows."""
        filled = dict(values)
        for name, kind in self.kinds.items():
            if isinstance(kind, TensorKind) and None in kind.shape:
                dimension, value = kind.shape.index(None), values[name]
                index = torch.arange(rows, device=value.device).clamp(max=self.rows(values) - 1)
                filled[name] = laid_out(
                    kind, value.index_select(dimension, index), rows, self.layout
                )
        return filled

    def rows(self, values: Values) -> int:
        """The rows of a call with ``values``."""
        return len(values[self._rows_in])

    def arguments(self, values: Values) -> dict[str, Any]:
        """``values`` as arguments of the denoiser: entries of a dict are in their dict."""
        return nested(self.kinds, values)

    def distinct_rows(self, inputs: Arguments, generator: torch.Generator) -> dict[str, Any]:
        """``inputs`` with floating-point rows that are scaled, each by a factor of its own."""
        values = dict(flat(inputs))
        factors = 0.5 + 0.5 * torch.rand(self.rows(values), generator=generator)
        for name, kind in self.kinds.items():
            if isinstance(kind, TensorKind) and None in kind.shape and kind.dtype.is_floating_point:
                shape = [-1 if size is None else 1 for size in kind.shape]
                # A product keeps the layout.
                value = values[name]
                values[name] = value * factors.view(shape).to(value.device, value.dtype)
        return self.arguments(values)


def kinds_of(fewer: Arguments, more: Arguments) -> dict[str, Any]:
    """The ``Kinds`` of arguments, from those of ``FEWER_ROWS`` and of ``EXAMPLE_ROWS`` rows.

    Raises ``OtherArguments`` for what is neither a tensor nor a plain value, or has the rows in a
    product of dimensions.
    """
    others = dict(flat(fewer))
    kinds: dict[str, Any] = {}
    for name, value in flat(more):
        other = others.get(name)
        if value is None:
            continue
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            kinds[name] = TensorKind(_shape(name, other.shape, value.shape), value.dtype)
        elif type(value) in (bool, int, float, str) and value == other:
            kinds[name] = value
        else:
            raise OtherArguments(f"its argument {name} is a {type(value).__name__}")
    return kinds


def nested(kinds: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """``values`` in the order of ``kinds``, entries of a dict in their dict."""
    arguments: dict[str, Any] = {}
    for name in kinds:
        outer, dot, entry = name.partition(".")
        if dot:
            arguments.setdefault(outer, {})[entry] = values[name]
        else:
            arguments[name] = values[name]
    return arguments


def laid_out(
    kind: TensorKind, value: Any, rows: int, layout: torch.memory_format
) -> torch.Tensor | None:
    """``value`` as an argument of ``kind`` of ``rows`` rows, None if it is of another kind.

    ``layout`` is that of four-dimensional tensors; all others are contiguous.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != kind.dtype:
        return None
    if value.shape != kind.of_rows(rows):
        return None
    return value.contiguous(memory_format=layout if value.ndim == 4 else torch.contiguous_format)


def described(kind: Any) -> dict[str, Any]:
    """A value of ``Kinds`` as plain data."""
    if isinstance(kind, TensorKind):
        return {"shape": kind.shape, "dtype": dtype_name(kind.dtype)}
    return {"value": kind}


def read_kind(described: Mapping[str, Any]) -> Any:
    """What ``described`` made plain data of."""
    if "value" in described:
        return described["value"]
    return TensorKind(tuple(described["shape"]), getattr(torch, described["dtype"]))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of ``dtype``, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a row, relative to the norm of what is ``expected`` of it.

    Infinite for another shape or dtype, NaN for a value that is none.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    rows = len(expected)
    expected = expected.float().reshape(rows, -1)
    errors = (found.float().reshape(rows, -1) - expected).norm(dim=1)
    return float((errors / expected.norm(dim=1)).max())


def _rows_in(kinds: Kinds) -> str:
    for name, kind in kinds.items():
        if isinstance(kind, TensorKind) and len(kind.shape) > 1 and kind.shape[0] is None:
            return name
    raise OtherArguments("no argument has the rows of a batch in its first dimension")


def _shape(name: str, fewer: torch.Size, more: torch.Size) -> tuple[int | None, ...]:
    if len(fewer) != len(more):
        raise OtherArguments(f"its argument {name} has other dimensions with more rows")
    shape: list[int | None] = []
    for few, many in zip(fewer, more, strict=True):
        if few == many:
            shape.append(many)
        elif (few, many) == (FEWER_ROWS, EXAMPLE_ROWS):
            shape.append(None)
        else:
            raise OtherArguments(f"its argument {name} has {many} entries for {EXAMPLE_ROWS} rows")
    return tuple(shape)
