"""Tokens: which callers are accepted, and what a token file may contain."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from darkroom.v1 import generation_pb2, model_pb2, server_pb2, server_pb2_grpc
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import StartupError, Unauthenticated
from darkroom_server.rpc.models import ModelServicer
from darkroom_server.security.new_token import create_token
from darkroom_server.security.token_file import read_tokens
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.call_context import CURRENT_CALL
from darkroom_server.settings import Security
from tests.server.telemetry.scrape import counted, values
from tests.server.wire import SERVING, Wire, refusal, serving

AUTO = {"auto": True}


def entry(name: str, token: str, more: str = "") -> str:
    digest = sha256(token.encode()).hexdigest()
    return f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\n{more}\n'


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(
        entry("web", "web-1", "priority = 2\nmax_jobs = 3\njobs_per_minute = 90.5")
        + entry("web", "web-2", "priority = 2\nmax_jobs = 3\njobs_per_minute = 90.5")
        + entry("ops", "ops-1", "admin = true")
        + entry("old", "old-1", "expires = 2020-01-31T12:00:00Z")
    )
    return path


async def list_models(wire: Wire, metadata: Any = ()) -> Any:
    return await wire.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)


async def test_a_valid_token_is_accepted(file: Path) -> None:
    async with serving(fake=AUTO, security=Security(tokens=str(file))) as wire:
        for token in ("web-1", "web-2", "ops-1"):
            assert (await list_models(wire, bearing(token))).models
        # The scheme is case-insensitive.
        assert (await list_models(wire, (("authorization", "bearer  web-1"),))).models


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ((), "needs a token"),
        ((("authorization", "Basic web-1"),), "needs a token"),
        ((("authorization", "Bearer "),), "needs a token"),
        (bearing("web-3"), "unknown or was removed"),
        (bearing("web-1x"), "unknown or was removed"),
        (bearing("old-1"), "expired at 2020-01-31T12:00:00"),
    ],
)
async def test_a_missing_or_unknown_token_is_rejected(
    file: Path, metadata: Any, message: str
) -> None:
    async with serving(fake=AUTO, security=Security(tokens=str(file))) as wire:
        request = generation_pb2.GenerateRequest(prompt="a star")
        error = await refusal(wire.generation.Generate(request, metadata=metadata))
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
        assert error.info.reason == "UNAUTHENTICATED"
        assert message in error.message
        assert wire.submitted.empty()
        # Health checks need no token.
        assert await wire.health() == SERVING


async def test_handlers_and_the_log_get_the_caller(file: Path, monkeypatch: Any) -> None:
    callers: list[Caller] = []

    async def fail(self: object, request: object, context: object) -> None:
        callers.append(CURRENT_CALL.get().caller)
        raise ValueError("for the log")

    monkeypatch.setattr(ModelServicer, "ListModels", fail)
    merge = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=merge) as logs:
        async with serving(security=Security(tokens=str(file))) as wire:
            await refusal(list_models(wire, bearing("web-2")))
        async with serving() as wire:
            await refusal(list_models(wire))
    web = Caller(name="web", priority=2, max_jobs=3, jobs_per_minute=90.5)
    assert callers == [web, replace(ANONYMOUS, address="127.0.0.1")]
    first, second = [line for line in logs if line["event"] == "handler failed"]
    assert first["caller"] == "web"
    assert "caller" not in second


async def reflect(wire: Wire, metadata: Any) -> Any:
    channel: Any = wire.channel  # The stubs are typed for the synchronous channel only.
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    return await stub.ServerReflectionInfo(iter([request]), metadata=metadata).read()


async def test_reflection_and_status_need_an_admin_token(file: Path) -> None:
    async with serving(security=Security(tokens=str(file))) as wire:
        error = await refusal(reflect(wire, bearing("web-1")))
        assert error.code is grpc.StatusCode.PERMISSION_DENIED
        assert error.info.reason == "PERMISSION_DENIED"
        assert (await refusal(reflect(wire, ()))).code is grpc.StatusCode.UNAUTHENTICATED
        answer = await reflect(wire, bearing("ops-1"))
        assert answer.list_services_response.service
        status = server_pb2_grpc.ServerServiceStub(wire.channel)
        asked = server_pb2.GetStatusRequest()
        error = await refusal(status.GetStatus(asked, metadata=bearing("web-1")))
        assert error.code is grpc.StatusCode.PERMISSION_DENIED
        assert (await status.GetStatus(asked, metadata=bearing("ops-1"))).version


async def test_the_file_is_reloaded_when_it_changes(file: Path) -> None:
    async with serving(security=Security(tokens=str(file))) as wire:
        assert (await refusal(list_models(wire, bearing("new-1")))).info
        file.write_text(entry("new", "new-1"))
        assert (await list_models(wire, bearing("new-1"))).models
        error = await refusal(list_models(wire, bearing("web-1")))
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
        with structlog.testing.capture_logs() as logs:
            file.write_text("[[token]]\nname = ")
            assert (await list_models(wire, bearing("new-1"))).models
            os.remove(file)
            assert (await list_models(wire, bearing("new-1"))).models
        errors = [line["why"] for line in logs if line["log_level"] == "error"]
        assert "is not TOML (at end of document)" in errors[0]
        assert "cannot be read" in errors[1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one or more tables"),
        ("[other]", "one or more tables"),
        ("token = 1", "one or more tables"),
        ("token = [1]", "write [[token]]"),
        ("[[token]]\nname = 'a'", "sha256 must be the SHA-256"),
        ("[[token]]\nname = 'a'\nsha256 = 'secret'", "sha256 must be the SHA-256"),
        ("[[token]]\nname = 'a b'", "name must be 1 to 64"),
        (entry("a", "x", "secret = 1"), "key 3 is not one of name"),
        (entry("a", "x", "max_jobs = 0"), "max_jobs must be a whole number"),
        (entry("a", "x", "max_jobs = true"), "max_jobs must be a whole number"),
        (entry("a", "x", "priority = 1.5"), "priority must be a whole number"),
        (entry("a", "x", "jobs_per_minute = nan"), "jobs_per_minute must be a number above 0"),
        (entry("a", "x", "jobs_per_minute = 0"), "jobs_per_minute must be a number above 0"),
        (entry("a", "x", "admin = 1"), "admin must be true or false"),
        (entry("a", "x", "expires = 2030-01-01T00:00:00"), "with its zone"),
        (entry("a", "x", "expires = 'secret'"), "with its zone"),
        (entry("a", "x") + entry("a", "y", "max_jobs = 1"), "have different limits"),
        (entry("a", "x") + entry("b", "x"), "have the same sha256"),
        ("secret", "is not TOML (at "),
        ("secret = secret", "is not TOML (at "),
    ],
)
def test_an_invalid_file_is_rejected_without_quoting_it(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(StartupError) as caught:
        read_tokens(str(path))
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(f"--tokens {path}: ")
    # The file may contain a token, pasted in the wrong place.
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_rejected() -> None:
    with pytest.raises(StartupError, match="/nowhere: cannot be read: No such file"):
        Tokens("/nowhere")


def test_a_created_token_is_accepted_with_its_printed_lines(tmp_path: Path) -> None:
    printed = create_token("web").splitlines()
    token = printed[2]
    path = tmp_path / "t"
    path.write_text("\n".join(printed[printed.index("[[token]]") :]))
    assert token not in path.read_text()
    tokens = Tokens(str(path))
    assert tokens.caller(token) == Caller(name="web")
    with pytest.raises(Unauthenticated):
        tokens.caller(token[:-1])
    with pytest.raises(StartupError):
        create_token("no good")


async def test_rejected_callers_are_counted_by_reason(file: Path) -> None:
    async with serving(fake=AUTO, security=Security(tokens=str(file))) as wire:
        status: Any = server_pb2_grpc.ServerServiceStub(wire.channel)
        before = await values(wire, "darkroom_rejections_total", "model", "reason")
        assert before["unknown", "unauthenticated"] == before["unknown", "permission_denied"] == 0
        for token in ("", "guessed", "old-1"):
            await refusal(list_models(wire, bearing(token)))
        await refusal(status.GetStatus(server_pb2.GetStatusRequest(), metadata=bearing("web-1")))
        await list_models(wire, bearing("web-1"))
        assert await counted(wire, "darkroom_rejections_total", "model", "reason") == {
            ("unknown", "unauthenticated"): 3,
            ("unknown", "permission_denied"): 1,
        }
