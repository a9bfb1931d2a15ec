"""What a job needs besides its model, and what models offer, as lines that a ledger compares."""

from collections.abc import Iterable, Iterator

from darkroom_server.core.job import Job, PromptSyntax, Task
from darkroom_server.core.model import ModelInfo

OPTIONAL = ("ip_adapter_image", "prompt_syntax")
"""The fields that a model takes on one server and not on another, which lacks what they need."""


def needs_of(job: Job) -> frozenset[str]:
    """What the model of ``job`` must offer; nothing for a plain text to image.

    That of a server whose ``offers_of`` has all of it can run the job.
    """
    asked = [f"adapter {lora.id}" for lora in job.loras]
    asked += [f"adapter {control.id}" for control in job.controls]
    if job.task is not Task.TEXT_TO_IMAGE:
        asked.append(f"task {job.task}")
    if job.ip_adapter_image is not None:
        asked.append("field ip_adapter_image")
    if job.prompt_syntax is not PromptSyntax.PLAIN:
        asked.append("field prompt_syntax")
    return frozenset(f"{line} of {job.model}" for line in asked)


def offers_of(models: Iterable[ModelInfo]) -> frozenset[str]:
    """Everything that jobs may need of ``models``."""
    return frozenset(f"{line} of {model.id}" for model in models for line in _offered(model))


def _offered(model: ModelInfo) -> Iterator[str]:
    yield from (f"adapter {offer.id}" for offer in model.adapters if not offer.rejection)
    yield from (f"task {task}" for task in model.tasks)
    yield from (f"field {name}" for name in OPTIONAL if name in model.optional_fields)
