"""Images and adapters of a request: what the client sends, and what it uploads."""

import asyncio
import hashlib
import io
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from darkroom_client import (
    Adapter,
    AdapterKind,
    AdapterNotFound,
    AsyncClient,
    Client,
    Control,
    GenerationRequest,
    InvalidRequest,
    ReplayRecord,
    Task,
    UploadedImage,
    UploadNotFound,
)
from darkroom_client._protocol.uploads import MAX_REPEATS, MAX_REQUEST_BYTES
from darkroom_client._types.model import OPTIONAL_FIELDS
from darkroom_client.testing import Behaviour, FakeServer, fake_model

MODEL = fake_model(optional_fields=OPTIONAL_FIELDS)


def picture(side: int = 16, seed: int = 1) -> bytes:
    """A PNG of noise: it does not get smaller."""
    noise = random.Random(seed).randbytes(side * side * 3)
    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (side, side), noise).save(file, "PNG", compress_level=1)
    return file.getvalue()


SMALL, OTHER = picture(), picture(seed=2)
LARGE, LARGER = picture(700), picture(800, seed=3)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


ADAPTERS = [Adapter(id=id, models=(MODEL.id,)) for id in ("outline", "pastel")] + [
    Adapter(id=id, kind=AdapterKind.CONTROLNET, models=(MODEL.id,)) for id in ("edges", "pose")
]


@pytest.fixture
def fake() -> Any:
    with FakeServer(models=[MODEL], adapters=ADAPTERS) as server:
        yield server


@pytest.fixture
def client(fake: FakeServer) -> Any:
    with Client(fake.target, timeout=30) as made:
        yield made


def test_the_sizes_are_what_the_tests_need() -> None:
    assert len(SMALL) * 2 < MAX_REQUEST_BYTES < len(LARGE) < len(LARGER)


def test_every_field_is_sent(fake: FakeServer, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "edges.png"
    path.write_bytes(OTHER)
    client.generate(
        "a star",
        image=SMALL,
        mask_image=str(path),
        strength=0.5,
        reference_images=[path, SMALL],
        loras={"outline": 0.8, "pastel": -1.0},
        controls=[Control("pose", path, scale=0.5, start=0.1, end=0.9), Control("edges", SMALL)],
        ip_adapter_image=PIL.Image.open(path),
        ip_adapter_scale=0.25,
    )
    (request,) = fake.requests
    assert (request.image, request.mask_image) == (SMALL, OTHER)
    assert (request.strength, request.ip_adapter_scale) == (0.5, 0.25)
    assert request.reference_images == (OTHER, SMALL)
    assert request.loras == {"outline": 0.8, "pastel": -1.0}
    assert request.controls == (
        Control("pose", OTHER, scale=0.5, start=0.1, end=0.9),
        Control("edges", SMALL),
    )
    assert isinstance(request.ip_adapter_image, bytes)
    with PIL.Image.open(io.BytesIO(request.ip_adapter_image)) as sent, PIL.Image.open(path) as own:
        assert sent.tobytes() == own.tobytes()
    assert fake.uploads == ()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F"])
def test_images_of_every_mode_can_be_sent(fake: FakeServer, client: Client, mode: str) -> None:
    client.generate("a star", image=PIL.Image.new(mode, (8, 8)))
    assert isinstance(fake.requests[0].image, bytes)


def test_a_large_image_is_uploaded_once(fake: FakeServer, client: Client) -> None:
    for _ in range(2):
        client.generate("a star", image=LARGE, mask_image=SMALL)
    assert fake.uploads == (LARGE,)
    assert [request.image for request in fake.requests] == [UploadedImage(digest(LARGE))] * 2
    assert [request.mask_image for request in fake.requests] == [SMALL] * 2
    assert fake._registry.uploads.calls == 1


def test_as_many_images_are_uploaded_as_must_be(fake: FakeServer, client: Client) -> None:
    half = [picture(400, seed=number) for number in range(3)]
    client.generate("a star", reference_images=[*half, SMALL])
    sent = fake.requests[0].reference_images
    assert [isinstance(each, UploadedImage) for each in sent].count(True) == len(fake.uploads) == 1
    assert sent[3] == SMALL


def calls(client: Client) -> dict[str, Any]:
    return {
        "generate": lambda **options: client.generate("a star", **options),
        "stream": lambda **options: client.stream("a star", **options).result(),
        "submit": lambda **options: client.submit("a star", **options),
        "estimate": lambda **options: client.estimate("a star", **options),
        "generate_many": lambda **options: client.generate_many(["a star", "a moon"], **options),
    }


@pytest.mark.parametrize("name", ["generate", "stream", "submit", "estimate", "generate_many"])
def test_an_upload_that_the_server_forgot_is_sent_again(
    fake: FakeServer, client: Client, name: str
) -> None:
    call = calls(client)[name]
    call(image=LARGE)
    fake.forget_uploads()
    answer = call(image=LARGE)
    assert not isinstance(answer, list) or not any(isinstance(a, Exception) for a in answer)
    assert fake.uploads == (LARGE,)


@pytest.mark.parametrize("name", ["generate", "stream", "submit", "estimate", "many"])
async def test_so_with_the_async_client(fake: FakeServer, name: str) -> None:
    async with AsyncClient(fake.target, timeout=30) as client:
        for _ in range(2):
            match name:
                case "generate":
                    await client.generate("a star", image=LARGE)
                case "stream":
                    await client.stream("a star", image=LARGE).result()
                case "submit":
                    await client.submit("a star", image=LARGE)
                case "estimate":
                    await client.estimate("a star", image=LARGE)
                case "many":
                    answers = await client.generate_many(["a star"] * 3, image=LARGE)
                    assert not any(isinstance(answer, Exception) for answer in answers)
            assert fake.uploads == (LARGE,)
            fake.forget_uploads()


def test_threads_share_a_client(fake: FakeServer, client: Client) -> None:
    failures: list[BaseException] = []

    def generate(data: bytes) -> None:
        try:
            client.generate("a star", image=data)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=generate, args=(data,)) for data in (LARGE, LARGER, LARGE, LARGER)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(fake.uploads) == {LARGE, LARGER}


