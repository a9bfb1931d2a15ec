"""The trace, sent to a peer's server."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.inprocess.remote import MAX_BATCH_IMAGES
from bench.peers.batch_timeout_search import DEFAULT
from bench.peers.process import serving_peer
from bench.peers.protocols import Ended
from bench.peers.registry import WORK, Peer
from bench.trace.figures import Swaps, read_swaps
from bench.trace.peers.clients import CLIENTS
from bench.trace.peers.config import PeerConfig, image_requests
from bench.trace.requests import TraceRequest
from bench.trace.served import LORAS, PATIENCE_SECONDS, PROMPT, picture, play
from bench.workload.arrivals import Answer, Outcome
from darkroom_server.core.model_runtime import ModelRuntime
from darkroom_server.settings.sources import DEMO_ADAPTERS


def serve_trace(
    requests: Sequence[TraceRequest], peer: Peer, config: PeerConfig, side: int
) -> tuple[list[Answer], Swaps]:
    """Serve ``requests`` with a new server of ``peer``; see ``served.serve_trace``."""
    image = picture(side)

    async def send(port: int) -> tuple[list[Answer], float]:
        client = CLIENTS[peer.wire](port, config.device_models)

        async def call(request: TraceRequest) -> Outcome:
            wanted = image_requests(request, prompt=PROMPT, side=side, loras=LORAS, picture=image)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    files = await client.images(wanted)
            except (Ended, TimeoutError) as error:
                print(f"request {request.index}: {error!r}", flush=True)
                return Outcome.FAILED
            return Outcome.IMAGE if len(files) == request.images and all(files) else Outcome.FAILED

        try:
            return await play(requests, call), client.longest_wait
        finally:
            await client.close()

    with serving_peer(peer, config) as process:
        answers, longest_wait = asyncio.run(send(process.port))
    swaps = read_swaps(Path(config.swaps))
    return answers, replace(swaps, longest_wait=max(swaps.longest_wait, longest_wait))


def config_of(
    folder: Path,
    name: str,
    runtime: ModelRuntime,
    *,
    device_models: int,
    host_models: int,
    load_scale: float,
) -> PeerConfig:
    """The configuration of a run called ``name``, with the models in ``folder``."""
    WORK.mkdir(parents=True, exist_ok=True)
    files = (DEMO_ADAPTERS / "loras" / f"{id}.safetensors" for id in LORAS)
    return PeerConfig(
        folder=str(folder),
        runtime=runtime,
        port=0,
        trace="",
        max_batch_images=MAX_BATCH_IMAGES,
        batch_timeout=DEFAULT,
        loras={file.stem: str(file) for file in files},
        swaps=str(WORK / f"trace-{name}.json"),
        device_models=device_models,
        host_models=host_models,
        load_scale=load_scale,
    )
