"""A device without room for a model: its load fails, leaves nothing, and can be tried again."""

import gc
from pathlib import Path

import pytest

from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.engine_config import Preset
from darkroom_server.core.model_events import ModelNotLoaded
from darkroom_server.engine.loading import fit, read_model

from .fake_cuda import FakeDevice
from .test_weight_store import OnDevice, on_this_thread

__all__ = ["on_this_thread"]


@pytest.mark.usefixtures("on_this_thread")
def test_a_load_that_does_not_fit_the_device_fails_for_want_of_memory(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = OnDevice(cuda, Preset.FAST, tiny=tiny_folder)
    size = models.load("tiny", keep=True).weight_bytes
    total = cuda.total_bytes
    for origin in (WeightOrigin.HOST, WeightOrigin.DISK):
        models.unload("tiny", keep=origin is WeightOrigin.HOST)
        gc.collect()  # What an earlier load left in cycles would go at some time.
        before = cuda.live_bytes
        cuda.total_bytes = before + size // 2
        too_large = models.attempt("tiny", keep=True)
        with monkeypatch.context() as patch:
            # Somebody else takes the memory after the check.
            for module in (fit, read_model):
                patch.setattr(module, "available_bytes", lambda _: total)
            taken = models.attempt("tiny", keep=True)
        for failed, why in (
            (too_large, "are available"),
            (taken, "one image does not fit the rest"),
        ):
            assert isinstance(failed, ModelNotLoaded)
            assert failed.out_of_memory, failed.reason
            assert "does not fit the memory of cuda" in failed.reason
            assert why in failed.reason
            assert "\n" not in failed.reason
        assert too_large is not taken
        gc.collect()
        assert cuda.live_bytes == before, "nothing of it is there"
    cuda.total_bytes = total
    assert models.load("tiny", keep=True).origin is WeightOrigin.DISK
