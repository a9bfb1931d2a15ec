"""Core's enums and the wire's, by name: a test holds them equal."""

from darkroom.v1 import types_pb2
from darkroom_server.core.job import ImageFormat, SchedulerName

FORMAT_TO_WIRE: dict[ImageFormat, types_pb2.ImageFormat.ValueType] = {
    name: types_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{name.name}") for name in ImageFormat
}
FORMAT_FROM_WIRE = {number: name for name, number in FORMAT_TO_WIRE.items()}

SCHEDULER_TO_WIRE: dict[SchedulerName, types_pb2.Scheduler.ValueType] = {
    name: types_pb2.Scheduler.Value(f"SCHEDULER_{name.name}") for name in SchedulerName
}
SCHEDULER_FROM_WIRE = {number: name for name, number in SCHEDULER_TO_WIRE.items()}
