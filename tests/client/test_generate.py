"""Unary calls, through both clients and the real wire."""

import threading
from typing import Any

import grpc
import pytest

from darkroom.v1 import model_pb2, types_pb2
from darkroom_client import (
    DeadlineExceeded,
    GenerationRequest,
    GenerationResult,
    ImageFormat,
    InvalidRequest,
    Retry,
    RowLimitSource,
    Scheduler,
    ServerError,
    Timings,
    Unavailable,
)
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer, changed, fail, held, respond

FAST_RETRY = Retry(initial_backoff=0.01, max_backoff=0.01)


def test_every_optional_field_reaches_the_server(client: Any, server: ScriptedServer) -> None:
    fields: dict[str, Any] = {
        "true_cfg_scale": 0.0,
        "max_sequence_length": 77,
        "prompt_2": "a moon",
        "negative_prompt_2": "snow",
        "prompt_3": "a sun",
        "negative_prompt_3": "hail",
        "empty_negative_prompt": True,
        "guidance_rescale": 0.25,
        "prompt_syntax": "weighted",
    }

    result = client.generate("a star", **fields)
    client.generate("a star")

    sent: Any
    plain: Any
    sent, plain = server.requests
    wire = {**fields, "prompt_syntax": types_pb2.PROMPT_SYNTAX_WEIGHTED}
    assert {name: getattr(sent, name) for name in fields} == wire
    unset = ("true_cfg_scale", "max_sequence_length", "guidance_rescale")
    assert all(sent.HasField(name) for name in unset)
    assert not any(plain.HasField(name) for name in unset)
    assert plain.prompt_syntax == types_pb2.PROMPT_SYNTAX_UNSPECIFIED
    request = result.images[0].replay.request
    assert {name: getattr(request, name) for name in fields} == fields


def test_the_result_is_plain_data(client: Any) -> None:
    result = client.generate("a star", steps=20, seed=7, image_count=2, request_id="r-1")

    assert isinstance(result, GenerationResult)
    assert (result.request_id, result.model, result.model_revision) == ("r-1", "demo", "r1")
    assert [image.seed for image in result.images] == [7, 8]
    assert result.timings == Timings(
        queue=0.001,
        encode_prompt=0.002,
        denoise=1.5,
        decode=0.004,
        encode_image=0.005,
        total=1.6,
    )
    image = result.images[0]
    assert (image.format, image.width, image.height) == (ImageFormat.PNG, 16, 16)
    assert (image.prompt_truncated, image.flagged) == (False, False)
    assert image.replay.request.guidance_scale == 7.1
    assert image.replay.library_versions == {"diffusers": "0.42.1", "torch": "2.13.0"}


def test_every_argument_reaches_the_server(client: Any, server: ScriptedServer) -> None:
    client.generate(
        "a star",
        model="demo",
        negative_prompt="rain",
        width=64,
        height=32,
        steps=20,
        guidance_scale=7.5,
        seed=7,
        image_count=2,
        scheduler="euler_ancestral",
        format="webp",
        quality=80,
        exact=True,
        request_id="r-1",
        metadata={"X-Trace": "abc"},
    )

    sent = server.requests[0]
    assert (sent.prompt, sent.negative_prompt, sent.model) == ("a star", "rain", "demo")
    assert (sent.width, sent.height, sent.steps, sent.image_count) == (64, 32, 20, 2)
    assert (sent.guidance_scale, sent.seed, sent.quality, sent.exact) == (7.5, 7, 80, True)
    assert sent.scheduler == types_pb2.SCHEDULER_EULER_ANCESTRAL
    assert sent.format == types_pb2.IMAGE_FORMAT_WEBP
    assert sent.request_id == "r-1"
    assert server.metadata[0]["x-trace"] == "abc"
    assert server.metadata[0]["darkroom-max-reply-bytes"] == str(64 * 2**20)


def test_unset_fields_are_sent_unset(client: Any, server: ScriptedServer) -> None:
    client.generate("a star")

    sent = server.requests[0]
    for field in ("width", "height", "steps", "guidance_scale", "image_count", "quality"):
        assert not sent.HasField(field)
    assert sent.scheduler == types_pb2.SCHEDULER_UNSPECIFIED
    assert sent.format == types_pb2.IMAGE_FORMAT_UNSPECIFIED


def test_seed_zero_is_seed_zero(client: Any, server: ScriptedServer) -> None:
    result = client.generate("a star", seed=0, guidance_scale=0.0)

    assert server.requests[0].HasField("seed")
    assert server.requests[0].seed == 0
    assert server.requests[0].HasField("guidance_scale")
    assert result.images[0].seed == 0


def test_two_calls_have_two_seeds_and_two_ids(client: Any, server: ScriptedServer) -> None:
    client.generate("a star")
    client.generate("a star")

    first, second = server.requests
    assert first.seed != second.seed
    assert first.request_id != second.request_id
    assert len(first.request_id) == 32


