"""A thousand damaged pictures; `make fuzz-images` decodes ten thousand."""

from collections import Counter

from darkroom_server.uploads.decoder_pool import DecoderPool
from darkroom_server.uploads.failure import DecodeFailure
from tests.server.uploads.fuzz import fuzz


async def test_a_thousand_damaged_pictures() -> None:
    failures: Counter[DecodeFailure] = Counter()
    decoder = DecoderPool(
        workers=2,
        max_pixels=64_000_000,
        timeout=60.0,
        on_failure=lambda failure: failures.update([failure]),
    )
    try:
        ends, _ = await fuzz(decoder, 1000, seed=7)
    finally:
        await decoder.close()
    assert ends.total() == 1000
    assert failures[DecodeFailure.WORKER_DIED] == failures[DecodeFailure.TOO_SLOW] == 0
    assert ends["decoded"] > 50
    assert ends["is damaged: it cannot be decoded"] > 50
    assert ends["is not a PNG, JPEG or WebP picture"] > 50
