"""The models of the server, as plain data."""

from typing import Any

import pytest

from darkroom.v1 import model_pb2, types_pb2
from darkroom_client import (
    Guidance,
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


def test_what_a_model_takes_and_how_it_is_guided(client: Any, server: ScriptedServer) -> None:
    older = client.model()
    assert (older.optional_fields, older.guidance, older.unbatched_reason) == ((), None, "")
    assert older.defaults.true_cfg_scale is older.defaults.max_sequence_length is None

    sent = server.models[0]
    sent.optional_fields[:] = ["true_cfg_scale", "newer_than_this_client"]
    sent.guidance.CopyFrom(
        model_pb2.Guidance(scale="true_cfg_scale", above=1.1, needs_negative=True, rows=1, calls=2)
    )
    sent.unbatched_reason = "nobody described its calls"
    sent.defaults.true_cfg_scale = 4.1
    sent.defaults.max_sequence_length = 256
    sent.limits.max_sequence_length = 512
    sent.limits.sizes.add(width=640, height=384)
    sent.runtime.preset_rule = "it overflows in float16"
    sent.runtime.denoiser = "compiled"

    model = client.model()

    assert model.optional_fields == ("true_cfg_scale", "newer_than_this_client")
    assert model.guidance == Guidance(
        scale="true_cfg_scale", above=1.1, needs_negative=True, rows=1, calls=2
    )
    assert model.unbatched_reason == "nobody described its calls"
    assert (model.defaults.true_cfg_scale, model.defaults.max_sequence_length) == (4.1, 256)
    assert model.limits.max_sequence_length == 512
    assert model.limits.sizes == ((640, 384),)
    assert model.runtime.preset_rule == "it overflows in float16"
    assert model.runtime.denoiser == "compiled"


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
