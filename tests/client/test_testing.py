"""The fake server for tests of code that uses the client."""

import dataclasses
import doctest
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import PIL.Image
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status import rpc_status

import darkroom_client
from darkroom.v1 import model_pb2, types_pb2
from darkroom.v1.generation_pb2 import (
    CancelGenerationRequest,
    EstimateGenerationRequest,
    GenerateRequest,
    GenerateStreamRequest,
    PreviewOptions,
    SubmitGenerationRequest,
)
from darkroom.v1.generation_pb2_grpc import GenerationServiceStub
from darkroom_client import (
    DarkroomError,
    DeadlineExceeded,
    Estimate,
    GenerationFailed,
    GenerationRequest,
    ImageFormat,
    InvalidRequest,
    ModelNotFound,
    ModelState,
    Overloaded,
    Preview,
    QuotaExceeded,
    ReplayRecord,
    Retry,
    ServerState,
    Unauthenticated,
    Unavailable,
    Violation,
    testing,
)
from darkroom_client._types.model import OPTIONAL_FIELDS
from darkroom_client._wire.models import decode_model
from darkroom_client.testing import Behaviour, FakeServer, JobState, _pictures, fake_model
from darkroom_client.testing._statuses import SENT
from darkroom_server.backends.fake_model import fake_flow_model
from darkroom_server.backends.fake_model import fake_model as sd_model
from darkroom_server.core.model import OPTIONAL_FIELDS as SERVERS_OPTIONAL_FIELDS
from darkroom_server.core.model import ModelInfo
from darkroom_server.settings import Models
from tests.client.conftest import Connect
from tests.server.service.test_optional_fields import FLOW_WRONG, SET
from tests.server.service.test_validation import FLOAT8_WRONG, WRONG, float8_model
from tests.server.wire import serving

LOCAL = {"ImageWithheld", "Unsupported", "DarkroomError", "TLSError"}
"""Errors that no server sends."""


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(testing).failed == 0


def test_every_error_can_be_scripted() -> None:
    kinds = [getattr(darkroom_client, name) for name in darkroom_client.__all__]
    errors = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, DarkroomError)}

    assert {kind.__name__ for kind in errors - SENT.keys()} == LOCAL


@pytest.mark.parametrize("kind", SENT)
def test_a_scripted_error_arrives_unchanged(
    connect: Connect, fake: FakeServer, kind: type[DarkroomError]
) -> None:
    client = connect(fake.target, retry=Retry(attempts=1))
    violations = (Violation(field="steps", description="is 0"),) if "Invalid" in str(kind) else ()
    error = kind("because of this", violations=violations, metadata={"needed": "9"})
    fake.script(Behaviour(error=error), Behaviour(error=error, error_at_step=1))

    for _ in range(2):
        with pytest.raises(kind, match="because of this") as caught:
            client.generate("a star")
        assert type(caught.value) is kind
        assert caught.value.violations == violations
        assert caught.value.metadata == {"needed": "9"}


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_an_error_that_no_server_sends_cannot_be_scripted(name: str) -> None:
    error = getattr(darkroom_client, name)("because of this")

    with pytest.raises(TypeError, match=f"no server sends {name}"):
        Behaviour(error=error)


def test_a_subclass_of_an_error_is_sent_as_its_base_class(caller: Any, fake: FakeServer) -> None:
    class Broke(QuotaExceeded):
        pass

    fake.script(Behaviour(error=Broke("nothing left")))

    with pytest.raises(QuotaExceeded, match="nothing left"):
        caller.generate("a star")


def test_a_request_without_id_gets_one(fake: FakeServer) -> None:
    with grpc.insecure_channel(fake.target) as channel:
        generate = GenerationServiceStub(channel).Generate
        answers = [generate(GenerateRequest(prompt=prompt)) for prompt in ("a star", "a circle")]

    assert [answer.request_id for answer in answers] == [
        job.request.request_id for job in fake.jobs
    ]
    assert len({answer.request_id for answer in answers} - {""}) == 2


