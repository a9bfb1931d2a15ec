"""Models that come and go: what a client lists and changes, and what the command line prints."""

import json
import re
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from darkroom.v1 import model_pb2, server_pb2
from darkroom_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    JobState,
    ModelDoesNotFit,
    ModelLoad,
    ModelNotFound,
    ModelState,
    ModelUnusable,
    PermissionDenied,
    Retry,
    Unavailable,
)
from darkroom_client._wire.status import decode_status
from darkroom_client.cli import main
from darkroom_client.testing import Behaviour, FakeServer, fake_model
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer, demo_model

DEMO = fake_model("demo")
ANIME = fake_model("anime", state=ModelState.AVAILABLE)
PHOTO = fake_model("photo", state=ModelState.HOST)
BROKEN = fake_model("broken", state=ModelState.FAILED, state_reason="vae/config.json is missing")
USED = datetime(2026, 10, 4, 12, 30, 15, 250_000, tzinfo=UTC)
FETCHED = replace(
    fake_model("fetched", state=ModelState.LOADING),
    last_used=USED,
    pinned=True,
    load=ModelLoad(fetched_bytes=2**29, fetch_bytes=2**31, remaining_seconds=90.5),
)
MODELS = (DEMO, ANIME, PHOTO, BROKEN, FETCHED)


@pytest.fixture
def catalogue() -> FakeServer:
    return FakeServer(models=MODELS)


def states(client: Client) -> dict[str, ModelState]:
    return {model.id: model.state for model in client.models()}


