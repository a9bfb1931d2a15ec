"""``serve --check`` and ``compile``: start the engines without serving."""

import asyncio
import queue
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom_server import app
from darkroom_server.core.engine import Engine
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineDied, EngineReady, Event
from darkroom_server.ledger.choice import ledger_file
from darkroom_server.rpc.server import probe_port
from darkroom_server.settings import Http, Network, Settings
from darkroom_server.settings.state_folder import measurement_folder, state_folder


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``text`` is one line."""

    ok: bool
    text: str


async def preflight(settings: Settings) -> AsyncIterator[Finding]:
    """Check the settings together, the ports, the state folder, and that every engine loads."""
    engines: list[Engine] = []
    try:
        engines = app.build_engines(settings)
        app.Server(settings, engines)
        yield Finding(True, "settings: the TLS files, tokens and addresses fit together")
    except StartupError as error:
        yield Finding(False, f"settings: {error}")
    for finding in _ports(settings.network, settings.http):
        yield finding
    storage = settings.storage
    folder = state_folder(storage) if storage.state_dir else measurement_folder(settings)
    if folder is not None:
        yield _writable("state folder", folder)
    if (ledger := ledger_file(storage.ledger)) is not None:
        yield _writable("folder of the ledger", ledger.parent)
    for number, engine in enumerate(engines):
        loaded = await asyncio.to_thread(_load, engine)
        yield Finding(isinstance(loaded, EngineReady), f"engine {number}: {_in_words(loaded)}")
        for each in loaded.descriptions if isinstance(loaded, EngineReady) else ():
            what = each.reason or "can be loaded"
            yield Finding(not each.reason, f"engine {number}: {each.id}: {what}")


async def compile_denoisers(settings: Settings) -> AsyncIterator[Finding]:
    """Load the models in one engine, which compiles their denoisers as ``settings`` say."""
    engine, *_ = app.build_engines(settings)
    loaded = await asyncio.to_thread(_load, engine)
    if isinstance(loaded, str):
        yield Finding(False, loaded)
        return
    for model in loaded.models:
        if model.runtime.denoiser.is_compiled:
            yield Finding(True, f"{model.id}: its denoiser is compiled")
        else:
            yield Finding(False, f"{model.id}: its denoiser stays eager; the log says why")


def _ports(network: Network, http: Http) -> Iterator[Finding]:
    addresses = {
        "port": (network.host, network.port),
        "metrics port": (network.metrics_host, network.metrics_port),
    }
    if http.http_port is not None:
        addresses["HTTP port"] = (http.http_host, http.http_port)
    for name, (host, port) in addresses.items():
        try:
            probe_port(host, port)
        except OSError as error:
            yield Finding(False, f"{name}: cannot listen on {host}:{port}: {error.strerror}")
        else:
            free = "a free port will be chosen" if port == 0 else f"{port} is free"
            yield Finding(True, f"{name}: {free} on {host}")


def _writable(name: str, folder: Path) -> Finding:
    """Whether ``folder`` can be written, or created."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Finding(True, f"{name}: {folder} can be written")
    except OSError as error:
        return Finding(False, f"{name}: {folder} cannot be written: {error.strerror}")


def _load(engine: Engine) -> EngineReady | str:
    """Load the models as a server does, measurements included, and stop the engine.

    Returns what it loaded, or why it could not.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    try:
        engine.start(events.put)
        event = events.get()
        while not isinstance(event, EngineReady | EngineDied):
            event = events.get()
        return event.message if isinstance(event, EngineDied) else event
    except (OSError, RuntimeError) as error:
        return f"cannot be started: {error}"
    finally:
        engine.close()


def _in_words(loaded: EngineReady | str) -> str:
    if isinstance(loaded, str):
        return loaded
    device = loaded.models[0].runtime.device if loaded.models else loaded.device
    names = ", ".join(model.id for model in loaded.models) or "no model"
    return f"loaded {names} on {device} in {loaded.load_seconds:.1f} s"
