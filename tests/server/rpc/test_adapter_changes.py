"""Adapters that are added to a running server and removed from it, over the wire."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.adapters import AdapterKind, AdapterOffer
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import NotAllowed
from darkroom_server.core.model import ModelInfo
from darkroom_server.security.admin_policy import AdminPolicy
from darkroom_server.settings import Models, Security
from darkroom_server.settings.adapters import Adapters
from tests.server.security.test_tokens import bearing, entry
from tests.server.wire import Wire, refusal, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With one file that fits and one that does not."""
    (tmp_path / "pastel.safetensors").write_text("fits")
    (tmp_path / "broken.safetensors").write_text("no")
    return tmp_path


def model() -> ModelInfo:
    return replace(fake_image_model(), adapters=())


def served(folder: Path, **more: Any) -> Any:
    """A server over ``folder``, whose engine finishes no job by itself."""
    return serving(fake={"models": [model()]}, adapters=Adapters(lora_dir=str(folder)), **more)


async def add(wire: Wire, id: str, **call: Any) -> Any:
    return await wire.models.AddAdapter(model_pb2.AddAdapterRequest(id=id), **call)


async def remove(wire: Wire, id: str, **call: Any) -> Any:
    return await wire.models.RemoveAdapter(model_pb2.RemoveAdapterRequest(id=id), **call)


async def offered(wire: Wire) -> list[str]:
    found = await wire.models.ListAdapters(model_pb2.ListAdaptersRequest())
    return [adapter.id for adapter in found.adapters]


def with_lora(id: str) -> dict[str, Any]:
    return {"loras": [generation_pb2.Lora(id=id)]}


async def test_an_added_adapter_can_be_used_and_a_removed_one_cannot(folder: Path) -> None:
    async with served(folder) as wire:
        unknown = await refusal(wire.generate(**with_lora("pastel")))
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        added = (await add(wire, "pastel")).adapter
        assert (added.id, list(added.models), added.rank) == ("pastel", ["demo"], 4)
        assert await offered(wire) == ["pastel"]
        assert wire.engine.offered["pastel"].location == str(folder / "pastel.safetensors")
        assert (await add(wire, "pastel")).adapter == added

        running = wire.generating(**with_lora("pastel"))
        job = await wire.submitted.get()
        assert (await remove(wire, "pastel")).unfinished_jobs == 1
        assert await offered(wire) == []
        assert not wire.engine.offered
        assert (await refusal(wire.generate(**with_lora("pastel")))).code is (
            grpc.StatusCode.NOT_FOUND
        )
        wire.engine.finish(job.id)
        assert (await running).images


async def test_a_file_that_appears_later_can_be_added(folder: Path) -> None:
    async with served(folder) as wire:
        missing = await refusal(add(wire, "later"))
        assert missing.code is grpc.StatusCode.NOT_FOUND
        assert "no adapter 'later'" in missing.message
        assert "broken, pastel" in missing.message
        assert missing.detail(error_details_pb2.ResourceInfo).resource_name == "later"
        (folder / "later.safetensors").write_text("fits")
        await add(wire, "later")
        assert await offered(wire) == ["later"]


async def test_a_path_and_a_hub_id_are_no_names(folder: Path) -> None:
    file = folder / "pastel.safetensors"
    names = (
        str(file),
        str(folder / "pastel"),
        f"../{folder.name}/pastel",
        "owner/pastel",
        file.name,
    )
    async with served(folder) as wire:
        for name in (*names, ""):
            assert (await refusal(add(wire, name))).code is grpc.StatusCode.NOT_FOUND, name
        assert await offered(wire) == []


async def test_an_adapter_that_fits_no_model_cannot_be_added(folder: Path) -> None:
    async with served(folder) as wire:
        broken = await refusal(add(wire, "broken"))
        assert broken.code is grpc.StatusCode.FAILED_PRECONDITION
        assert broken.info.reason == "ADAPTER_UNUSABLE"
        assert "fits no model (its file does not say that it fits)" in broken.message
        assert not wire.engine.offered


async def test_a_server_without_adapters_can_add_none() -> None:
    # The demo model, which a server without models of its own has, brings adapters.
    models = Models(model=("demo=x",))
    async with serving(fake={"models": [model()]}, models=models) as wire:
        found = await refusal(add(wire, "pastel"))
        assert found.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "without --lora-dir" in found.message


async def test_an_adapter_that_is_not_offered_cannot_be_removed(folder: Path) -> None:
    async with served(folder) as wire:
        found = await refusal(remove(wire, "pastel"))
        assert found.code is grpc.StatusCode.NOT_FOUND
        assert found.info.reason == "UNKNOWN_ADAPTER"


