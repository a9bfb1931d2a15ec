from typing import Any

import pytest

from darkroom_server.core.errors import QuotaExceeded, TooLarge
from darkroom_server.uploads.store import Upload, UploadStore
from tests.server.clock import Clock


def upload(size: int) -> Upload:
    return Upload(data=bytes(size), width=8, height=8)


def store(**changes: Any) -> UploadStore:
    return UploadStore(**{"max_bytes": 100, "max_owner_bytes": 60, "ttl": 50.0, **changes})


def held(store: UploadStore, **digests: str) -> dict[str, str]:
    """Which of ``digests``, by owner, are there; looking does not count as a use."""
    return {
        owner: "".join(d for d in text if d in store._entries.get(owner, {}))
        for owner, text in digests.items()
    }


def test_an_owner_sees_its_own_files_only() -> None:
    files = store()
    files.put("a", "x", upload(10))
    assert files.get("a", "x") == upload(10)
    assert files.get("b", "x") is None
    assert files.get("a", "y") is None


def test_the_least_recently_used_file_of_a_full_share_is_evicted() -> None:
    files = store()
    for digest in "xyz":
        files.put("a", digest, upload(20))
    assert files.get("a", "x")
    files.put("a", "w", upload(20))
    assert held(files, a="xyzw") == {"a": "xzw"}
    assert (files.stored_bytes, files.evicted) == (60, 1)


def test_a_full_store_evicts_from_the_owner_that_uses_the_most() -> None:
    files = store()
    files.put("b", "x", upload(30))
    files.put("a", "y", upload(20))
    files.put("a", "z", upload(40))
    files.put("c", "w", upload(30))
    assert held(files, a="yz", b="x", c="w") == {"a": "z", "b": "x", "c": "w"}
    assert files.stored_bytes == 100


def test_the_same_file_again_takes_no_more() -> None:
    files = store()
    files.put("a", "x", upload(40))
    files.put("a", "x", upload(40))
    assert (files.stored_bytes, files.evicted) == (40, 0)


def test_a_file_expires_after_its_last_use(clock: Clock) -> None:
    files = store()
    files.put("a", "x", upload(10))
    files.put("a", "y", upload(10))
    clock.skip(30.0)
    assert files.get("a", "x")
    clock.skip(30.0)
    assert files.get("a", "x")
    assert files.get("a", "y") is None
    assert (files.stored_bytes, files.evicted) == (10, 1)


def test_what_arrives_is_bounded() -> None:
    files = store()
    with files.receiving("a") as one, files.receiving("a") as two, files.receiving("b") as three:
        one(40)
        with pytest.raises(QuotaExceeded):
            two(30)
        two(20)
        three(40)
        with pytest.raises(QuotaExceeded):
            three(1)
    with files.receiving("a") as again:
        again(60)
        with pytest.raises(TooLarge):
            again(1)
