"""What the boundary between the serving process and the engine's costs.

``python -m bench.boundary`` writes ``bench/results`` and a part of ``docs/benchmarks.md``.
"""

import argparse
import multiprocessing
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.arrivals import Arrivals
from bench.boundary_page import page
from bench.machine import model_source, this_machine, versions
from bench.results import RESULTS, Results, model_facts, save, today
from bench.sections import DOCS, write_section
from bench.threaded import EngineContender
from bench.workload import mixed
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import EncodedImage, ImageReady, Replay
from darkroom_server.core.job import ImageFormat
from darkroom_server.ipc.channel import Channel
from darkroom_server.ipc.commands import Cancel, Close

STEPS = 16
IMAGE_BYTES = 1_000_000


def lone_pairs(
    thread: EngineContender, process: EngineContender, pairs: int
) -> list[dict[str, float]]:
    """Seconds of one request alone in each, in turns, the first turn changing too."""
    contenders = {"thread": thread, "process": process}
    found = []
    for index, request in enumerate(mixed(pairs, seed=4)):
        alone = replace(request, steps=STEPS)
        names = list(contenders) if index % 2 else list(contenders)[::-1]
        found.append({n: contenders[n].draw(Arrivals([alone]))[0].latency for n in names})
    return found


def crossings(count: int) -> list[float]:
    """Seconds that each of ``count`` images of 1 MB takes from one process to another.

    From the call of ``send`` to the return of ``receive``; one is under way at a time, so that
    none waits for another.
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
        # Linux's monotonic clock is one for all processes of a machine.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.boundary", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--pairs", type=int, default=60, help="lone requests of each engine")
    parser.add_argument("--images", type=int, default=500, help="of 1 MB, across the channel")
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    config = EngineConfig(models=(model_source(options.model),), max_rows=2)
    thread = EngineContender(ThreadEngine(config))
    # In the same form: what was measured is not measured again.
    previous_measurements = replace(config, previous_measurements=(thread.info,))
    process = EngineContender(ProcessEngine(previous_measurements))
    lone_pairs(thread, process, 3)
    pairs = lone_pairs(thread, process, options.pairs)
    for contender in (thread, process):
        contender.close()
    results = Results(
        bench="boundary",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model=model_facts(thread.info),
        settings={"pairs": options.pairs, "images": options.images, "lone_steps": STEPS},
        figures={"lone": pairs, "crossings": crossings(options.images)},
        note=options.note,
    )
    text = page(results)
    print(text)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "boundary", text, options.docs)


if __name__ == "__main__":
    main()
