"""Containment: a batched call that fails is split until only the faulty items fail."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from darkroom_server.core.errors import Failure
from darkroom_server.engine.failures import is_fatal

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_or_split(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    on_failure: Callable[[Sequence[Item], Exception], Failure],
) -> list[Result | Failure]:
    """The result of ``run`` for each of ``items``, or a ``Failure`` for an item that fails alone.

    Calls ``run`` with all items. If it raises, each half of them is tried, down to single items.
    ``on_failure`` gets the items of each failed call and its error; what it returns stands for an
    item that failed alone. Raises an error that means that the device is lost.
    """
    try:
        return list(run(items))
    except Exception as error:
        if is_fatal(error):
            raise
        failure = on_failure(items, error)
    # Outside the handler: the error's traceback keeps the failed call's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) == 1:
        return [failure]
    half = len(items) // 2
    first = run_or_split(items[:half], run, on_failure)
    return first + run_or_split(items[half:], run, on_failure)