def test_a_server_that_keeps_no_uploads_ends_the_call(
    fake: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake._registry.uploads, "add", lambda data: digest(data))
    with pytest.raises(UploadNotFound) as caught:
        client.generate("a star", image=LARGE)
    assert caught.value.upload_ids == (digest(LARGE),)
    assert fake._registry.rejections["UploadNotFound"] == MAX_REPEATS + 1


def test_each_try_uploads_once_more_often(
    fake: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers behind one name: the upload reaches more of them each time."""
    sent: list[bytes] = []
    uploads = fake._registry.uploads

    def add(data: bytes) -> str:
        sent.append(data)
        if len(sent) >= 6:  # The first two calls, and two of the third.
            uploads.files[digest(data)] = data
        return digest(data)

    monkeypatch.setattr(uploads, "add", add)
    client.generate("a star", image=LARGE)
    assert fake._registry.rejections["UploadNotFound"] == 2
    assert len(sent) == 1 + 2 + 3


def test_a_bad_upload_is_an_invalid_request(fake: FakeServer, client: Client) -> None:
    with pytest.raises(InvalidRequest, match="is not a PNG, JPEG or WebP picture"):
        client.generate("a star", image=os.urandom(2 * MAX_REQUEST_BYTES))
    assert fake.jobs == ()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": 7}, "image is a int, must be bytes, a path, a PIL image"),
    ({"reference_images": b"x"}, "reference_images is a bytes, must be a list"),
    ({"reference_images": [None]}, r"reference_images\[0\] is a NoneType"),
    ({"loras": ["outline"]}, "loras is a list, must be a dict"),
    ({"loras": {"outline": "much"}}, r"loras\['outline'\] is 'much', must be a number"),
    ({"controls": ["pose"]}, r"controls\[0\] is a str, must be a Control"),
    ({"controls": [Control("pose", SMALL, scale="x")]}, r"controls\[0\].scale is 'x'"),  # type: ignore[arg-type]
    ({"strength": "half"}, "strength is 'half', must be a number"),
    ({"mask": SMALL}, "mask is not an option of a request: use mask_image"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_types_are_named(client: Client, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        client.generate("a star", **options)


def test_a_file_that_does_not_exist_is_an_error(client: Client) -> None:
    with pytest.raises(FileNotFoundError):
        client.generate("a star", image="no-such-file.png")


def test_the_server_checks_the_rest(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(
            "a star",
            mask_image=SMALL,
            strength=2.0,
            loras={str(number): 1.0 for number in range(5)},
            controls=[Control("", SMALL, scale=3.0)],
            ip_adapter_scale=0.5,
        )
    fields = {violation.field for violation in caught.value.violations}
    assert {"mask_image", "strength", "loras", "controls[0].scale", "ip_adapter_scale"} <= fields
    with (
        FakeServer() as plain,
        Client(plain.target) as other,
        pytest.raises(InvalidRequest, match="image: model 'demo' does not take it"),
    ):
        other.generate("a star", image=SMALL)


def test_the_server_rejects_adapters_that_cannot_be_used() -> None:
    adapters = [
        *ADAPTERS,
        Adapter(id="other", models=("another",)),
        Adapter(id="huge", models=(MODEL.id,), rejection="its rank is 512"),
    ]
    with (
        FakeServer(models=[MODEL], adapters=adapters) as server,
        Client(server.target) as client,
    ):
        for call in (client.generate, client.estimate):
            with pytest.raises(
                AdapterNotFound, match="no adapter 'none'; this server has huge, other"
            ):
                call("a star", loras={"outline": 1.0, "none": 1.0})
            with pytest.raises(InvalidRequest) as caught:
                call("a star", loras={"other": 1.0, "huge": 1.0})
            with pytest.raises(
                AdapterNotFound, match="no adapter 'outline'; this server has edges, p"
            ):
                call("a star", controls=[Control("outline", SMALL)])
            assert [(v.field, v.description) for v in caught.value.violations] == [
                ("loras[0].id", f"'other': does not fit model {MODEL.id!r}"),
                ("loras[1].id", "'huge': its rank is 512"),
            ]
        assert client.generate("a star", loras={"outline": 1.0}).images


def test_the_server_rejects_a_default_strength_that_leaves_no_step(client: Client) -> None:
    """The default is 0.8, and for a mask 1."""
    with pytest.raises(InvalidRequest, match=r"strength: of 1 steps, 0\.8 is less than one"):
        client.generate("a star", image=SMALL, steps=1)
    client.generate("a star", image=SMALL, steps=2)
    client.generate("a star", image=SMALL, mask_image=OTHER, steps=1)
    client.generate("a star", steps=1)


def test_a_model_lists_its_tasks(client: Client) -> None:
    model = client.model()
    assert model.tasks == tuple(Task)
    assert model.defaults is not None
    assert (model.defaults.strength, model.defaults.inpaint_strength) == (0.8, 1.0)
    assert model.limits is not None
    assert (model.limits.max_loras, model.limits.max_controls) == (4, 4)
    assert model.limits.max_reference_images == 4


def recorded(client: Client) -> ReplayRecord:
    result = client.generate(
        "a star",
        image=LARGE,
        mask_image=OTHER,
        reference_images=[SMALL],
        loras={"outline": 0.7},
        controls=[Control("pose", SMALL, end=0.9)],
        seed=7,
        embed_record=True,
    )
    return result.images[0].replay


def test_a_record_names_its_images_by_digest(client: Client, tmp_path: Path) -> None:
    record = recorded(client)
    assert record.request.image == UploadedImage(digest(LARGE))
    assert record.request.mask_image == UploadedImage(digest(OTHER))
    assert record.request.strength == 1.0
    again = ReplayRecord.from_json(record.to_json())
    assert again == record
    assert again.request.controls == (Control("pose", UploadedImage(digest(SMALL)), end=0.9),)
    assert again.request.loras == {"outline": 0.7}
    changed = record.to_json().replace('"upload_id": "sha256', '"uploaded": "sha256')
    with pytest.raises(ValueError, match="not a replay record"):
        ReplayRecord.from_json(changed)


def test_a_replay_needs_its_images_again(fake: FakeServer, client: Client, tmp_path: Path) -> None:
    record = recorded(client)
    fake.forget_uploads()
    with pytest.raises(UploadNotFound) as caught:
        client.replay(record)
    assert set(caught.value.upload_ids) == {digest(LARGE), digest(OTHER), digest(SMALL)}
    path = tmp_path / "large.png"
    path.write_bytes(LARGE)
    again = client.replay(record, images=[SMALL, path, OTHER]).images[0].replay
    assert again.pixels_sha256 == record.pixels_sha256
    assert again.differences(record) == {}
    with pytest.raises(ValueError, match="the record does not name the image sha256:"):
        client.replay(record, images=[SMALL, LARGER])


async def test_an_async_replay_needs_its_images_again(fake: FakeServer, client: Client) -> None:
    record = await asyncio.to_thread(recorded, client)
    fake.forget_uploads()
    async with AsyncClient(fake.target, timeout=30) as other:
        with pytest.raises(UploadNotFound):
            await other.replay(record)
        assert (await other.replay(record, images=[SMALL, LARGE, OTHER])).images


def test_a_lost_connection_is_retried_with_the_upload(fake: FakeServer, client: Client) -> None:
    fake.script(Behaviour(drop_at_step=2))
    with client.stream("a star", image=LARGE) as stream:
        assert stream.result().images
    fake.script(Behaviour(forget_at_step=2))
    fake.forget_uploads()
    with client.stream("a star", image=LARGE) as stream:
        assert stream.result().images


def test_a_request_shows_no_image_bytes() -> None:
    request = GenerationRequest("a star", image=LARGE, reference_images=[LARGE])
    assert len(repr(replace(request, mask_image=LARGE))) < 1000
