"""The server as a whole: the only file that knows every part."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from darkroom_server.backends.descriptors import raise_descriptor_limit
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.core.engine import Engine
from darkroom_server.core.engine_config import Preset
from darkroom_server.dispatch import (
    Dispatcher,
    LedgerEntries,
    LoadTimes,
    PeerAddresses,
    ResultStore,
    State,
)
from darkroom_server.extras import http_door
from darkroom_server.fleet.assembly import join_fleet
from darkroom_server.ledger.choice import chosen_ledger
from darkroom_server.ledger.input_limits import InputLimits
from darkroom_server.logs import LogWriter
from darkroom_server.rpc.server import RpcServer
from darkroom_server.rpc.stored_requests import StoredRequests
from darkroom_server.security.bind_policy import check_bind_policy
from darkroom_server.security.fleet_tokens import FleetTokens
from darkroom_server.security.tls import server_credentials, server_ssl_context
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.generation import GenerationService
from darkroom_server.service.inputs import InputLoader
from darkroom_server.service.summary import RequestObserver
from darkroom_server.service.uploads import UploadService
from darkroom_server.service_manager import ServiceManager
from darkroom_server.settings import Settings
from darkroom_server.settings.hub_token import hub_token
from darkroom_server.settings.sources import (
    adapter_places,
    all_sources,
    engine_configs,
    load_times_file,
    models_folder,
    sources_at_start,
)
from darkroom_server.settings.tls import tls_files
from darkroom_server.signals import exit_by_signal
from darkroom_server.telemetry import Exporter, Metrics, open_traces
from darkroom_server.uploads.decoder_pool import DecoderPool
from darkroom_server.uploads.store import UploadStore

if TYPE_CHECKING:
    from darkroom_server.http.server import HttpServer

log = structlog.get_logger(__name__)

EXIT_UNFINISHED = 1
"""The exit code of a shutdown that exceeded a time limit."""

ANSWER_SECONDS = 5.0
"""For handlers to answer after every job has ended."""

STEP_SECONDS = 30.0
"""The most that one step of the shutdown takes after the jobs have ended; normally a second."""

REJECT_SECONDS = 3.0
"""How long a server that shuts down rejects calls before it closes its port.

