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
    needs = [
        (
            model.memory.available_bytes,
            model.memory.needed(model.defaults.width, model.defaults.height, model.limits.max_rows),
        )
        for model in models
    ]
    available = min((free for free, _ in needs), default=0)
    return max(0, available - max((batch for _, batch in needs), default=0))
