"""Adapters over the wire: what is listed, and what is rejected before any work."""

from dataclasses import replace

import grpc

from darkroom.v1 import generation_pb2, image_pb2, model_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.adapters import AdapterKind, AdapterOffer
from darkroom_server.core.events import AdapterLoaded
from darkroom_server.core.model import ModelInfo
from darkroom_server.rpc.enums import KIND_TO_WIRE
from darkroom_server.settings import Models
from tests.server.wire import refusal, serving

PASTEL = AdapterOffer(id="pastel", rank=8, bytes=1000)
OUTLINE = AdapterOffer(id="outline", rank=4, bytes=500)
HUGE = AdapterOffer(id="huge", rank=512, bytes=9000, rejection="its rank is 512")
POSE = AdapterOffer(id="pose", rank=0, bytes=900, kind=AdapterKind.CONTROLNET)
LIST = model_pb2.ListAdaptersRequest


def model_with(id: str, *adapters: AdapterOffer) -> ModelInfo:
    model = fake_model(id)
    return replace(
        model,
        adapters=adapters,
        limits=replace(model.limits, max_loras=2, max_controls=2),
        optional_fields=model.optional_fields | {"loras", "controls"},
    )


TWO = {
    "models": [model_with("a", PASTEL, HUGE), model_with("b", PASTEL, OUTLINE, POSE)],
    "auto": True,
}
TWO_NAMES = Models(model=("a=demo", "b=demo"))


def request(*loras: str, model: str = "a") -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompt="a star", model=model, loras=[generation_pb2.Lora(id=id) for id in loras]
    )


async def test_adapters_are_listed_with_the_models_that_they_fit() -> None:
    async with serving(fake=TWO, models=TWO_NAMES) as wire:
        found = (await wire.models.ListAdapters(LIST())).adapters
        assert [(a.id, list(a.models), a.rank, a.bytes) for a in found] == [
            ("huge", ["a"], 512, 9000),
            ("outline", ["b"], 4, 500),
            ("pastel", ["a", "b"], 8, 1000),
            ("pose", ["b"], 0, 900),
        ]
        lora, controlnet = model_pb2.ADAPTER_KIND_LORA, model_pb2.ADAPTER_KIND_CONTROLNET
        assert [a.kind for a in found] == [lora, lora, lora, controlnet]
        assert [a.rejection for a in found] == ["its rank is 512", "", "", ""]
        only = (await wire.models.ListAdapters(LIST(model="b"))).adapters
        assert [a.id for a in only] == ["outline", "pastel", "pose"]
        rejected = await refusal(wire.models.ListAdapters(LIST(model="none")))
        assert rejected.code is grpc.StatusCode.NOT_FOUND


async def test_an_adapter_in_memory_is_resident() -> None:
    async with serving(fake=TWO, models=TWO_NAMES) as wire:
        assert not any(a.resident for a in (await wire.models.ListAdapters(LIST())).adapters)
        availability = wire.server.dispatcher.availability
        wire.engine._emit(AdapterLoaded("a", "pastel", 1000, 0.1))
        await wire.becomes(lambda: any(adapter.resident for adapter in availability.adapters))
        found = (await wire.models.ListAdapters(LIST())).adapters
        assert [a.id for a in found if a.resident] == ["pastel"]


async def test_a_request_for_an_adapter_is_checked_before_any_work() -> None:
    async with serving(fake=TWO, models=TWO_NAMES) as wire:
        unknown = await refusal(wire.generation.Generate(request("pastel", "none")))
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        assert "no adapter 'none'; this server has huge, outline, pastel" in unknown.message
        for id, complaint in (("outline", "does not fit model 'a'"), ("huge", "its rank is 512")):
            found = await refusal(wire.generation.Generate(request(id)))
            assert found.code is grpc.StatusCode.INVALID_ARGUMENT
            assert complaint in found.message
        done = await wire.generation.Generate(request("pastel"))
        assert done.images


async def test_a_request_for_a_controlnet_is_checked_before_its_image_is_decoded() -> None:
    def asks(id: str, model: str) -> generation_pb2.GenerateRequest:
        image = image_pb2.ImageInput(data=b"no picture")
        control = generation_pb2.Control(id=id, image=image)
        return generation_pb2.GenerateRequest(prompt="a star", model=model, controls=[control])

    async with serving(fake=TWO, models=TWO_NAMES) as wire:
        for id in ("none", "pastel"):
            unknown = await refusal(wire.generation.Generate(asks(id, "b")))
            assert unknown.code is grpc.StatusCode.NOT_FOUND
            assert f"no adapter {id!r}; this server has pose" in unknown.message
        misfit = await refusal(wire.generation.Generate(asks("pose", "a")))
        assert misfit.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "controls[0].id: 'pose': does not fit model 'a'" in misfit.message
        as_lora = await refusal(wire.generation.Generate(request("pose", model="b")))
        assert as_lora.code is grpc.StatusCode.NOT_FOUND
        taken = await refusal(wire.generation.Generate(asks("pose", "b")))
        assert "is not a PNG, JPEG or WebP picture" in taken.message


def test_the_kinds_of_core_and_of_the_wire_are_equal() -> None:
    assert set(KIND_TO_WIRE) == set(AdapterKind)
    named = {n for n, _ in model_pb2.AdapterKind.items() if not n.endswith("UNSPECIFIED")}
    assert {f"ADAPTER_KIND_{kind.name}" for kind in AdapterKind} == named
