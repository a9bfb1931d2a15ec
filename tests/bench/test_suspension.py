"""What the benchmark of suspended pipelines counts."""

import pytest
import torch

from bench.micro.suspension import (
    BY_HAND,
    COUNTED_SAMPLES,
    FORMS,
    MERGED,
    SCHEDULERS,
    SUSPENDED,
    Kernels,
    count_steps,
)
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


def test_merged_steps_take_as_many_kernels_for_a_batch_as_for_an_image() -> None:
    """Nor does any form wait for the device: that cannot be counted."""
    counts = count_steps(model_source(None))
    found = {(each["scheduler"], each["form"], each["images"]): each for each in counts}
    assert len(found) == len(SCHEDULERS) * len(FORMS) * len(COUNTED_SAMPLES)
    one, many = COUNTED_SAMPLES
    for scheduler in SCHEDULERS:
        for form in FORMS:
            lone, batch = (found[scheduler.value, form, images] for images in COUNTED_SAMPLES)
            grows = (batch["kernels"] - lone["kernels"]) / (many - one)
            if form == BY_HAND + MERGED:
                assert grows == 0 < lone["kernels"] <= 9
            elif form == SUSPENDED + MERGED:
                assert 0 < grows <= 7, "guidance and the pipeline's own work"
            else:
                assert grows > 10, "the control: scheduler objects"
            if form.endswith(MERGED):
                assert lone["copies to the device"] == batch["copies to the device"] <= 2
