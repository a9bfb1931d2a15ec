"""What the benchmark of suspended pipelines counts."""

import pytest
import torch

from bench.micro.suspension import FORMS, SCHEDULERS, Kernels, count_steps
from bench.report.machine import model_source


def test_kernels_copies_and_host_calls_are_counted_apart() -> None:
    on_device = torch.ones(4, 4, device="meta")
    on_host = torch.ones(4, 4)
    with Kernels() as seen:
        on_device.view(16)[:2]
        on_device.t()
        assert not seen.counts
        on_device + 1
        on_device.mul_(2)
        on_host.to("meta")
        on_host + on_host
    assert seen.counts == {"kernels": 2, "copies to the device": 1, "host calls": 1}


def test_reading_a_value_from_the_device_raises() -> None:
    """So a step that would wait for a GPU cannot be counted."""
    value = torch.ones((), device="meta")
    for read in (float, bool, torch.Tensor.item, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(value)


def test_both_forms_take_a_step_without_waiting() -> None:
    counts = count_steps(model_source(None))
    assert [(each["scheduler"], each["form"]) for each in counts] == [
        (scheduler.value, form) for scheduler in SCHEDULERS for form in FORMS
    ]
    assert all(each["kernels"] > 5 for each in counts)
    assert all(each["copies to the device"] == 1 for each in counts), "the timesteps"
