"""The client and a server: images of every kind, the record in the file, and a lost upload."""

import random
from pathlib import Path
from typing import Any

import PIL.Image

from darkroom_client import AsyncClient, Control, ReplayRecord
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.settings import Images
from tests.server.uploads.pictures import BLUE, encoded, halves, mask, plain
from tests.server.wire import serving


def wired(**options: Any) -> Any:
    return serving(fake={"models": [fake_image_model()], "auto": True}, **options)


def noise(side: int, seed: int) -> bytes:
    pixels = random.Random(seed).randbytes(side * side * 3)
    return encoded(PIL.Image.frombytes("RGB", (side, side), pixels))


async def test_every_field_reaches_the_engine_and_its_record_returns(tmp_path: Path) -> None:
    path = tmp_path / "edges.png"
    path.write_bytes(plain(BLUE))
    files = [encoded(halves()), mask(), plain(BLUE)]
    async with wired() as wire, AsyncClient(wire.server.address) as client:
        result = await client.generate(
            "a star",
            image=files[0],
            mask_image=files[1],
            strength=0.5,
            reference_images=[path],
            loras={"outline": 0.7},
            controls=[Control("pose", path, end=0.9)],
            ip_adapter_image=halves(),
            ip_adapter_scale=0.3,
            embed_record=True,
        )
        image = result.image
        saved = ReplayRecord.from_file(image.save(tmp_path / "star.png"))
        assert saved.differences(image.replay) == {}
        assert saved.request == image.replay.request
        assert saved.request.loras == {"outline": 0.7}
        files.append(encoded(halves(), compress_level=1))
        again = await client.replay(saved, images=files)
        assert again.image.data == image.data
        first, second = wire.submitted.get_nowait(), wire.submitted.get_nowait()
        assert first.without_pixels().pictures == second.without_pixels().pictures
        assert first.pictures == second.pictures


async def test_a_large_image_is_uploaded_and_sent_again_after_an_eviction() -> None:
    one, other = noise(640, 1), noise(640, 2)
    images = Images(upload_bytes_per_caller=max(len(one), len(other)))
    async with wired(images=images) as wire, AsyncClient(wire.server.address) as client:
        for picture in (one, other, one, one):
            result = await client.generate("a star", image=picture, strength=1.0, seed=3)
            assert (result.image.width, result.image.height) == (640, 640)
        jobs = [wire.submitted.get_nowait() for _ in range(4)]
        digests = [job.image.digest for job in jobs]
        assert digests[0] == digests[2] == digests[3] != digests[1]
        many = await client.generate_many(["a star"] * 4, image=other)
        assert [answer for answer in many if isinstance(answer, Exception)] == []