Callers retry after a second, as the error advises. While the port is open they may meet this server
again; before their fifth and last try it is closed, and they find another one.
"""


def build_engines(settings: Settings) -> list[Engine]:
    """The engines; torch is imported in their processes, not here."""
    configs = engine_configs(settings, hub_token())
    if settings.engine.engine == "thread":
        return [ThreadEngine(config) for config in configs]
    timeout, load_timeout = settings.engine.engine_timeout, settings.engine.load_timeout
    return [ProcessEngine(config, timeout=timeout, load_timeout=load_timeout) for config in configs]


class EngineLost(Exception):
    """No engine will come back; the message is one line for the operator."""


class Server:
    """One server: ``startup``, ``serve``, ``shutdown``.

    ``address``, ``http_address`` ("" without HTTP) and ``metrics_address`` are set by ``startup``,
    ``unfinished`` by ``shutdown``: the steps of it that exceeded their time limit. The constructor
    raises ``StartupError`` for unusable certificates and tokens.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Sequence[Engine],
        log_writer: LogWriter | None = None,
        load_times: LoadTimes | None = None,
    ) -> None:
        self.address = self.http_address = self.metrics_address = ""
        self._settings = settings
        self._stop = asyncio.Event()
        self._manager = ServiceManager()
        self.unfinished: list[str] = []
        models = {source.id: source.location for source in all_sources(settings.models)}
        self._spans = open_traces(settings.logs.traces)
        self.metrics = Metrics(models)
        if log_writer is not None:
            self.metrics.process.read_dropped_log_lines(lambda: log_writer.dropped)
        self.dispatcher = Dispatcher(
            engines,
            models,
            max_queued_jobs=settings.dispatch.max_queued_jobs,
            max_queued_megapixel_steps=settings.dispatch.max_queued_megapixel_steps,
            early_refusal=settings.dispatch.early_refusal,
            max_input_bytes=settings.images.input_bytes,
            max_resident_samples=settings.dispatch.max_resident_samples,
            max_restarts=settings.engine.engine_max_restarts,
            observer=self.metrics,
            on_state=self._publish_health,
            load_times=load_times,
            adapter_places=adapter_places(settings, hub_token()),
            pinned_models=[source.id for source in sources_at_start(settings.models)],
            device_memory_budget=settings.models.device_memory_budget,
            host_memory_budget=settings.models.host_memory_budget,
            model_locations=models,
            swap_wait=settings.models.swap_wait,
            models_folder=models_folder(settings, hub_token()),
        )
        self.metrics.read_jobs(self.dispatcher)
        images = settings.images
        ledger = chosen_ledger(
            settings.storage.ledger,
            settings.network.server_id,
            retention=settings.results.result_ttl,
            inputs=InputLimits(images.input_bytes, images.input_bytes_per_caller),
        )
        self._entries = LedgerEntries(ledger, self.metrics.ledger)
        self.results = ResultStore(
            self.dispatcher,
            result_ttl=settings.results.result_ttl,
            result_bytes=settings.results.result_bytes,
            reattach_grace=settings.results.reattach_grace,
            entries=self._entries,
        )
        self._exporter = Exporter(self.metrics.registry, lambda: self.dispatcher.ready)
        certificates, tokens = tls_files(settings.security), settings.security.tokens
        check_bind_policy(
            settings.network.host,
            tls=certificates is not None,
            tokens=tokens is not None,
            insecure=settings.security.insecure,
        )
        observers: list[RequestObserver] = [self.metrics.requests]
        if self._spans is not None:
            observers.append(self._spans)
        store = UploadStore(
            max_bytes=images.upload_bytes,
            max_owner_bytes=images.upload_bytes_per_caller,
            ttl=images.upload_ttl,
        )
        self.metrics.uploads.read_store(store)
        self.decoder = DecoderPool(
            workers=images.image_workers,
            max_pixels=round(images.image_megapixels * 1e6),
            timeout=images.image_timeout,
            on_failure=self.metrics.uploads.decode_failed,
        )
        service = GenerationService(
            self.dispatcher,
            self.results,
            InputLoader(store, self.decoder),
            observers,
            self._entries,
            StoredRequests(),
            log_prompts=settings.logs.log_prompts,
        )
        self._durability = service.durability
        self._fleet = join_fleet(
            self._entries,
            self.dispatcher,
            self.results,
            service,
            self.metrics.fleet,
            certificates,
            settings,
        )
        addresses = PeerAddresses(settings.security.trusted_proxies)
        callers = None
        if tokens:
            callers = FleetTokens(tokens, self._fleet.key) if self._fleet else Tokens(tokens)
        anonymous = replace(ANONYMOUS, max_jobs=settings.security.max_jobs_per_address)
        self._rpc = RpcServer(
            service,
            UploadService(store, self.decoder, self.metrics.uploads),
            self.dispatcher,
            self.metrics.calls,
            self.metrics.requests,
            reflect=settings.network.reflection,
            server_id=settings.network.server_id,
            begin_traces=self._spans is not None,
            tokens=callers,
            addresses=addresses,
            anonymous=anonymous,
            credentials=server_credentials(certificates) if certificates else None,
        )
        self._entries.on_reachable = self._rpc.health.set_ledger
        self.metrics.process.read_dropped_calls(self._rpc.dropped_calls.read)
        self._http: HttpServer | None = None
        if settings.http.http_port is not None:
            check_bind_policy(
                settings.http.http_host,
                tls=certificates is not None,
                tokens=tokens is not None,
                insecure=settings.security.insecure,
                flag="--http-host",
            )
            self._http = http_door().http_server(
                service,
                self.dispatcher,
                self.metrics.http,
                self.metrics.requests,
                hosts=settings.http.http_hosts,
                origins=settings.http.http_origins,
                page=settings.http.page,
                result_ttl=settings.results.result_ttl if settings.results.result_bytes else 0.0,
                url_key=settings.http.http_url_key,
                urls_by_default=settings.http.http_response_format == "url",
                begin_traces=self._spans is not None,
                tokens=callers,
                addresses=addresses,
                anonymous=anonymous,
                tls=server_ssl_context(certificates) if certificates else None,
            )

    async def run(self) -> None:
        """Run until ``stop``; raises ``StartupError`` or ``EngineLost``."""
        try:
            await self.startup()
            await self.serve()
        finally:
            await self.shutdown()
        log.info("stopped")

    async def startup(self) -> None:
        """Open the ports, alive and not ready, and start loading."""
        network = self._settings.network
        await self._durability.open()
        self.metrics_address = self._exporter.start(network.metrics_host, network.metrics_port)
        self.address = await self._rpc.start(network.host, network.port)
        if self._fleet is not None:
            self._fleet.start(network.fleet_address, self.address)
        ports = {"address": self.address, "metrics": self.metrics_address}
        if self._http is not None and (port := self._settings.http.http_port) is not None:
            host = self._settings.http.http_host
            ports["http"] = self.http_address = await self._http.start(host, port)
        log.info("loading", **ports)
        self.dispatcher.start()

    async def serve(self) -> None:
        """Serve until ``stop``; raises if the models cannot load or no engine remains."""
        began = time.monotonic()
        if await self._unless_stopped(self._durability.take_up()):
            self._log_serving(time.monotonic() - began)
        if await self._unless_stopped(self.dispatcher.availability.failed()):
            self._publish_health(State.DRAINING)
            raise EngineLost(await self.dispatcher.availability.failed())

    @property
    def stopping(self) -> bool:
        """``stop`` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Let ``serve`` return; new jobs are accepted until ``shutdown`` rejects them."""
        self._stop.set()

    async def shutdown(self) -> None:
        """Reject new jobs, let accepted ones finish, and stop the engines."""
        shutdown = self._settings.shutdown
        self._stop.set()
        self._publish_health(State.DRAINING)
        if self.dispatcher.ready:
            log.info("draining", jobs=self.dispatcher.counts.live, grace=shutdown.grace)
            await asyncio.sleep(shutdown.drain_delay)
        closing = asyncio.get_running_loop().call_later(REJECT_SECONDS, self._close_ports)
        await self.dispatcher.drain(shutdown.grace)
        closing.cancel()
        if self._fleet is not None:
            await self._limited("fleet", self._fleet.member.leave())
        if self._http is not None:
            await self._limited("http", self._http.stop(ANSWER_SECONDS))
        await self._limited("calls", self._rpc.stop(ANSWER_SECONDS))
        await self._limited("image workers", self.decoder.close())
        await self._limited("engines", self.dispatcher.close())
        self.results.close()
        await self._limited("ledger", self._entries.close())
        await self._limited("metrics", asyncio.to_thread(self._exporter.stop))
        if self._spans is not None:
            await self._limited("spans", asyncio.to_thread(self._spans.close))

    async def _limited(self, step: str, ending: Coroutine[None, None, None]) -> None:
        """Await one step of the shutdown, for a limited time: no step may prevent the next one."""
        try:
            async with asyncio.timeout(STEP_SECONDS):
                await ending
        except TimeoutError:
            log.error("shutdown step exceeded its time limit", step=step)
            self.unfinished.append(step)

    def _close_ports(self) -> None:
        self._rpc.close_port()
        if self._http is not None:
            self._http.close_port()

    def _publish_health(self, state: State) -> None:
        # Published before jobs are rejected, so that callers have moved on by then.
        state = State.DRAINING if self.stopping else state
        self._rpc.health.set_state(state)
        self._manager.publish(state)

    async def _unless_stopped(self, awaited: Coroutine[None, None, object]) -> bool:
        """Whether ``awaited`` ended before ``stop`` was called; raises what it raises."""
        task = asyncio.ensure_future(awaited)
        stop = asyncio.ensure_future(self._stop.wait())
        done, pending = await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        for one in pending:
            one.cancel()
        if task in done:
            task.result()
        return task in done and not self._stop.is_set()

    def _log_serving(self, load_seconds: float) -> None:
        models = self.dispatcher.models.in_memory
        runtime = models[0].runtime.log_fields if models else {}
        is_auto = self._settings.engine.preset is Preset.AUTO
        log.info(
            "serving",
            address=self.address,
            metrics=self.metrics_address,
            **({"http": self.http_address} if self.http_address else {}),
            models=[model.id for model in models],
            preset_why=f"auto, on {runtime.get('device', '?')}" if is_auto else "asked for",
            **runtime,
            load_seconds=round(load_seconds, 2),
        )


def run(
    settings: Settings,
    engines: Sequence[Engine] | None = None,
    *,
    log_writer: LogWriter | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT; a second signal ends the process at once.

    Raises ``StartupError`` and ``EngineLost``.
    """
    load_times = LoadTimes(*load_times_file(settings)) if engines is None else None
    asyncio.run(_run(settings, engines or build_engines(settings), log_writer, load_times))


async def _run(
    settings: Settings,
    engines: Sequence[Engine],
    log_writer: LogWriter | None,
    load_times: LoadTimes | None,
) -> None:
    log.debug("descriptors", limit=raise_descriptor_limit())
    server = Server(settings, engines, log_writer, load_times)
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if not server.stopping:
            log.info("signal", signal=number.name, again="ends the process at once")
            server.stop()
            return
        log.warning("forced", signal=number.name)
        exit_by_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await server.run()
    if server.unfinished:
        # Its threads would delay the interpreter's exit without a limit.
        logging.shutdown()
        os._exit(EXIT_UNFINISHED)