def test_an_exceeded_quota_is_not_retried(fake: FakeServer) -> None:
    fake.script(Behaviour(error=QuotaExceeded("nothing left", retry_after=1.5)))

    with (
        grpc.insecure_channel(fake.target) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        GenerationServiceStub(channel).Generate(GenerateRequest(prompt="a star", request_id="r-1"))

    call: Any = caught.value
    trailers = dict(call.trailing_metadata())
    assert trailers["grpc-retry-pushback-ms"] == "-1"


def test_a_failed_job_runs_again(caller: Any, fake: FakeServer) -> None:
    failed = GenerationFailed("black")
    fake.script(Behaviour(error=failed, error_at_step=1))
    request = GenerationRequest(prompt="a star", seed=7, request_id="r-1")
    with pytest.raises(GenerationFailed):
        caller.generate(request)

    with pytest.raises(InvalidRequest, match="another request") as caught:
        caller.generate(request, steps=9)
    assert caught.value.code == "ALREADY_EXISTS"
    assert caller.generate(request).images
    assert caller.generate(request).images

    assert [job.state for job in fake.jobs] == [JobState.FAILED, JobState.FINISHED]


def test_joining_a_job_extends_its_deadline(connect: Connect, fake: FakeServer) -> None:
    fake.script(Behaviour(step_seconds=0.35))
    request = GenerationRequest(prompt="a star", seed=7, steps=4, request_id="r-1")
    joining = connect(fake.target, retry=Retry(attempts=1))
    joining.status()
    connect(fake.target).submit(request, time_limit=1.2)

    # It does not matter that this call does not ask to keep the job.
    with joining.stream(request, timeout=60.0) as stream:
        assert next(stream).joined
        assert stream.result().images

    assert [job.state for job in fake.jobs] == [JobState.FINISHED]


@pytest.mark.parametrize(
    ("state", "generates", "takes"),
    [
        (ServerState.LOADING, False, False),
        (ServerState.READY, True, True),
        (ServerState.RECOVERING, False, True),
        (ServerState.DRAINING, False, False),
    ],
)
def test_health_checks_answer_like_the_real_server(
    fake: FakeServer, state: ServerState, generates: bool, takes: bool
) -> None:
    fake.state = state

    with grpc.insecure_channel(fake.target) as channel:
        stub: Any = HealthStub(channel)
        for service, expected in (("", generates), ("darkroom.v1.GenerationService", takes)):
            status = stub.Check(HealthCheckRequest(service=service), timeout=60).status
            assert (status == HealthCheckResponse.SERVING) is expected


def test_retry_after_arrives(connect: Connect, fake: FakeServer) -> None:
    client = connect(fake.target)
    fake.script(Behaviour(error=Overloaded("full", retry_after=1.5)))

    with pytest.raises(Overloaded) as caught:
        client.generate("a star")

    assert caught.value.retry_after == 1.5


def test_each_retry_takes_one_behaviour(connect: Connect, fake: FakeServer) -> None:
    caller = connect(fake.target, retry=Retry(attempts=5, initial_backoff=0.01))
    gone = Behaviour(error=Unavailable("restarting", retry_after=0.01))

    fake.script(gone, gone)
    assert caller.generate("a star").images

    fake.script(*[gone] * 5)
    with pytest.raises(Unavailable):
        caller.generate("a star")


def test_a_token_is_required(connect: Connect) -> None:
    with FakeServer(token="secret") as strict:
        with pytest.raises(Unauthenticated):
            connect(strict.target).generate("a star")
        assert connect(strict.target, token="secret", insecure=True).generate("a star").images


def test_capacity_limits_concurrent_jobs(connect: Connect) -> None:
    with FakeServer(capacity=1) as small:
        client = connect(small.target)
        released = threading.Event()
        small.script(Behaviour(hold=released))
        accepted = client.submit("a star")
        with pytest.raises(Overloaded) as caught:
            client.generate("a circle")
        released.set()
        with client.watch(accepted.request_id) as watch:
            watch.result()

        assert caught.value.retry_after
        assert client.generate("a circle").images


def test_health_and_status_report_its_state(connect: Connect, fake: FakeServer) -> None:
    client = connect(fake.target, retry=Retry(attempts=1))
    client.wait_until_ready(timeout=30)
    assert client.status().state is ServerState.READY

    for state, reason in (
        (ServerState.LOADING, "MODEL_LOADING"),
        (ServerState.DRAINING, "DRAINING"),
    ):
        fake.state = state
        assert client.status().state is state
        with pytest.raises(Unavailable) as caught:
            client.generate("a star")
        assert caught.value.reason == reason
        with pytest.raises(Unavailable, match="not ready"):
            client.wait_until_ready(timeout=0.7)

    fake.state = ServerState.RECOVERING
    with pytest.raises(Unavailable, match="not ready"):
        client.wait_until_ready(timeout=0.7)
    assert client.generate("a star").images


def test_its_state_can_be_set_while_health_watches_end(fake: FakeServer) -> None:
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            with grpc.insecure_channel(fake.target) as channel:
                stub: Any = HealthStub(channel)
                watch = stub.Watch(HealthCheckRequest(), timeout=60)
                next(watch)
                watch.cancel()

    def change() -> None:
        for _ in range(500):
            fake.state = ServerState.DRAINING
            fake.state = ServerState.READY
        done.set()

    threads = [threading.Thread(target=come_and_go, daemon=True) for _ in range(4)]
    threads.append(threading.Thread(target=change, daemon=True))
    for thread in threads:
        thread.start()
    assert done.wait(60.0)
    for thread in threads:
        thread.join()


def test_status_counts_jobs(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(), Behaviour(error=InvalidRequest("no")), Behaviour(withheld=True))
    caller.generate_many(["a", "b", "c"])

    status = caller.status()

    assert status.accepted_jobs == 2
    assert status.ended_jobs["finished"] == 2
    assert [job.state for job in fake.jobs] == [JobState.FINISHED] * 2


def test_a_new_client_does_not_inherit_connection_failures(connect: Connect) -> None:
    retry = Retry(initial_backoff=0.01, max_backoff=0.05)
    with FakeServer() as first:
        target = first.target
        early = connect(target, retry=retry)
        early.estimate("a star")
    with pytest.raises(Unavailable):
        early.estimate("a star", timeout=1)

    with FakeServer(port=int(target.rpartition(":")[2])) as second:
        assert connect(target, retry=retry).estimate("a star") == second.estimate


def test_the_estimate_can_be_set(caller: Any, fake: FakeServer) -> None:
    fake.estimate = Estimate(queue_wait=1.5, run_time=2.5, peak_bytes=3, available_bytes=4)

    assert caller.estimate("a star", steps=50) == fake.estimate
    assert fake.estimate.total == 4.0


def test_its_images_are_valid(caller: Any) -> None:
    png = caller.generate("a star", seed=7, width=40, height=24).images[0]
    raw = caller.generate("a star", seed=7, width=40, height=24, format="raw_rgb").images[0]

    assert png.to_pil().size == (40, 24)
    assert png.to_pil().tobytes() == raw.data
    assert raw.format is ImageFormat.RAW_RGB
    assert png.replay.pixels_sha256 == raw.replay.pixels_sha256
    assert ReplayRecord.from_json(png.replay.to_json()) == png.replay


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_jpeg_and_webp_need_pillow(
    connect: Connect, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    client = connect(fake.target)
    fine, coarse = (
        client.generate("a star", seed=7, width=64, format=name, quality=quality).images[0]
        for quality in (95, 5)
    )

    with PIL.Image.open(io.BytesIO(fine.data)) as picture:
        assert (picture.format, picture.size) == (name.upper(), (64, 64))
    assert len(fine.data) > len(coarse.data)
    assert fine.replay.request.quality == 95
    with client.stream("a star", preview_every=1) as stream:
        formats = {event.format for event in stream if isinstance(event, Preview)}
    assert formats == {ImageFormat.JPEG}

    monkeypatch.setattr(_pictures, "has_pillow", lambda: False)
    with pytest.raises(InvalidRequest, match=r"pip install 'darkroom-client\[pil\]'") as caught:
        client.generate("a star", format=name)
    assert caught.value.violations[0].field == "format"


@pytest.mark.parametrize(
    ("model", "wrong"),
    [(sd_model(), WRONG), (fake_flow_model(), FLOW_WRONG), (float8_model(), FLOAT8_WRONG)],
    ids=["sd", "flow", "float8"],
)
async def test_it_rejects_what_the_real_server_rejects(
    model: ModelInfo, wrong: list[tuple[dict[str, Any], str, str]]
) -> None:
    """With the same words, in the same order."""
    calls: list[tuple[str, Any]]
    cases: list[dict[str, Any]] = [fields for fields, _, _ in wrong]
    cases.append({name: value for fields in cases for name, value in fields.items()})
    cases += [{"model": "other"}, {"scheduler": types_pb2.SCHEDULER_LCM, "steps": 50}, {}]
    cases += [{name: value} for name, value in SET.items()]
    async with serving(
        fake={"models": [model], "auto": True}, models=Models(model=(f"{model.id}=fake",))
    ) as wire:
        message = (await wire.models.GetModel(model_pb2.GetModelRequest())).model
        with FakeServer(models=[decode_model(message)]) as fake:
            async with grpc.aio.insecure_channel(fake.target) as channel:
                stub: Any = GenerationServiceStub(channel)
                for fields in cases:
                    request = GenerateRequest(**{"prompt": "a star", **fields})
                    calls = [
                        ("Generate", request),
                        ("EstimateGeneration", EstimateGenerationRequest(generation=request)),
                        ("GenerateStream", GenerateStreamRequest(generation=request)),
                    ]
                    for method, call in calls:
                        real = await rejection(wire.generation, method, call)
                        assert await rejection(stub, method, call) == real, (method, fields)
                for preview in (previews(every_steps=2), previews()):
                    real = await rejection(wire.generation, "GenerateStream", preview)
                    assert await rejection(stub, "GenerateStream", preview) == real
                    takes = "preview" in model.optional_fields or not preview.preview.every_steps
                    assert (real[1] == []) is takes
                calls = [
                    ("Generate", GenerateRequest(prompt="a", width=1200, height=1200)),
                    ("CancelGeneration", CancelGenerationRequest(request_id="a b")),
                    ("GenerateStream", previews(every_steps=-1)),
                    ("GenerateStream", previews(format=types_pb2.IMAGE_FORMAT_PNG)),
                    ("SubmitGeneration", limited(0)),
                ]
                for method, call in calls:
                    reason, names, _ = await rejection(wire.generation, method, call)
                    assert names, method
                    assert (await rejection(stub, method, call))[:2] == (reason, names)


def test_a_fake_model_takes_the_fields_that_it_is_given(connect: Connect) -> None:
    model = fake_model("flux", optional_fields={"true_cfg_scale", "max_sequence_length"})
    assert model.optional_fields == ("true_cfg_scale", "max_sequence_length")
    with FakeServer(models=[model]) as server:
        client = connect(server.target)
        assert client.model() == model
        image = client.generate("a star", true_cfg_scale=2.0).image
        request = image.replay.request
        assert (request.true_cfg_scale, request.max_sequence_length) == (2.0, 512)
        assert request.guidance_scale is None
        assert client.replay(image.replay).image.data == image.data
        with pytest.raises(InvalidRequest, match="guidance_scale: model 'flux' does not take it"):
            client.generate("a star", guidance_scale=3.0)
        with pytest.raises(InvalidRequest, match="max_sequence_length: must be 1 to 512"):
            client.generate("a star", max_sequence_length=513)
    with pytest.raises(ValueError, match="steps: not among negative_prompt"):
        fake_model(optional_fields=["steps"])


def test_the_optional_fields_are_those_of_the_server() -> None:
    assert OPTIONAL_FIELDS == SERVERS_OPTIONAL_FIELDS


def previews(**options: Any) -> GenerateStreamRequest:
    """A stream with ``options`` of its previews."""
    return GenerateStreamRequest(
        generation=GenerateRequest(prompt="a star"), preview=PreviewOptions(**options)
    )


def limited(seconds: int) -> SubmitGenerationRequest:
    """A job with a time limit."""
    return SubmitGenerationRequest(
        generation=GenerateRequest(prompt="a star"), time_limit=Duration(seconds=seconds)
    )


async def rejection(stub: Any, method: str, message: Any) -> tuple[str, list[str], list[str]]:
    """The reason of a call's error, and the fields and descriptions of its violations."""
    call = getattr(stub, method)(message)
    try:
        await (call.read() if method == "GenerateStream" else call)
    except grpc.aio.AioRpcError as error:
        status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(bad)
        return (
            info.reason,
            [each.field for each in bad.field_violations],
            [each.description for each in bad.field_violations],
        )
    return "", [], []


def test_it_holds_the_models_that_it_is_given(connect: Connect) -> None:
    base = fake_model("large")
    assert base.defaults is not None
    assert base.limits is not None
    large = dataclasses.replace(
        base,
        revision="r9",
        defaults=dataclasses.replace(base.defaults, width=128, height=96, steps=2),
        limits=dataclasses.replace(base.limits, max_size=256, sizes=((128, 96), (96, 128))),
    )
    loading = fake_model("slow", state=ModelState.LOADING)
    with FakeServer(models=["small", large, loading]) as server:
        client = connect(server.target, retry=Retry(attempts=1))

        assert client.models() == [fake_model("small"), large, loading]
        assert client.model("large") == large
        result = client.generate("a star", model="large")
        assert (result.model, result.model_revision) == ("large", "r9")
        assert (result.images[0].width, result.images[0].height) == (128, 96)
        assert server.jobs[0].steps_done == 2
        assert client.generate("a star", model="small").images[0].width == 64
        with pytest.raises(InvalidRequest, match=r"^width: must be 8 to 256, not 512$"):
            client.generate("a star", model="large", width=512)
        nearest = "certain sizes only, not 96×96; the one of the nearest shape is 128×96"
        with pytest.raises(InvalidRequest, match=nearest):
            client.generate("a star", model="large", width=96)
        with pytest.raises(InvalidRequest, match="model: must be set, to one of small, large"):
            client.generate("a star")
        with pytest.raises(DeadlineExceeded):
            client.generate("a star", model="slow", timeout=0.2)

    for wrong in ((), ("a", "a")):
        with pytest.raises(ValueError, match="at least one, each once"):
            FakeServer(models=wrong)


def test_reprs_say_what_a_failed_test_needs(connect: Connect) -> None:
    with FakeServer(models=["one", "two"]) as server:
        released = threading.Event()
        server.script(Behaviour(hold=released, queue=0))
        client = connect(server.target)
        client.submit("a star", model="one", request_id="r-1", steps=9)

        assert repr(server) == f"<FakeServer {server.target} ready: one, two; 1 of 1 jobs run>"
        assert repr(server.jobs[0]) == "<FakeJob r-1 running, 0 of 9 steps: 'a star'>"
        released.set()
    assert "stopped" in repr(server)
    assert repr(Behaviour(queue=2, withheld=True)) == "Behaviour(queue=2, withheld=True)"


NOISY = """
from darkroom_client import Client
from darkroom_client.testing import Behaviour, FakeServer

with FakeServer() as server, Client(server.target) as client:
    for end in (server.restart, server.drop_connections):
        server.script(Behaviour(step_seconds=0.05))
        accepted = client.submit("a star", steps=20)
        with client.watch(accepted.request_id) as watch:
            next(iter(watch))
            end()
        client.generate("a circle")
    try:
        with FakeServer(port=int(server.target.rpartition(":")[2])):
            pass
    except OSError as error:
        print(error)
"""


def test_nothing_is_written_to_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISY], capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
    assert "Address already in use: 127.0.0.1:" in done.stdout
    assert done.stderr == ""


def test_requests_equal_those_of_the_caller(caller: Any, fake: FakeServer) -> None:
    request = GenerationRequest(prompt="a star", seed=7, steps=3, request_id="r-1")

    caller.generate(request)

    assert fake.requests == (request,)
    with pytest.raises(InvalidRequest, match="another request"):
        caller.generate(request, steps=4)
    with pytest.raises(ModelNotFound):
        caller.generate("a star", model="other")


def test_wait_for_raises_timeout_error(fake: FakeServer) -> None:
    with pytest.raises(TimeoutError):
        fake.wait_for(lambda: bool(fake.jobs), timeout=0.01)


def test_the_fixture(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["darkroom_client.testing.plugin"]\n')
    (tmp_path / "test_mine.py").write_text(
        "from darkroom_client import Client\n"
        "def test_mine(darkroom_server):\n"
        "    with Client(darkroom_server.target) as client:\n"
        "        assert client.generate('a star').images\n"
    )

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert "1 passed" in done.stdout, done.stdout
