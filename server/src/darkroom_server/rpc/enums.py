"""Core's enums and the wire's, by name: a test holds them equal."""

from darkroom.v1 import model_pb2, types_pb2
from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.catalog import ModelState
from darkroom_server.core.job import ImageFormat, PromptSyntax, SchedulerName, Task
from darkroom_server.core.model_runtime import RowLimitSource

FORMAT_TO_WIRE: dict[ImageFormat, types_pb2.ImageFormat.ValueType] = {
    name: types_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{name.name}") for name in ImageFormat
}
FORMAT_FROM_WIRE = {number: name for name, number in FORMAT_TO_WIRE.items()}

SCHEDULER_TO_WIRE: dict[SchedulerName, types_pb2.Scheduler.ValueType] = {
    name: types_pb2.Scheduler.Value(f"SCHEDULER_{name.name}") for name in SchedulerName
}
SCHEDULER_FROM_WIRE = {number: name for name, number in SCHEDULER_TO_WIRE.items()}

SYNTAX_TO_WIRE: dict[PromptSyntax, types_pb2.PromptSyntax.ValueType] = {
    name: types_pb2.PromptSyntax.Value(f"PROMPT_SYNTAX_{name.name}") for name in PromptSyntax
}
SYNTAX_FROM_WIRE = {number: name for name, number in SYNTAX_TO_WIRE.items()}

SOURCE_TO_WIRE: dict[RowLimitSource, model_pb2.RowLimitSource.ValueType] = {
    name: model_pb2.RowLimitSource.Value(f"ROW_LIMIT_SOURCE_{name.name}") for name in RowLimitSource
}

KIND_TO_WIRE: dict[AdapterKind, model_pb2.AdapterKind.ValueType] = {
    name: model_pb2.AdapterKind.Value(f"ADAPTER_KIND_{name.name}") for name in AdapterKind
}

STATE_TO_WIRE: dict[ModelState, model_pb2.ModelState.ValueType] = {
    name: model_pb2.ModelState.Value(f"MODEL_STATE_{name.name}") for name in ModelState
}

TASK_TO_WIRE: dict[Task, model_pb2.Task.ValueType] = {
    name: model_pb2.Task.Value(f"TASK_{name.name}") for name in Task
}
