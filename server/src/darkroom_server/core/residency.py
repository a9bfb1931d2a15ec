"""How many unfinished images fit an engine's memory: the same answer in the engine and outside."""

from collections.abc import Iterable

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
    return max(0, available - max(map(_largest_batch, models), default=0))


def _largest_batch(model: ModelInfo) -> int:
    width, height = model.defaults.width, model.defaults.height
    rows = model.rows_of_a_pass(width, height)
    return model.memory.needed(width, height, rows, controlled=True)
