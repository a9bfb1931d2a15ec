"""The pipelines of further tasks, made of the parts of a pipeline that is in memory."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from darkroom_server.core.job import Task


def task_classes(names: Mapping[Task, str]) -> dict[Task, Any]:
    """The classes of diffusers that ``names`` name, without those that it does not have."""
    found = {task: getattr(diffusers, name, None) for task, name in names.items()}
    return {task: each for task, each in found.items() if _is_pipeline(each)}


def default_strength(pipeline_class: Any) -> float | None:
    """The strength that ``pipeline_class`` takes if its caller sets none; None without one."""
    parameter = inspect.signature(pipeline_class.__call__).parameters.get("strength")
    return None if parameter is None else float(parameter.default)


def made_of(pipeline: Any, pipeline_class: Any) -> Any:
    """A pipeline of ``pipeline_class`` that shares the components of ``pipeline``."""
    # Some constructors correct the configuration of the scheduler that they are given.
    given = {**pipeline.components, "scheduler": copy.deepcopy(pipeline.scheduler)}
    arguments = {}
    for name in inspect.signature(pipeline_class.__init__).parameters:
        if name in given:
            arguments[name] = given[name]
        elif name in pipeline.config:
            arguments[name] = pipeline.config[name]
    return pipeline_class(**arguments)


def _is_pipeline(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
