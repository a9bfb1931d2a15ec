"""Encode and decode enums, durations and floats."""

import struct

from google.protobuf.duration_pb2 import Duration

from darkroom.v1 import types_pb2
from darkroom_client._types.enums import ImageFormat, PromptSyntax, Scheduler

_SCHEDULER_PREFIX = "SCHEDULER_"
_FORMAT_PREFIX = "IMAGE_FORMAT_"
_SYNTAX_PREFIX = "PROMPT_SYNTAX_"


def encode_scheduler(scheduler: Scheduler | str | None) -> types_pb2.Scheduler.ValueType:
    """The scheduler's number; raises ``ValueError`` for an unknown name."""
    name = "UNSPECIFIED" if scheduler is None else Scheduler(scheduler).name
    return types_pb2.Scheduler.Value(_SCHEDULER_PREFIX + name)


def decode_scheduler(number: types_pb2.Scheduler.ValueType) -> Scheduler | None:
    """The scheduler with that number; None if unset or newer than this client."""
    known = types_pb2.Scheduler.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix(_SCHEDULER_PREFIX) if known else ""
    return Scheduler.__members__.get(name)


def encode_format(image_format: ImageFormat | str | None) -> types_pb2.ImageFormat.ValueType:
    """The format's number; raises ``ValueError`` for an unknown name."""
    name = "UNSPECIFIED" if image_format is None else ImageFormat(image_format).name
    return types_pb2.ImageFormat.Value(_FORMAT_PREFIX + name)


def decode_format(number: types_pb2.ImageFormat.ValueType) -> ImageFormat | None:
    """The format with that number; None if unset or newer than this client."""
    known = types_pb2.ImageFormat.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix(_FORMAT_PREFIX) if known else ""
    return ImageFormat.__members__.get(name)


def encode_syntax(syntax: PromptSyntax | str | None) -> types_pb2.PromptSyntax.ValueType:
    """The prompt syntax's number; raises ``ValueError`` for an unknown name."""
    name = "UNSPECIFIED" if syntax is None else PromptSyntax(syntax).name
    return types_pb2.PromptSyntax.Value(_SYNTAX_PREFIX + name)


def decode_syntax(number: types_pb2.PromptSyntax.ValueType) -> PromptSyntax | None:
    """The prompt syntax with that number; None if unset or newer than this client."""
    known = types_pb2.PromptSyntax.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix(_SYNTAX_PREFIX) if known else ""
    return PromptSyntax.__members__.get(name)


def decode_float(value: float) -> float:
    """The shortest decimal of the same 32-bit float: 7.1, not 7.099999904632568."""
    bits = struct.pack("f", value)
    candidates = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((short for short in candidates if struct.pack("f", short) == bits), value)


def decode_seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.ToNanoseconds() / 1e9
