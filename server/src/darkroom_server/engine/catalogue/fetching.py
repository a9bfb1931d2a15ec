"""How far a download from the hub is, by the size of the hub's cache."""

import threading
from collections.abc import Callable, Iterator
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
    if not is_on_hub(source):
        return 0
    name = "models--" + source.location.replace("/", "--")
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / name / "blobs"
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # It was renamed in this moment: it is complete.
            continue
    return total


@contextmanager
def fetch_reported(source: ModelSource, emit: Callable[[Event], None]) -> Iterator[None]:
    """Emit and log about once a second how much of ``source`` has been fetched, if it is."""
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
    before = cached_bytes(source)
    total, said, last_logged = None, 0, 0.0
    waited = 0.0
    while not over.wait(REPORT_SECONDS):
        waited += REPORT_SECONDS
        fetched = cached_bytes(source) - before
        if fetched <= said:
            continue
        if total is None:
            total = max(0, weights_on_hub(source) - before)
        said = fetched
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
