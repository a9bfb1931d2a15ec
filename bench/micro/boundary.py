"""The cost of the boundary between the serving process and the engine's process."""

import argparse
import multiprocessing
import socket
import time
from dataclasses import replace

from bench.inprocess.engine import EnginePeer
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.machine import model_source, versions
from bench.report.results import Results, model_facts
from bench.report.statistics import bootstrap_median, quantile
from bench.workload.arrivals import Arrivals
from bench.workload.requests import mixed
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import EncodedImage, ImageReady, Replay
from darkroom_server.core.job import ImageFormat
from darkroom_server.ipc.channel import Channel
from darkroom_server.ipc.commands import Cancel, Close

STEPS = 16
IMAGE_BYTES = 1_000_000


def lone_pairs(thread: EnginePeer, process: EnginePeer, pairs: int) -> list[dict[str, float]]:
    """Seconds of one request alone in each engine, in alternating order."""
    peers = {"thread": thread, "process": process}
    found = []
    for index, request in enumerate(mixed(pairs, seed=4)):
        alone = replace(request, steps=STEPS)
        names = list(peers) if index % 2 else list(peers)[::-1]
        found.append({n: peers[n].serve(Arrivals([alone]))[0].latency for n in names})
    return found


def crossings(count: int) -> list[float]:
    """Seconds that each of ``count`` images of 1 MB takes from one process to another.

    From the call of ``send`` to the return of ``receive``. One is in flight at a time, so that none
    waits for another.
    """
    ours, theirs = socket.socketpair()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_send_images, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    channel = Channel(ours.detach())
    seconds = []
    for _ in range(count):
        channel.send(Cancel("next"))
        event: ImageReady = channel.receive()
        # On Linux, all processes share the monotonic clock.
        seconds.append((time.monotonic_ns() - int(event.job_id)) / 1e9)
    channel.send(Close())
    process.join()
    channel.close()
    return seconds


def _send_images(descriptor: socket.socket) -> None:
    channel = Channel(descriptor.detach())
    replay = Replay(
        scheduler_class="DDIMScheduler",
        scheduler_config_json="{}",
        device="cpu",
        library_versions=versions(),
        rows_in_last_pass=2,
        pixels_sha256="0" * 64,
    )
    image = EncodedImage(
        data=bytes(IMAGE_BYTES),
        format=ImageFormat.PNG,
        width=512,
        height=512,
        seed=0,
        prompt_truncated=False,
        flagged=False,
        replay=replay,
    )
    while isinstance(channel.receive(), Cancel):
        channel.send(ImageReady(job_id=str(time.monotonic_ns()), image_index=0, image=image))
    channel.close()


def measure(options: argparse.Namespace) -> Measurement:
    """Lone requests in both engines, and images of 1 MB across the channel."""
    config = EngineConfig(models=(model_source(options.model),), rows=2)
    thread = EnginePeer(ThreadEngine(config))
    # With these measurements the second engine chooses the same dtype and memory layout.
    process = EnginePeer(ProcessEngine(replace(config, previous_measurements=(thread.info,))))
    lone_pairs(thread, process, 3)
    pairs = lone_pairs(thread, process, options.pairs)
    for peer in (thread, process):
        peer.close()
    return Measurement(
        figures={"lone": pairs, "crossings": crossings(options.images)},
        model=model_facts(thread.info),
        settings={"lone_steps": STEPS},
    )


def describe(results: Results) -> list[str]:
    """The text of the section."""
    pairs = results.figures["lone"]
    ratio = bootstrap_median([pair["process"] / pair["thread"] for pair in pairs])
    thread, process = (
        quantile([pair[name] for pair in pairs], 0.5) * 1000 for name in ("thread", "process")
    )
    micros = [seconds * 1e6 for seconds in results.figures["crossings"]]
    return [
        f"A lone request of {results.settings['lone_steps']} steps takes {process:.1f} ms in an "
        f"engine in a process of its own, and {thread:.1f} ms in an engine on a thread (medians of "
        f"{len(pairs)} interleaved pairs); median ratio {ratio.value:.3f}, 95 % interval "
        f"{ratio.low:.3f} to {ratio.high:.3f}. An image of 1 MB crosses the boundary in "
        f"{quantile(micros, 0.5):.0f} µs at the median, {quantile(micros, 0.95):.0f} µs at p95, "
        f"of {len(micros)}."
    ]


BENCHMARK = Benchmark(
    name="boundary",
    title="The process boundary",
    command="python -m bench.micro boundary",
    amounts={
        "pairs": Amount(60, 3, "lone requests of each engine"),
        "images": Amount(500, 20, "images of 1 MB across the channel"),
    },
    measure=measure,
    describe=describe,
)
