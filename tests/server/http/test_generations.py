"""POST /v1/images/generations: OpenAI's fields and ours, errors, and the identity of a request."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import structlog

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_server.core.errors import Failure, Reason, StartupError
from darkroom_server.core.job import ImageFormat, Job, SchedulerName
from darkroom_server.dispatch import JobOutcome
from darkroom_server.http.messages.fields import FIELDS
from darkroom_server.settings import Dispatch, Results, Security, Storage
from tests.server.http.door import Door, bearer, door, token_file
from tests.server.telemetry.scrape import counted


async def job_of(there: Door, **fields: Any) -> Job:
    """The job that a request makes."""
    reply = await there.generate(**fields)
    assert reply.status_code == 200, reply.text
    return await there.wire.submitted.get()


async def test_the_images_are_those_of_grpc() -> None:
    async with door(fake={"auto": True}) as there:
        reply = await there.generate(n=2, seed=5)
        other = await there.wire.generate(image_count=2, seed=5)
    body = reply.json()
    assert reply.headers["content-type"] == "application/json"
    images = [base64.b64decode(each["b64_json"]) for each in body["data"]]
    assert images == [image.data for image in other.images]
    assert images[0] != images[1]
    assert [each["seed"] for each in body["data"]] == [5, 6]
    assert body["data"][1]["record"]["request"]["seed"] == 6
    assert body["size"] == "64x64"
    assert body["usage"]["output_tokens"] == 2 * 64 * 64 // 256
    assert body["darkroom"]["model_revision"] == other.model_revision


async def test_the_fields_reach_the_job() -> None:
    async with door(fake={"auto": True}) as there:
        plain = await job_of(there)
        assert (plain.steps, plain.image_count, plain.format) == (4, 1, ImageFormat.PNG)
        full = await job_of(
            there,
            model="demo",
            n=2,
            size="128x96",
            output_format="jpeg",
            output_compression=0,
            background="opaque",
            user="someone",
            negative_prompt="rain",
            steps=7,
            guidance_scale=3,
            seed=9,
            scheduler="euler",
            exact=True,
        )
        assert (full.width, full.height, full.image_count) == (128, 96, 2)
        assert (full.format, full.quality) == (ImageFormat.JPEG, 1)
        assert (full.steps, full.guidance_scale, full.seed) == (7, 3.0, 9)
        assert full.scheduler is SchedulerName.EULER
        assert full.negative_prompt == "rain"
        assert full.exact
        assert (await job_of(there, size="auto", seed=None, n=1.0)).width == 64
        assert (await job_of(there, width=96, height=64)).width == 96


async def test_quality_chooses_the_steps() -> None:
    expected = {"low": 2, "auto": 4, "medium": 4, "standard": 4, "high": 6, "hd": 6}
    async with door(fake={"auto": True}) as there:
        for quality, steps in expected.items():
            assert (await job_of(there, quality=quality)).steps == steps, quality


async def violations(there: Door, **fields: Any) -> dict[str, str]:
    reply = await there.generate(**fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert reply.headers["x-should-retry"] == "false"
    found = {each["field"]: each["description"] for each in error["violations"]}
    assert error["param"] in found
    return found


async def test_every_violation_is_listed() -> None:
    async with door() as there:
        found = await violations(
            there,
            prompt=3,
            mood="vivid",
            size="13x64",
            steps=10**6,
            n=True,
            output_compression=50,
            response_format="b64",
            background="transparent",
            headers={"X-Request-Timeout": "soon", "Idempotency-Key": "a key"},
        )
    expected = {"prompt", "mood", "size", "steps", "n", "output_compression", "response_format"}
    assert set(found) == expected | {"background", "X-Request-Timeout", "Idempotency-Key"}
    assert all(name in found["mood"] for name in FIELDS)
    assert found["output_compression"].startswith("is for JPEG")
    assert there.wire.submitted.empty()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "a\ud800"}, "prompt"),
    ({"size": "64"}, "size"),
    ({"size": "64x64", "width": 64}, "size"),
    ({"quality": "high", "steps": 3}, "quality"),
    ({"partial_images": 2}, "partial_images"),
    ({"progress": True}, "progress"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"guidance_scale": 1e300}, "guidance_scale"),
    ({"guidance_scale": "7"}, "guidance_scale"),
    ({"width": 63}, "width"),
    ({"prompt_2": "x"}, "prompt_2"),
]


async def test_each_violation_alone() -> None:
    async with door() as there:
        for fields, wrong in WRONG:
            body = json.dumps({"prompt": "a star", **fields})
            headers = {"content-type": "application/json"}
            reply = await there.client.post("/v1/images/generations", content=body, headers=headers)
            assert reply.status_code == 400, fields
            assert wrong in [each["field"] for each in reply.json()["error"]["violations"]], fields
        assert there.wire.submitted.empty()


async def test_many_unknown_fields_make_a_short_error() -> None:
    async with door() as there:
        reply = await there.generate(**{f"field_{number}": 1 for number in range(20_000)})
    assert reply.status_code == 400
    assert len(reply.content) < 8192


BODIES = [
    (b"{}", "text/plain", 415),
    (b"prompt=a", "application/x-www-form-urlencoded", 415),
    (b"{}", "", 415),
    (b"{", "application/json", 400),
    (b"[]", "application/json", 400),
    (b"\xff", "application/json", 400),
    (b'{"guidance_scale": NaN}', "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"seed": ' + b"9" * 10_000 + b"}", "application/json", 400),
    (b" " * (1024**2 + 1), "application/json", 413),
]


async def test_bodies_that_are_no_json() -> None:
    async with door() as there:
        for body, kind, status in BODIES:
            headers = {"content-type": kind} if kind else {}
            reply = await there.client.post("/v1/images/generations", content=body, headers=headers)
            assert reply.status_code == status, (body[:20], kind)
            assert reply.json()["error"]["message"]


async def test_a_signed_url_needs_no_token_and_is_valid_as_it_is_only(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, "alice")
    headers = bearer("alice")
    async with door(fake={"auto": True}, security=Security(tokens=tokens)) as there:
        fields: dict[str, Any] = {
            "n": 2,
            "response_format": "url",
            "output_format": "webp",
            "headers": headers,
        }
        data = (await there.generate(**fields)).json()["data"]
        other = await there.client.get(data[1]["url"])
        image = await there.client.get(data[0]["url"])
        assert image.status_code == 200
        assert image.headers["content-type"] == "image/webp"
        assert image.content[:4] == b"RIFF"
        assert image.content != other.content
        assert "b64_json" not in data[0]
        good = data[0]["url"]
        for forged in (
            good[:-1] + ("0" if good[-1] != "0" else "1"),
            good.replace("/0.webp", "/1.webp"),
            good.replace("/alice/", "/bob/"),
            good.replace("expires=", "expires=9"),
            good.partition("?")[0],
            good.replace("/alice/", "/alice%2F..%2Fbob/"),
        ):
            assert (await there.client.get(forged)).status_code == 404, forged


async def test_a_url_ends_with_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    async with door(fake={"auto": True}, results=Results(result_ttl=0)) as there:
        reply = await there.generate(response_format="url")
        assert reply.json()["error"]["param"] == "response_format"
    async with door(fake={"auto": True}) as there:
        url = (await there.generate(response_format="url")).json()["data"][0]["url"]
        assert (await there.client.get(url)).status_code == 200
        with monkeypatch.context() as later:
            later.setattr("darkroom_server.http.signed_urls.time.time", lambda: 1e11)
            assert (await there.client.get(url)).status_code == 404


async def test_a_url_outlives_the_server_with_its_ledger(tmp_path: Path) -> None:
    """The image is generated again; a job that its caller did not want kept is gone."""
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    ledger = tmp_path / "jobs.db"
    options: dict[str, Any] = {
        "fake": {"auto": True},
        "http": {"http_url_key": str(key)},
        "storage": Storage(ledger=f"sqlite:{ledger}"),
    }
    urls, images = [], []
    async with door(**options) as there:
        for keep in (True, False):
            reply = await there.generate(response_format="url", keep=keep, seed=3)
            urls.append(reply.json()["data"][0]["url"].removeprefix(there.url))
            images.append((await there.client.get(urls[-1])).content)
    async with door(**options) as there:
        kept, gone = [await there.client.get(url) for url in urls]
        assert (kept.status_code, gone.status_code) == (200, 404)
        assert kept.content == images[0]


async def test_urls_by_default() -> None:
    http = {"http_response_format": "url"}
    async with door(fake={"auto": True}, http=http) as there:
        # As LangChain's wrapper in Python asks: without a format, and then it reads the URL.
        async with openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key="unused") as client:
            images = await client.images.generate(
                prompt="a star", n=1, size="64x64", model="demo", quality="standard"
            )
        assert images.data is not None
        assert (await there.client.get(images.data[0].url or "")).status_code == 200
        assert images.data[0].b64_json is None
        (image,) = (await there.generate(response_format="b64_json")).json()["data"]
        assert "url" not in image
        # A stream of OpenAI's has images.
        assert '"b64_json":"' in (await there.generate(stream=True)).text
    with pytest.raises(StartupError, match="--result-ttl"):
        async with door(http=http, results=Results(result_ttl=0)):
            pass


async def test_a_withheld_image_has_no_data() -> None:
    async with door(fake={"auto": True}) as there:
        (image,) = (await there.generate("[flagged]")).json()["data"]
    assert image["flagged"] is True
    assert image["b64_json"] is None


async def test_both_doors_join_the_same_job(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, "alice", "bob")
    fields: dict[str, Any] = {
        "seed": 3,
        "guidance_scale": 7.1,
        "scheduler": "ddim",
        "output_format": "png",
    }
    async with door(security=Security(tokens=tokens)) as there:
        headers = {"Idempotency-Key": "one", **bearer("alice")}
        metadata = tuple(bearer("alice").items())
        over_http = there.generating(headers=headers, **fields)
        job = await there.wire.submitted.get()
        assert (job.id, job.caller) == ("one", "alice")
        request = generation_pb2.GenerateRequest(
            prompt="a star",
            seed=3,
            guidance_scale=7.1,
            scheduler=types_pb2.SCHEDULER_DDIM,
            format=types_pb2.IMAGE_FORMAT_PNG,
            request_id="one",
        )
        over_grpc = asyncio.ensure_future(
            there.wire.generation.Generate(request, metadata=metadata)
        )
        await there.wire.subscribers("one", 2, caller="alice")
        other = there.generating(headers={**headers, **bearer("bob")}, **fields)
        assert (await there.wire.submitted.get()).caller == "bob"
        there.wire.engine.finish("one")
        image = base64.b64decode((await over_http).json()["data"][0]["b64_json"])
        assert image == (await over_grpc).images[0].data
        assert there.wire.submitted.empty()
        conflict = await there.generate("another", headers=headers)
        assert conflict.status_code == 422
        assert conflict.json()["error"]["code"] == "request_conflict"
        assert conflict.headers["x-should-retry"] == "false"
        kept = await there.generate(headers=headers, **fields)
        assert base64.b64decode(kept.json()["data"][0]["b64_json"]) == image
        assert there.wire.submitted.empty()
        there.wire.engine.advance(10)
        assert (await other).status_code == 200


async def test_the_request_id_is_echoed_and_names_no_job() -> None:
    async with door(fake={"auto": True}) as there:
        headers = {"X-Request-Id": "from-a-proxy"}
        first, second = [await there.generate(headers=headers) for _ in range(2)]
        jobs = [await there.wire.submitted.get() for _ in range(2)]
        assert first.headers["x-request-id"] == second.headers["x-request-id"] == "from-a-proxy"
        assert len({job.id for job in jobs} | {"from-a-proxy"}) == 3
        assert first.headers["darkroom-request-id"] == jobs[0].id
        odd = await there.generate(headers={"X-Request-Id": "a b"})
        assert odd.headers["x-request-id"] != "a b"


async def test_a_caller_that_disconnects_cancels_its_job() -> None:
    async with door() as there:
        caller = there.generating()
        job = await there.wire.submitted.get()
        with structlog.testing.capture_logs() as lines:
            caller.cancel()
            assert await there.wire.cancelled.get() == job.id
            there.wire.engine.advance()
            await there.wire.counted(JobOutcome.CANCELLED)
            await there.wire.becomes(lambda: 499 in [line.get("status") for line in lines])
        labels = ("route", "status")
        found = await counted(there.wire, "darkroom_http_requests_total", *labels)
        assert found == {("/v1/images/generations", "499"): 1}


async def test_a_trace_continues() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with door(fake={"auto": True}) as there:
        job = await job_of(there, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        assert job.trace_id == trace
        job = await job_of(there, headers={"traceparent": "nonsense"})
        assert job.trace_id == ""


async def test_a_kept_job_goes_on_after_a_disconnect() -> None:
    async with door() as there:
        headers = {"Idempotency-Key": "kept"}
        caller = there.generating(keep=True, headers=headers)
        await there.wire.submitted.get()
        caller.cancel()
        await there.wire.subscribers("kept", 0)
        again = there.generating(keep=True, headers=headers)
        await there.wire.subscribers("kept", 1)
        there.wire.engine.finish("kept")
        assert (await again).status_code == 200
        assert there.wire.cancelled.empty()


async def test_deadlines() -> None:
    async with door() as there:
        reply = await there.generate(headers={"X-Request-Timeout": "0.05"})
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] in ("deadline_expired", "deadline_unreachable")
        assert reply.headers["x-should-retry"] == "false"
        caller = there.generating(headers={"X-Request-Timeout": "60"})
        job = await there.wire.submitted.get()
        while job.deadline is None or job.deadline - job.submitted_at < 1:
            job = await there.wire.submitted.get()
        assert job.deadline - job.submitted_at == pytest.approx(60)
        there.wire.engine.finish(job.id)
        assert (await caller).status_code == 200


async def test_an_engine_s_failure_is_not_retried() -> None:
    async with door() as there:
        caller = there.generating()
        job = await there.wire.submitted.get()
        there.wire.engine.fail(job.id, Failure(Reason.NON_FINITE, "not a number"))
        reply = await caller
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "non_finite"
        assert reply.headers["x-should-retry"] == "false"


async def test_what_can_be_retried_says_when() -> None:
    dispatch = Dispatch(max_queued_jobs=1, max_resident_samples=1)
    async with door(dispatch=dispatch) as there:
        callers = [there.generating() for _ in range(2)]
        await there.wire.submitted.get()
        await there.wire.becomes(lambda: there.wire.server.dispatcher.queued_jobs == 1)
        full = await there.generate()
        assert full.status_code == 503
        assert full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        assert full.headers["x-should-retry"] == "true"
        for caller in callers:
            caller.cancel()
    async with door(fake={"load": False}, wait=False) as there:
        loading = await there.generate()
        assert loading.status_code == 503
        assert loading.json()["error"]["code"] == "model_loading"
        assert int(loading.headers["retry-after"]) >= 1
        there.wire.engine.become_ready()
    async with door(security=Security(max_jobs_per_address=1)) as there:
        caller = there.generating()
        await there.wire.submitted.get()
        quota = await there.generate()
        assert quota.status_code == 429
        assert quota.json()["error"]["type"] == "rate_limit_error"
        caller.cancel()


async def test_tokens(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, "alice")
    async with door(fake={"auto": True}, security=Security(tokens=tokens)) as there:
        assert (await there.generate()).status_code == 401
        wrong = await there.generate(headers={"authorization": "Bearer nonsense"})
        assert wrong.status_code == 401
        assert wrong.headers["www-authenticate"] == "Bearer"
        assert wrong.json()["error"]["type"] == "authentication_error"
        right = bearer("alice")
        assert (await there.generate(headers=right)).status_code == 200
        assert (await there.client.get("/v1/models")).status_code == 401
        assert (await there.client.get("/v1/status", headers=right)).status_code == 403
        assert (await there.client.get("/health")).status_code == 200
        assert (await there.client.get("/ready")).status_code == 200


async def test_an_unknown_model() -> None:
    async with door() as there:
        reply = await there.generate(model="dall-e-3")
    assert reply.status_code == 404
    assert "this server holds demo" in reply.json()["error"]["message"]


async def test_an_estimate_runs_nothing() -> None:
    async with door() as there:
        reply = await there.client.post("/v1/images/estimate", json={"prompt": "a star"})
        assert reply.status_code == 200
        assert reply.json()["peak_bytes"] > 0
        wrong = await there.client.post(
            "/v1/images/estimate", json={"prompt": "a star", "size": "13x64"}
        )
        assert wrong.json()["error"]["param"] == "size"
        assert there.wire.submitted.empty()