async def test_the_name_is_free_again_when_the_jobs_that_use_it_have_ended(folder: Path) -> None:
    """Before that, a new file of the same name would decide their pictures."""
    async with served(folder) as wire:
        await add(wire, "pastel")
        running = wire.generating(**with_lora("pastel"))
        job = await wire.submitted.get()
        await remove(wire, "pastel")
        in_use = await refusal(add(wire, "pastel"))
        assert in_use.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "unfinished jobs still use the adapter" in in_use.message
        wire.engine.finish(job.id)
        await running
        await add(wire, "pastel")
        assert await offered(wire) == ["pastel"]


async def test_engines_agree_after_one_has_restarted(folder: Path) -> None:
    """A restarted engine reports the adapters of its own start; the server's offer stays."""
    async with served(folder) as wire:
        await add(wire, "pastel")
        wire.engine.die()
        await wire.becomes(lambda: not wire.server.dispatcher.ready)
        gone = await refusal(add(wire, "broken"))
        assert gone.code is grpc.StatusCode.UNAVAILABLE
        await wire.becomes(lambda: wire.server.dispatcher.ready)
        assert await offered(wire) == ["pastel"]
        await remove(wire, "pastel")
        wire.engine.die()
        await wire.becomes(lambda: not wire.server.dispatcher.ready)
        await wire.becomes(lambda: wire.server.dispatcher.ready)
        assert await offered(wire) == []


async def test_an_engine_that_dies_while_it_checks_ends_the_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(folder) as wire:
        check = FakeEngine.check_adapter
        monkeypatch.setattr(FakeEngine, "check_adapter", lambda self, _: self.die())
        found = await refusal(add(wire, "pastel"))
        assert found.code is grpc.StatusCode.UNAVAILABLE
        assert "the engine died while it checked it" in found.message
        monkeypatch.setattr(FakeEngine, "check_adapter", check)
        await wire.becomes(lambda: wire.server.dispatcher.ready)
        await add(wire, "pastel")


async def test_with_tokens_only_admins_change_adapters(folder: Path) -> None:
    tokens = folder / "tokens.toml"
    tokens.write_text(entry("web", "web-1") + entry("ops", "ops-1", "admin = true"))
    async with served(folder, security=Security(tokens=str(tokens))) as wire:
        for call in (add, remove):
            found = await refusal(call(wire, "pastel", metadata=bearing("web-1")))
            assert found.code is grpc.StatusCode.PERMISSION_DENIED
            assert "admin = true, and that of 'web' does not" in found.message
            assert (await refusal(call(wire, "pastel"))).code is grpc.StatusCode.UNAUTHENTICATED
        assert not wire.engine.offered
        await add(wire, "pastel", metadata=bearing("ops-1"))
        await remove(wire, "pastel", metadata=bearing("ops-1"))


async def test_without_tokens_a_call_through_a_proxy_changes_nothing(folder: Path) -> None:
    async with served(folder) as wire:
        for call in (add, remove):
            metadata = (("x-forwarded-for", "127.0.0.1"),)
            found = await refusal(call(wire, "pastel", metadata=metadata))
            assert found.code is grpc.StatusCode.PERMISSION_DENIED
            assert "from its own machine only" in found.message
        await add(wire, "pastel")


def test_without_tokens_the_address_decides_and_with_them_the_token() -> None:
    open_server, closed_server = AdminPolicy(tokens=False), AdminPolicy(tokens=True)
    for address in ("127.0.0.1", "127.8.8.8", "::1"):
        open_server.check(replace(ANONYMOUS, address=address), forwarded=False)
    for address in ("10.0.0.1", "2001:db8::/64", "unix", ""):
        with pytest.raises(NotAllowed):
            open_server.check(replace(ANONYMOUS, address=address), forwarded=False)
    closed_server.check(Caller(name="ops", admin=True), forwarded=True)
    with pytest.raises(NotAllowed):
        closed_server.check(Caller(name="web", address="127.0.0.1"), forwarded=False)


async def test_a_controlnet_is_neither_added_nor_removed(folder: Path) -> None:
    pose = AdapterOffer(id="pose", rank=0, bytes=1, kind=AdapterKind.CONTROLNET)
    (folder / "pose.safetensors").write_text("fits")
    fake = {"models": [replace(model(), adapters=(pose,))]}
    async with serving(fake=fake, adapters=Adapters(lora_dir=str(folder))) as wire:
        for call in (add, remove):
            found = await refusal(call(wire, "pose"))
            assert found.code is grpc.StatusCode.FAILED_PRECONDITION
            assert "'pose' is a controlnet" in found.message
        assert await offered(wire) == ["pose"]
