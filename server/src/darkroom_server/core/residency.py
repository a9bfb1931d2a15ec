"""How many unfinished images fit an engine's memory: the same answer in the engine and outside."""

from collections.abc import Iterable
from dataclasses import replace

from darkroom_server.core.model import ModelInfo

HEADROOM = 1.1
"""Images are taken to hold this factor more than those that were measured: the tables of their
schedulers grow with the steps, and other variables come with later steps."""


def resident_bytes(models: Iterable[ModelInfo]) -> int:
    """Bytes that the unfinished images of ``models`` may hold on their device between batches.

    These are the bytes that were free after all models were loaded, less what the largest batch or
    decode of a default size takes. Images of other sizes get fewer rows in a batch.
    """
    models = tuple(models)
    available = min((model.memory.available_bytes for model in models), default=0)
    return max(0, available - max(map(largest_batch_bytes, models), default=0))


def sharing(model: ModelInfo, available_bytes: int | None) -> ModelInfo:
    """``model`` after others were loaded or unloaded; None: that changed nothing known."""
    if available_bytes is None:
        return model
    return replace(model, memory=replace(model.memory, available_bytes=available_bytes))


def largest_batch_bytes(model: ModelInfo) -> int:
    """Bytes of the largest batch of the default size."""
    width, height = model.defaults.width, model.defaults.height
    rows = model.rows_of_a_pass(width, height)
    return model.memory.needed(width, height, rows, controlled=True)
