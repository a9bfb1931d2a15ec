"""A batched call that fails is split, and the failed call's memory is free meanwhile."""

import weakref
from collections.abc import Sequence

import pytest
import torch

from darkroom_server.core.errors import Failure, Reason
from darkroom_server.engine.batching.run_or_split import run_or_split

BAD = Failure(Reason.ENGINE_FAILED, "bad")


def halved(items: Sequence[int], bad: set[int]) -> tuple[list[int | Failure], list[list[int]]]:
    """The results of doubling ``items``, and every call that was made."""
    calls: list[list[int]] = []

    def run(some: Sequence[int]) -> list[int]:
        calls.append(list(some))
        if bad & set(some):
            raise ValueError("injected")
        return [each * 2 for each in some]

    return run_or_split(items, run, lambda *_: BAD), calls


def test_one_call_if_nothing_fails() -> None:
    assert halved(range(5), set()) == ([0, 2, 4, 6, 8], [[0, 1, 2, 3, 4]])


def test_only_what_fails_alone_fails() -> None:
    results, calls = halved(range(8), {5})
    assert results == [0, 2, 4, 6, 8, BAD, 12, 14]
    assert calls == [list(range(8)), [0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [4], [5], [6, 7]]


def test_each_failure_is_reported_with_its_items() -> None:
    failures: list[tuple[int, str]] = []

    def record(items: Sequence[int], error: Exception) -> Failure:
        failures.append((len(items), str(error)))
        return BAD

    def run(items: Sequence[int]) -> list[int]:
        if len(items) > 1:
            raise ValueError(f"{len(items)} are too many")
        return list(items)

    assert run_or_split([1, 2, 3], run, record) == [1, 2, 3]
    assert failures == [(3, "3 are too many"), (2, "2 are too many")]


def test_a_lost_device_is_not_split() -> None:
    calls = []

    def run(items: Sequence[int]) -> list[int]:
        calls.append(items)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):
        run_or_split([1, 2], run, lambda *_: BAD)
    assert len(calls) == 1


def test_the_tensors_of_a_failed_call_are_freed_before_its_halves_run() -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        alive.append(sum(ref() is not None for ref in tensors))
        activations = torch.zeros(len(items))
        tensors.append(weakref.ref(activations))
        if len(items) > 1:
            raise torch.OutOfMemoryError("injected")
        return list(items)

    assert run_or_split([1, 2, 3, 4], run, lambda *_: BAD) == [1, 2, 3, 4]
    assert alive == [0] * 7
