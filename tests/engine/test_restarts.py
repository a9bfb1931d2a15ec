"""Restarts that fail: after two, the models are loaded once the engine has started."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.backends import process
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import ControlNetSource, EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineDied, EngineReady
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.catalogue.describe import Catalogue
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.loading import startup

from .test_contract import Listener

A, B = (ModelSource(id=id, location=id) for id in "ab")

DAMAGED = "the unet of 'a' is cut short"

CHILD = """
import os, sys
from darkroom_server.core.events import EngineDied, EngineReady
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
config = channel.receive()
if config.models and os.path.exists({flag!r}):
    channel.send(EngineDied({why!r}, fatal=True))
else:
    channel.send(EngineReady((), 0.0))
    channel.receive()
"""
"""An engine's process that cannot load a model once there is a flag."""


def restarted(listener: Listener) -> EngineDied | EngineReady:
    """Start the engine of ``listener`` again, and wait until it has loaded or died."""
    listener.engine.start(listener.events.put)
    event = listener.until(lambda e: isinstance(e, EngineDied | EngineReady))
    assert isinstance(event, EngineDied | EngineReady)
    return event


@pytest.mark.parametrize("models", [(A,), (A, B)])
def test_an_engines_process_starts_without_models_after_two_restarts_that_failed(
    models: tuple[ModelSource, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "damaged"
    child = CHILD.format(flag=str(flag), why=DAMAGED)
    monkeypatch.setattr(process, "CHILD", ("-c", child))
    engine = ProcessEngine(EngineConfig(models=models))
    listener = Listener(engine)
    listener.until(lambda e: isinstance(e, EngineReady))
    flag.touch()
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    listener.until(lambda e: isinstance(e, EngineDied))
    for _ in range(2):
        assert restarted(listener) == EngineDied(DAMAGED, fatal=True)
    last = restarted(listener)
    # The only model of a server is loaded at each start.
    assert isinstance(last, EngineDied if len(models) == 1 else EngineReady)
    engine.close()


def test_a_first_start_that_fails_keeps_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = CHILD.format(flag=str(tmp_path), why=DAMAGED)
    monkeypatch.setattr(process, "CHILD", ("-c", child))
    engine = ProcessEngine(EngineConfig(models=(A, B)))
    listener = Listener(engine)
    listener.until(lambda e: isinstance(e, EngineDied))
    for _ in range(2):
        assert restarted(listener) == EngineDied(DAMAGED, fatal=True)
    engine.close()


def test_an_engines_thread_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[tuple[ModelSource, ...]] = []

    class Lost:
        def run(self) -> None:
            raise RuntimeError("the device is lost")

        def close(self) -> None:
            pass

    def start_loop(config: EngineConfig, _: Any) -> tuple[Any, EngineReady]:
        starts.append(config.models)
        if config.models and len(starts) > 1:
            raise StartupError(DAMAGED)
        return Lost(), EngineReady((), 0.0)

    monkeypatch.setattr(startup, "start_loop", start_loop)
    engine = ThreadEngine(EngineConfig(models=(A, B)))
    listener = Listener(engine)
    listener.until(lambda e: isinstance(e, EngineReady))
    listener.until(lambda e: isinstance(e, EngineDied))
    for _ in range(2):
        assert restarted(listener) == EngineDied(DAMAGED, fatal=True)
    assert isinstance(restarted(listener), EngineReady)
    assert starts == [(A, B)] * 3 + [()]
    engine.close()


@pytest.mark.parametrize("measured", [True, False])
def test_a_controlnet_still_fits_the_model_that_broke(measured: bool, tmp_path: Path) -> None:
    """Else the engine could not start without it."""
    broken = ModelSource(id="a", location=str(tmp_path / "gone"), may_download=False)
    info = fake_image_model("a")
    config = EngineConfig(
        models=(),
        catalogue=(broken,),
        device="cpu",
        controlnets=(ControlNetSource(id="pose", location="pose"),),
        previous_measurements=(info,) if measured else (),
    )
    controlnets = ControlNets(config)
    catalogue = Catalogue(config, torch.device("cpu"), Adapters.of(config), controlnets)
    (found,) = catalogue.describe_all(config.catalogue)
    assert "does not exist" in found.reason
    if measured:
        assert found.info == info
        controlnets.check()
    else:
        with pytest.raises(StartupError, match="'pose' fits no model"):
            controlnets.check()
