"""Argument specs: which calls can be merged."""

import gc
from typing import Any

import pytest
import torch

from darkroom_server.engine.pipelines import arguments
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind, StaleKey

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


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_is_read_once(computed: list[torch.Tensor], inference: bool) -> None:
    with torch.inference_mode(inference):
        ids = torch.arange(6)
        assert key(ids) == key(ids) == key(ids)
    assert len(computed) == 1


def call(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.zeros(1, 4), "ids": ids}


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_was_written_into_is_not_merged(inference: bool) -> None:
    with torch.inference_mode(inference):
        ids, others = torch.arange(6), torch.arange(6)
        assert key(ids) == key(others)
        assert len(SPEC.collate([call(ids), call(others), call(ids)])["hidden_states"]) == 3
        others[0] = 7
        with pytest.raises(StaleKey):
            SPEC.collate([call(ids), call(others), call(ids)])
        assert key(ids) != key(others), "the next calls are not merged"
        assert SPEC.alone(call(others))["ids"] is others


def test_digests_do_not_outlive_their_tensors() -> None:
    gc.collect()
    before = len(arguments._digests)
    ids = torch.arange(6)
    key(ids)
    assert len(arguments._digests) == before + 1
    del ids
    assert len(arguments._digests) == before
