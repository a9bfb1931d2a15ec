"""How far a download from the hub is, by the size of the hub's cache."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import structlog

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.events import Event
from darkroom_server.core.model_events import ModelFetching
from darkroom_server.engine.loading.hub_errors import HUB_TIMEOUT
from darkroom_server.ipc.channel import ChannelClosed

log = structlog.get_logger(__name__)

REPORT_SECONDS = 1.0

LOG_SECONDS = 10.0


def is_on_hub(source: ModelSource) -> bool:
    """Whether ``source`` is a hub id, and no path."""
    return not Path(source.location).expanduser().exists()


def cached_bytes(source: ModelSource) -> int:
    """The bytes that the hub's cache has of a model, parts of files included; 0 for a path."""
    return 0 if not is_on_hub(source) else _size_of(_cache_of(source).glob("blobs/*"))


def cached_weights(source: ModelSource) -> int:
    """The bytes of ``cached_bytes`` that need not be fetched for its weights any more."""
    folder = _cache_of(source)
    whole = {file.resolve() for file in folder.glob("snapshots/*/*/*.safetensors")}
    return _size_of([*whole, *folder.glob("blobs/*.incomplete")])


def _cache_of(source: ModelSource) -> Path:
    name = "models--" + source.location.replace("/", "--")
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / name


def _size_of(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # It was renamed in this moment: it is complete.
            continue
    return total


@contextmanager
def fetch_reported(source: ModelSource, emit: Callable[[Event], None]) -> Iterator[None]:
    """Emit once a second how much of ``source`` has been fetched, if it is, and log it at times."""
    if not source.may_download or not is_on_hub(source):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(
        target=_report, args=[source, emit, over], name="fetch-progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report(source: ModelSource, emit: Callable[[Event], None], over: threading.Event) -> None:
    before, had = cached_bytes(source), cached_weights(source)
    total, said, last_logged = None, 0, -LOG_SECONDS
    waited = 0.0
    while not over.wait(REPORT_SECONDS):
        waited += REPORT_SECONDS
        fetched = cached_bytes(source) - before
        if fetched <= said:
            continue
        if total is None:
            total = max(0, weights_on_hub(source) - had)
        said = fetched
        if total:
            fetched = min(fetched, total)  # Files besides the weights are small, and not counted.
        try:
            emit(ModelFetching(model=source.id, fetched_bytes=fetched, fetch_bytes=total))
        except ChannelClosed:
            return  # The serving process is gone.
        if waited - last_logged >= LOG_SECONDS:
            last_logged = waited
            log.info("model is being fetched", model=source.id, bytes=fetched, of=total or "?")


def weights_on_hub(source: ModelSource) -> int:
    """About the bytes of the files that a download takes; 0 if the hub does not say."""
    try:
        info = huggingface_hub.model_info(
            source.location,
            revision=source.revision,
            token=source.token,
            timeout=HUB_TIMEOUT,
            files_metadata=True,
        )
    except Exception as error:  # noqa: BLE001 - see below.
        # The hub raises errors of any type, and this one only costs the total.
        log.debug("size of the model is not known", model=source.id, why=str(error))
        return 0
    weights = [
        file
        for file in info.siblings or ()
        if "/" in file.rfilename and file.rfilename.endswith(".safetensors")
    ]
    mark = f".{source.variant}."
    chosen = [file for file in weights if source.variant and mark in file.rfilename]
    plain = [file for file in weights if file.rfilename.count(".") == 1]
    return sum(file.size or 0 for file in chosen or plain or weights)
