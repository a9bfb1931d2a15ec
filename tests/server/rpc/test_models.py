from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2

from darkroom.v1 import generation_pb2, model_pb2, types_pb2
from darkroom_server.backends.fake_model import fake_flow_model, fake_model
from darkroom_server.core.job import ImageFormat, PromptSyntax, SchedulerName
from darkroom_server.core.model import OPTIONAL_FIELDS, Guidance
from darkroom_server.rpc.enums import (
    FORMAT_TO_WIRE,
    SCHEDULER_TO_WIRE,
    SOURCE_TO_WIRE,
    SYNTAX_TO_WIRE,
)
from darkroom_server.settings import Models
from tests.server.wire import refusal, serving

GET = model_pb2.GetModelRequest
LIST = model_pb2.ListModelsRequest
TWO = {"models": [fake_model("b"), fake_model("a")], "auto": True}
INTERNAL = {"machine"}
"""Fields that only servers compare; callers read what they need of it in replay records."""

TWO_NAMES = Models(model=("b=demo", "a=demo"))


async def test_a_model_lists_its_defaults_and_limits() -> None:
    async with serving() as wire:
        model = (await wire.models.GetModel(GET(model="demo"))).model
        assert (await wire.models.GetModel(GET())).model == model
    assert model.ready
    assert (model.id, model.revision, model.kind) == ("demo", "fake", "StableDiffusionPipeline")
    assert (model.defaults.width, model.defaults.steps) == (64, 4)
    assert model.defaults.scheduler == types_pb2.SCHEDULER_DDIM
    assert (model.limits.max_size, model.limits.max_image_count) == (2048, 16)
    assert model.schedulers[-1].scheduler == types_pb2.SCHEDULER_LCM
    assert (model.runtime.dtype, model.runtime.preset) == ("float32", "fast")


@pytest.mark.parametrize("message", ["defaults", "limits", "runtime", "guidance"])
def test_the_wire_has_every_field_of_a_model(message: str) -> None:
    ours = set(type(getattr(fake_model(), message)).__slots__)
    theirs = model_pb2.Model.DESCRIPTOR.fields_by_name[message].message_type
    assert theirs is not None
    assert ours - INTERNAL == set(theirs.fields_by_name)


async def test_a_model_says_what_it_takes_and_how_it_is_guided() -> None:
    unbatched = replace(
        fake_flow_model(),
        unbatched_reason="nobody described its calls",
        guidance=Guidance(scale=None),
        runtime=replace(fake_flow_model().runtime, preset_rule="it overflows in float16"),
    )
    for info in (fake_model(), fake_flow_model(), unbatched):
        async with serving(fake={"models": [info]}, models=Models(model=(f"{info.id}=x",))) as wire:
            model = (await wire.models.GetModel(GET())).model
        assert list(model.optional_fields) == [
            name for name in OPTIONAL_FIELDS if name in info.optional_fields
        ]
        assert model.guidance == model_pb2.Guidance(
            scale=info.guidance.scale or "",
            above=1.0,
            needs_negative=info.guidance.needs_negative,
            rows=info.guidance.rows,
            calls=info.guidance.calls,
        )
        assert model.unbatched_reason == info.unbatched_reason
        assert model.runtime.preset_rule == info.runtime.preset_rule
        assert model.limits.max_sequence_length == info.limits.max_sequence_length
        takes = info.id == "flow"
        assert model.defaults.HasField("true_cfg_scale") is takes
        assert model.defaults.HasField("max_sequence_length") is takes


def test_every_optional_field_is_on_the_wire() -> None:
    fields = generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    assert set(OPTIONAL_FIELDS) - {"preview"} < set(fields)


async def test_a_loading_model_has_only_a_name() -> None:
    async with serving(wait=False, fake={"load": False}) as wire:
        (model,) = (await wire.models.ListModels(LIST())).models
        error = await refusal(wire.generate())
    assert model == model_pb2.Model(
        id="demo", state=model_pb2.MODEL_STATE_LOADING, pinned=True, load=model_pb2.ModelLoad()
    )
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.info.reason == "MODEL_LOADING"
    assert error.detail(error_details_pb2.RetryInfo).retry_delay.seconds == 2
    assert error.trailers["grpc-retry-pushback-ms"] == "2000"


async def test_models_are_listed_in_the_configured_order() -> None:
    async with serving(fake=TWO, models=TWO_NAMES) as wire:
        models = (await wire.models.ListModels(LIST())).models
        assert [model.id for model in models] == ["b", "a"]
        assert (await wire.generate(model="a")).model == "a"


async def test_an_unset_model_is_an_error_if_there_are_several() -> None:
    async with serving(fake=TWO, models=TWO_NAMES) as wire:
        for call in (wire.generate(), wire.models.GetModel(GET())):
            error = await refusal(call)
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.violations == {"model": "must be set, to one of b, a"}


async def test_an_unknown_model_is_not_found() -> None:
    async with serving() as wire:
        request = generation_pb2.GenerateRequest(prompt="a", model="other")
        for call in (
            wire.generation.Generate(request),
            wire.models.GetModel(GET(model="other")),
        ):
            error = await refusal(call)
            assert error.code is grpc.StatusCode.NOT_FOUND
            assert error.info.reason == "UNKNOWN_MODEL"
            resource = error.detail(error_details_pb2.ResourceInfo)
            assert resource.resource_type == "darkroom.v1.Model"
            assert resource.resource_name == "other"
            assert "this server holds demo" in error.message


async def test_a_huge_model_name_is_not_echoed() -> None:
    async with serving() as wire:
        error = await refusal(wire.models.GetModel(GET(model="é" * 100_000)))
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert len(error.message) < 1000


def test_the_enums_cover_every_wire_value() -> None:
    for wire, ours in (
        (types_pb2.ImageFormat, FORMAT_TO_WIRE),
        (types_pb2.Scheduler, SCHEDULER_TO_WIRE),
        (types_pb2.PromptSyntax, SYNTAX_TO_WIRE),
        (model_pb2.RowLimitSource, SOURCE_TO_WIRE),
    ):
        assert sorted([0, *ours.values()]) == sorted(wire.values())
    assert set(FORMAT_TO_WIRE) == set(ImageFormat)
    assert set(SCHEDULER_TO_WIRE) == set(SchedulerName)
    assert set(SYNTAX_TO_WIRE) == set(PromptSyntax)
