"""The models of the server, as plain data."""

from typing import Any

import pytest

from darkroom.v1 import model_pb2, types_pb2
from darkroom_client import (
    ImageFormat,
    Model,
    ModelDefaults,
    ModelNotFound,
    Scheduler,
    SchedulerOffer,
)
from tests.client.scripted import ScriptedServer


def test_a_model_is_plain_data(client: Any) -> None:
    (model,) = client.models()

    assert isinstance(model, Model)
    assert (model.id, model.ready, model.kind) == ("demo", True, "StableDiffusionPipeline")
    assert model.defaults == ModelDefaults(
        width=64,
        height=64,
        steps=20,
        guidance_scale=7.1,
        scheduler=Scheduler.EULER,
        format=ImageFormat.PNG,
        quality=90,
    )
    assert model.limits is not None
    assert model.limits.max_prompt_bytes == 8192
    assert model.schedulers == (
        SchedulerOffer(scheduler=Scheduler.EULER, min_steps=1, max_steps=1000),
    )
    assert model.runtime is not None
    assert model.runtime.device == "cpu"


def test_one_model_by_its_id_or_alone(client: Any) -> None:
    assert client.model("demo") == client.model() == client.models()[0]


def test_an_unknown_model(client: Any) -> None:
    with pytest.raises(ModelNotFound, match="no model 'other'") as caught:
        client.model("other")

    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "UNKNOWN_MODEL")


def test_a_loading_model_has_only_a_name(client: Any, server: ScriptedServer) -> None:
    server.models = [model_pb2.Model(id="demo", ready=False)]

    model = client.model()

    assert (model.id, model.ready) == ("demo", False)
    assert (model.defaults, model.limits, model.runtime, model.schedulers) == (None, None, None, ())


def test_names_newer_than_the_client_are_ignored(client: Any, server: ScriptedServer) -> None:
    newer = types_pb2.Scheduler.ValueType(99)
    server.models[0].schedulers.append(
        model_pb2.SchedulerOffer(scheduler=newer, min_steps=1, max_steps=2)
    )
    server.models[0].defaults.scheduler = newer

    model = client.model()

    assert [offer.scheduler for offer in model.schedulers] == [Scheduler.EULER]
    assert model.defaults is not None
    assert model.defaults.scheduler is None