def test_every_model_is_listed_with_its_state(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        assert client.models() == list(MODELS)
        assert client.model("fetched") == FETCHED
    assert [model.ready for model in MODELS] == [True, False, False, False, False]
    assert ANIME.defaults == DEMO.defaults
    assert (ANIME.runtime, ANIME.limits and ANIME.limits.max_rows) == (None, 0)


@pytest.mark.parametrize("ready", [True, False])
def test_the_state_of_an_older_server_follows_from_ready(
    client: Any, server: ScriptedServer, ready: bool
) -> None:
    server.models[0].ready = ready
    model = client.model()
    assert model.state is (ModelState.RESIDENT if ready else ModelState.LOADING)
    assert (model.state_reason, model.weight_bytes, model.pinned) == ("", 0, False)
    assert model.last_used is model.load is None


def test_every_state_is_known_and_a_newer_one_is_unknown(
    client: Any, server: ScriptedServer
) -> None:
    states = model_pb2.ModelState.DESCRIPTOR.values[1:]
    newer = model_pb2.ModelState.ValueType(99)
    numbers = [model_pb2.ModelState.ValueType(value.number) for value in states]
    server.models = [demo_model() for _ in (*numbers, newer)]
    for model, number in zip(server.models, (*numbers, newer), strict=True):
        model.state = number
    received = [model.state for model in client.models()]
    assert [f"MODEL_STATE_{state.name}" for state in received[:-1]] == [s.name for s in states]
    assert received[-1] is ModelState.UNKNOWN
    assert set(received) == set(ModelState)


def test_a_load_may_lack_what_is_not_known(client: Any, server: ScriptedServer) -> None:
    server.models[0].load.fetched_bytes = 3
    assert client.model().load == ModelLoad(fetched_bytes=3)


def test_a_model_is_loaded_and_unloaded(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        loaded = client.load_model("anime")
        assert loaded == fake_model("anime")
        assert client.load_model("anime") == loaded
        assert client.model("anime") == loaded
        assert client.unload_model("anime") == 0
        assert client.model("anime") == ANIME
        assert client.load_model("photo").state is ModelState.RESIDENT
        assert client.load_model("fetched").load is None
        assert client.unload_model("fetched") == 0
        assert states(client) == {
            "demo": ModelState.RESIDENT,
            "anime": ModelState.AVAILABLE,
            "photo": ModelState.RESIDENT,
            "broken": ModelState.FAILED,
            "fetched": ModelState.AVAILABLE,
        }
        assert not client.model("fetched").pinned


def test_the_status_says_the_same_of_each_model(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        status = client.status()
        listed = client.models()
    assert [model.state for model in status.models] == [model.state for model in MODELS]
    for model, there in zip(listed, status.models, strict=True):
        for field in ("ready", "state_reason", "weight_bytes", "last_used", "pinned", "load"):
            assert getattr(there, field) == getattr(model, field), (model.id, field)
    (engine,) = status.engines
    assert engine.weight_bytes == {"device": DEMO.weight_bytes, "host": PHOTO.weight_bytes}


def test_the_status_of_an_older_server_has_no_weights() -> None:
    older = server_pb2.GetStatusResponse(
        models=[server_pb2.ModelStatus(id="a", ready=True), server_pb2.ModelStatus(id="b")],
        engines=[server_pb2.EngineStatus(device="cpu")],
    )
    status = decode_status(older)
    assert [model.state for model in status.models] == [ModelState.RESIDENT, ModelState.LOADING]
    for model in status.models:
        assert (model.weight_bytes, model.last_used, model.load) == (0, None, None)
    assert status.engines[0].weight_bytes == {}


def test_files_that_changed_are_read_again_by_a_load() -> None:
    changed = fake_model("changed")
    models = [DEMO, replace(changed, files_changed=True)]
    with FakeServer(models=models) as server, Client(server.target) as client:
        assert [model.files_changed for model in client.models()] == [False, True]
        assert client.load_model("changed") == changed
        assert not client.model("changed").files_changed


def test_the_command_line_shows_where_models_are(
    catalogue: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with catalogue:
        monkeypatch.setenv("DARKROOM_TARGET", catalogue.target)
        assert main(["status"]) == 0
        rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
        assert main(["status", "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
    assert rows["model demo"].startswith("resident, 0 queued, 0 running; weights 1.00 GiB; ")
    assert rows["model anime"].startswith("available, 0 queued, 0 running; weights 1.00 GiB")
    assert rows["model photo"].startswith("host, 0 queued")
    assert rows["model broken"].startswith(
        "failed, 0 queued, 0 running; vae/config.json is missing; "
    )
    assert "512.0 MiB of 2.00 GiB fetched; 0:01:30 remaining" in rows["model fetched"]
    assert rows["model fetched"].endswith("weights 1.00 GiB, pinned")
    assert "weights on device 1.00 GiB" in rows["engine 0"]
    assert "weights on host 1.00 GiB" in rows["engine 0"]
    assert status["models"][4]["last_used"] == USED.isoformat()


def test_a_model_is_pinned_and_unpinned(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        pinned = client.pin_model("anime")
        assert (pinned.state, pinned.pinned) == (ModelState.RESIDENT, True)
        unpinned = client.pin_model("anime", pinned=False)
        assert (unpinned.state, unpinned.pinned) == (ModelState.RESIDENT, False)
        assert client.pin_model("photo", pinned=False).state is ModelState.HOST
        client.pin_model("anime")
        client.unload_model("anime")
        assert not client.model("anime").pinned


def test_a_request_loads_its_model(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        with pytest.raises(InvalidRequest, match="steps"):
            client.generate("a star", model="anime", steps=0)
        assert client.estimate("a star", model="anime").run_time > 0
        assert client.model("anime") == ANIME

        before = datetime.now(UTC)
        for name in ("anime", "photo"):
            assert client.generate("a star", model=name).model == name
            model = client.model(name)
            assert model.state is ModelState.RESIDENT
            assert model.last_used is not None
            assert before - timedelta(seconds=1) < model.last_used <= datetime.now(UTC)


def test_a_model_stays_until_its_jobs_have_ended(catalogue: FakeServer) -> None:
    goes_on = threading.Event()
    catalogue.script(Behaviour(hold=goes_on))
    with catalogue, Client(catalogue.target) as client:
        job = client.submit("a star", model="anime")
        assert client.unload_model("anime") == 1
        assert client.generate("a star", model="anime").images
        assert client.model("anime").state is ModelState.RESIDENT
        goes_on.set()
        assert client.result(job.request_id).images
        assert client.model("anime").state is ModelState.AVAILABLE


def test_a_model_that_is_loaded_again_is_not_unloaded(catalogue: FakeServer) -> None:
    goes_on = threading.Event()
    catalogue.script(Behaviour(hold=goes_on))
    with catalogue, Client(catalogue.target) as client:
        job = client.submit("a star", model="anime")
        assert client.unload_model("anime") == 1
        assert client.load_model("anime").ready
        goes_on.set()
        assert client.result(job.request_id).images
        assert client.model("anime").state is ModelState.RESIDENT


def test_a_failed_model_rejects_requests_until_it_is_loaded(
    connect: Connect, catalogue: FakeServer
) -> None:
    with catalogue:
        client = connect(catalogue.target, retry=Retry(attempts=1))
        with pytest.raises(ModelUnusable, match=r"vae/config\.json is missing") as caught:
            client.generate("a star", model="broken")
        assert (caught.value.code, caught.value.reason) == (
            "FAILED_PRECONDITION",
            "MODEL_UNUSABLE",
        )
        assert not catalogue.jobs
        assert client.unload_model("broken") == 0
        assert client.model("broken") == BROKEN
        assert client.load_model("broken") == fake_model("broken")
        assert client.generate("a star", model="broken").images


def test_a_request_waits_for_a_model_that_is_loading(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        with pytest.raises(InvalidRequest, match="steps"):
            client.generate("a star", model="fetched", steps=0)
        assert client.estimate("a star", model="fetched").run_time > 0
        job = client.submit("a star", model="fetched")
        waiting = client.job(job.request_id)
        assert (waiting.state, waiting.queue_position) == (JobState.QUEUED, 0)
        assert client.model("fetched").state is ModelState.LOADING
        with pytest.raises(DeadlineExceeded):
            client.generate("a star", model="fetched", timeout=0.2)
        assert client.load_model("fetched").ready
        assert client.result(job.request_id).images
        assert [bool(each.images) for each in catalogue.jobs] == [True, False]


def test_a_model_that_is_loading_and_not_described_rejects_requests(connect: Connect) -> None:
    unknown = replace(FETCHED, defaults=None, limits=None)
    with FakeServer(models=[unknown]) as server:
        client = connect(server.target, retry=Retry(attempts=1))
        with pytest.raises(Unavailable) as loading:
            client.generate("a star")
        assert loading.value.reason == "MODEL_LOADING"
        assert not server.jobs
        assert client.load_model("fetched").ready
        assert client.generate("a star").images


UNUSABLE = ModelUnusable("unet/model.safetensors is truncated")
TOO_BIG = ModelDoesNotFit("it needs 6.5 GiB, and the pinned models leave 2.0 GiB")


@pytest.mark.parametrize(
    ("error", "state", "state_reason", "reason", "text"),
    [
        (
            UNUSABLE,
            ModelState.FAILED,
            str(UNUSABLE),
            "MODEL_UNUSABLE",
            f"model 'anime' cannot be loaded: {UNUSABLE}",
        ),
        (
            TOO_BIG,
            ModelState.AVAILABLE,
            "",
            "MODEL_MEMORY",
            f"no memory for model 'anime': {TOO_BIG}",
        ),
    ],
)
def test_a_load_that_fails_fails_its_job(
    error: ModelUnusable | ModelDoesNotFit,
    state: ModelState,
    state_reason: str,
    reason: str,
    text: str,
) -> None:
    with (
        FakeServer(models=[ANIME, DEMO], load_errors={"anime": error}) as server,
        Client(server.target) as client,
    ):
        job = client.submit("a star", model="anime")
        for fails in (
            lambda: client.result(job.request_id),
            lambda: client.load_model("anime"),
            lambda: client.pin_model("anime"),
        ):
            with pytest.raises(type(error)) as caught:
                fails()
            assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", reason)
            assert str(caught.value).startswith(text)
        model = client.model("anime")
        assert (model.state, model.state_reason, model.pinned) == (state, state_reason, False)
        assert model.last_used is None
        assert client.generate("a star", model="demo").images

        server.load_errors.clear()
        assert client.load_model("anime").state is ModelState.RESIDENT
        assert client.generate("a star", model="anime").images


@pytest.mark.parametrize(
    ("error", "state"), [(UNUSABLE, ModelState.FAILED), (TOO_BIG, ModelState.AVAILABLE)]
)
def test_a_load_that_fails_fails_the_jobs_that_wait_for_it(
    error: ModelUnusable | ModelDoesNotFit, state: ModelState
) -> None:
    with (
        FakeServer(models=[FETCHED, DEMO], load_errors={"fetched": error}) as server,
        Client(server.target) as client,
    ):
        job = client.submit("a star", model="fetched")
        assert client.job(job.request_id).state is JobState.QUEUED
        for fails in (
            lambda: client.load_model("fetched"),
            lambda: client.result(job.request_id),
        ):
            with pytest.raises(type(error), match=re.escape(str(error))):
                fails()
        assert client.model("fetched").state is state


async def test_the_async_client_loads_unloads_and_pins(catalogue: FakeServer) -> None:
    with catalogue:
        async with AsyncClient(catalogue.target) as client:
            assert await client.load_model("anime") == fake_model("anime")
            assert (await client.pin_model("photo")).pinned
            assert not (await client.pin_model("photo", pinned=False)).pinned
            assert await client.unload_model("anime") == 0
            assert await client.model("anime") == ANIME


def test_only_names_of_the_catalogue_are_taken(catalogue: FakeServer) -> None:
    with catalogue, Client(catalogue.target) as client:
        for change in (client.load_model, client.unload_model, client.pin_model):
            for unknown in ("none", "", "/models/demo"):
                with pytest.raises(ModelNotFound, match="this server holds demo, anime"):
                    change(unknown)
            with pytest.raises(TypeError):
                change(7)  # type: ignore[arg-type]


def test_only_admins_change_models() -> None:
    with FakeServer(models=[DEMO, ANIME], admin=False) as server, Client(server.target) as client:
        for change in (client.load_model, client.unload_model, client.pin_model):
            with pytest.raises(PermissionDenied, match="admin"):
                change("anime")
        assert client.models() == [DEMO, ANIME]
        assert client.generate("a star", model="anime").images


def test_a_model_that_is_only_called_not_ready_is_loading() -> None:
    slow = replace(fake_model("slow"), ready=False)
    older = replace(fake_model("older"), state=ModelState.UNKNOWN)
    taken = replace(fake_model("taken"), state=ModelState.AVAILABLE)
    models = [slow, older, taken]
    with FakeServer(models=models) as server, Client(server.target) as client:
        assert states(client) == {
            "slow": ModelState.LOADING,
            "older": ModelState.RESIDENT,
            "taken": ModelState.AVAILABLE,
        }
        assert [model.ready for model in client.models()] == [False, True, False]


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """What the command line printed, by its first column."""
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_command_line_shows_states(
    catalogue: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with catalogue:
        assert main(["models", "--target", catalogue.target]) == 0
        rows = lines(capsys)
        assert {name: row[:4] for name, row in rows.items()} == {
            "demo": ["resident", "no", "1.00 GiB", "-"],
            "anime": ["available", "no", "1.00 GiB", "-"],
            "photo": ["host", "no", "1.00 GiB", "-"],
            "broken": ["failed", "no", "1.00 GiB", "-"],
            "fetched": ["loading", "yes", "1.00 GiB", "2026-10-04T12:30:15Z"],
        }
        assert rows["anime"][4:9] == ["64x64", "4", "7.5", "euler", "-"]
        assert rows["demo"][8] == "fake float32 fast eager"
        assert [rows[name][-1] for name in rows] == [
            "-",
            "-",
            "-",
            "vae/config.json is missing",
            "512.0 MiB of 2.00 GiB fetched; 0:01:30 remaining",
        ]
        assert main(["models", "--target", catalogue.target, "--json"]) == 0
        entries: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        assert entries[4]["state"] == "loading"
        assert entries[4]["last_used"] == "2026-10-04T12:30:15.250000+00:00"
        assert entries[4]["load"]["fetch_bytes"] == 2**31
        assert entries[1]["last_used"] is None


def test_the_command_line_loads_unloads_and_pins(
    catalogue: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with catalogue, Client(catalogue.target) as client:
        target = ["--target", catalogue.target]
        assert main(["models", "load", "anime", "photo", *target]) == 0
        assert [row[0] for row in lines(capsys).values()] == ["resident", "resident"]
        assert states(client)["anime"] is states(client)["photo"] is ModelState.RESIDENT

        assert main(["models", "pin", "anime", *target]) == 0
        assert lines(capsys)["anime"][:2] == ["resident", "yes"]
        for unpin in (["pin", "--unpin", "anime", "photo"], ["pin", "photo", "anime", "--unpin"]):
            client.pin_model("anime")
            assert main(["models", *unpin, *target]) == 0
            assert {name: row[1] for name, row in lines(capsys).items()} == {
                "anime": "no",
                "photo": "no",
            }
        assert not client.model("anime").pinned

        assert main(["models", "unload", "anime", "photo", *target, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [
            {"id": "anime", "unfinished_jobs": 0},
            {"id": "photo", "unfinished_jobs": 0},
        ]
        assert main(["models", "unload", "demo", *target]) == 0
        assert lines(capsys) == {"demo": ["0"]}
        assert states(client)["anime"] is ModelState.AVAILABLE


def test_the_command_line_says_why_a_load_fails(
    catalogue: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with catalogue:
        target = ["--target", catalogue.target]
        catalogue.load_errors.update({"anime": UNUSABLE, "photo": TOO_BIG})
        for name, code, why in (("anime", 2, UNUSABLE), ("photo", 6, TOO_BIG), ("none", 2, "none")):
            assert main(["models", "load", name, *target]) == code
            assert str(why) in capsys.readouterr().err
        wrong: tuple[tuple[list[str], str], ...] = (
            (["load"], "give at least one NAME"),
            (["list", "demo"], "unrecognized arguments: demo"),
            (["load", "demo", "--unpin"], "--unpin is for pin"),
            (["push", "demo"], "invalid choice: 'push'"),
        )
        for arguments, text in wrong:
            with pytest.raises(SystemExit) as ended:
                main(["models", *arguments, *target])
            assert ended.value.code == 2
            assert text in capsys.readouterr().err


def test_only_a_load_has_no_time_limit(
    catalogue: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float | None] = []

    def counted(self: Client, *args: Any, **options: Any) -> None:
        limits.append(options["timeout"])
        original(self, *args, **options)

    original = Client.__init__
    monkeypatch.setattr(Client, "__init__", counted)
    with catalogue:
        target = ["--target", catalogue.target]
        for command in (
            [],
            ["load", "anime"],
            ["pin", "anime"],
            ["pin", "anime", "--unpin"],
            ["unload", "anime"],
            ["load", "anime", "--timeout", "7"],
        ):
            assert main(["models", *command, *target]) == 0
    assert limits == [10.0, None, None, 10.0, 10.0, 7.0]
