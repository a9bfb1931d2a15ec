"""Argument specs: which calls can be merged."""

import gc
from typing import Any

import pytest
import torch

from darkroom_server.engine.pipelines import arguments
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

SPEC = ArgumentSpec(
    denoiser="Denoiser",
    kinds={"hidden_states": Kind.ROWS, "ids": Kind.SAME},
    rows_in="hidden_states",
    signature="",
    diffusers="0.42",
)


def key(ids: torch.Tensor) -> Any:
    return SPEC.group_key({"hidden_states": torch.zeros(1, 4), "ids": ids})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors whose digest was computed."""
    found: list[torch.Tensor] = []
    compute = arguments._compute_digest

    def count(value: torch.Tensor) -> bytes:
        found.append(value)
        return compute(value)

    monkeypatch.setattr(arguments, "_compute_digest", count)
    return found


def test_tensors_that_must_be_equal_are_compared_by_value() -> None:
    assert key(torch.arange(6)) == key(torch.arange(6))
    assert key(torch.arange(6)) != key(torch.arange(6).flip(0))


def test_a_tensor_is_read_once(computed: list[torch.Tensor]) -> None:
    ids = torch.arange(6)
    assert key(ids) == key(ids) == key(ids)
    assert len(computed) == 1


def test_a_tensor_that_was_written_into_is_read_again() -> None:
    ids = torch.arange(6)
    before = key(ids)
    ids[0] = 7
    assert key(ids) != before


def test_a_tensor_that_does_not_count_its_changes_is_read_each_time(
    computed: list[torch.Tensor],
) -> None:
    with torch.inference_mode():
        ids = torch.arange(6)
        before = key(ids)
        ids[0] = 7
        assert key(ids) != before
    assert len(computed) == 2


def test_digests_do_not_outlive_their_tensors() -> None:
    gc.collect()
    before = len(arguments._digests)
    ids = torch.arange(6)
    key(ids)
    assert len(arguments._digests) == before + 1
    del ids
    assert len(arguments._digests) == before