def test_a_retry_has_the_same_seed_and_id(connect: Connect, server: ScriptedServer) -> None:
    server.script.extend([fail(grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")] * 2)

    connect(server.address, retry=FAST_RETRY).generate("a star")

    assert len(server.requests) == 3
    assert len({request.seed for request in server.requests}) == 1
    assert len({request.request_id for request in server.requests}) == 1
    assert server.requests[0].HasField("seed")


def test_one_attempt_means_no_retry(connect: Connect, server: ScriptedServer) -> None:
    server.script.append(fail(grpc.StatusCode.UNAVAILABLE, "DRAINING"))

    with pytest.raises(Unavailable):
        connect(server.address, retry=Retry(attempts=1)).generate("a star")

    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL])
def test_other_errors_are_not_tried_again(
    client: Any, server: ScriptedServer, code: grpc.StatusCode
) -> None:
    server.script.append(fail(code))

    with pytest.raises(Exception, match="no"):
        client.generate("a star")

    assert len(server.requests) == 1


def test_the_timeout_of_a_call_is_applied(connect: Connect, server: ScriptedServer) -> None:
    released = threading.Event()
    server.script.append(held(released))

    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s.*longer timeout") as caught:
        connect(server.address, timeout=60).generate("a star", timeout=0.2, request_id="late")

    released.set()
    assert caught.value.request_id == "late"
    assert caught.value.code == "DEADLINE_EXCEEDED"


def test_a_call_without_timeout_uses_that_of_the_client(
    connect: Connect, server: ScriptedServer
) -> None:
    left: list[float | None] = []

    def note(request: Any, context: grpc.ServicerContext) -> Any:
        left.append(context.time_remaining())
        return respond(request, context)

    server.script.extend([note] * 2)
    connect(server.address).generate("a star")
    connect(server.address, timeout=None).generate("a star")

    assert left[0] is not None
    assert 60 < left[0] <= 121
    assert left[1] is None or left[1] > 1e6


def test_all_wrong_names_and_numbers_are_reported_before_a_call(
    client: Any, server: ScriptedServer
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a \udc80 star", scheduler="eulr", format="bmp", seed=-1, width=2**40)

    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["scheduler", "format", "width", "prompt", "seed"]
    assert "euler_ancestral" in str(caught.value)
    assert server.requests == []


def test_wrong_types_are_type_errors(client: Any) -> None:
    with pytest.raises(TypeError):
        client.generate("a star", steps="20")


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_every_scheduler_is_encoded_and_decoded(
    client: Any, server: ScriptedServer, scheduler: Scheduler
) -> None:
    result = client.generate("a star", scheduler=scheduler)

    assert types_pb2.Scheduler.Name(server.requests[0].scheduler) == f"SCHEDULER_{scheduler.name}"
    assert result.images[0].replay.request.scheduler is scheduler


def test_enums_match_the_wire() -> None:
    schedulers = {
        name.removeprefix("SCHEDULER_") for name in types_pb2.Scheduler.DESCRIPTOR.values_by_name
    }
    formats = {
        name.removeprefix("IMAGE_FORMAT_")
        for name in types_pb2.ImageFormat.DESCRIPTOR.values_by_name
    }

    assert {scheduler.name for scheduler in Scheduler} == schedulers - {"UNSPECIFIED"}
    assert {image_format.name for image_format in ImageFormat} == formats - {"UNSPECIFIED"}
    sources = {
        name.removeprefix("ROW_LIMIT_SOURCE_")
        for name in model_pb2.RowLimitSource.DESCRIPTOR.values_by_name
    }
    assert {s.name for s in RowLimitSource} - {"UNKNOWN"} == sources - {"UNSPECIFIED"}
    assert ImageFormat("jpg") is ImageFormat.JPEG


def test_an_unreadable_reply_is_a_server_error(client: Any, server: ScriptedServer) -> None:
    server.script.append(changed(format=99))

    with pytest.raises(ServerError, match="different versions") as caught:
        client.generate("a star", request_id="odd")

    assert (caught.value.reason, caught.value.request_id) == ("UNREADABLE_REPLY", "odd")


def test_a_record_is_reproduced_under_a_new_id(client: Any, server: ScriptedServer) -> None:
    record = client.generate("a star", seed=7, steps=9, request_id="first").images[0].replay

    again = client.replay(record).images[0].replay

    first, second = server.requests
    assert (second.seed, second.steps, second.image_count) == (7, 9, 1)
    assert second.request_id not in ("", first.request_id)
    assert again.pixels_sha256 == record.pixels_sha256
    assert again.differences(record) == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("num_images", "use image_count"),
        ("n", "use image_count"),
        ("num_inference_steps", "use steps"),
        ("colour", "the options are controls, embed_record, empty_negative_prompt, exact"),
    ],
)
def test_an_option_of_another_library_is_answered_with_ours(
    client: Any, server: ScriptedServer, name: str, words: str
) -> None:
    for prompt in ("a star", GenerationRequest("a star")):
        for verb in (client.generate, client.submit, client.estimate, client.stream):
            with pytest.raises(TypeError, match=f"^{name} is not an option of a request: {words}"):
                verb(prompt, **{name: 2})
    assert not server.requests


def test_a_request_takes_its_prompt_by_position(client: Any, server: ScriptedServer) -> None:
    client.generate(GenerationRequest("a star", steps=20))

    assert (server.requests[0].prompt, server.requests[0].steps) == ("a star", 20)
    with pytest.raises(TypeError, match="positional"):
        GenerationRequest("a star", "demo")  # type: ignore[call-arg]
