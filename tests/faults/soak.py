"""Mixed load with random cancels and kills: `python -m tests.faults.soak --minutes 5`.

At the end no job, task, file, thread or process may remain, and memory must not have grown.
"""

import argparse
import asyncio
import gc
import os
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from darkroom.v1 import types_pb2
from darkroom_server.core.events import BatchDone, Event
from darkroom_server.dispatch.jobs.outcomes import JobOutcome
from tests.engine.tiny import write_tiny_model

from .tapped import SERVING, Wire, serving

CALLERS = 12
BATCHES_BETWEEN_KILLS = 400
MAX_GROWTH_BYTES = 48 << 20
"""The most that the memory of the serving process may grow, once it is warm."""

SCHEDULERS = (types_pb2.SCHEDULER_DDIM, types_pb2.SCHEDULER_EULER, types_pb2.SCHEDULER_DPMPP_2M)


@dataclass
class Tally:
    """How the calls ended, and how often the engine was killed."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kills: int = 0


@dataclass(frozen=True)
class Resources:
    """What a process holds: equal before and after if nothing leaks; ``rss`` in bytes."""

    tasks: int
    threads: int
    files: int
    children: int
    rss: int

    @classmethod
    def now(cls) -> "Resources":
        """What this process holds now."""
        gc.collect()
        process = psutil.Process()
        return cls(
            tasks=len(asyncio.all_tasks()),
            threads=threading.active_count(),
            files=process.num_fds(),
            children=len(process.children(recursive=True)),
            rss=process.memory_info().rss,
        )


async def run_caller(end: float, wire: Wire, tally: Tally, dice: random.Random) -> None:
    """One caller until the time ``end``: requests one by one, some cancelled at a random moment."""
    while time.monotonic() < end:
        call = asyncio.ensure_future(
            wire.generate(
                seed=dice.randrange(1000),
                steps=dice.choice((4, 8, 16)),
                image_count=dice.choice((1, 1, 2)),
                guidance_scale=dice.choice((1.0, 5.0)),
                width=dice.choice((64, 64, 72)),
                scheduler=dice.choice(SCHEDULERS),
                exact=dice.random() < 0.2,
            )
        )
        if dice.random() < 0.25:
            await asyncio.wait({call}, timeout=dice.random() * 0.5)
            call.cancel()
        try:
            await call
            tally.outcomes["finished"] += 1
        except asyncio.CancelledError:
            tally.outcomes["cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            tally.outcomes[error.code().name] += 1


def kill_repeatedly(wire: Wire, tally: Tally, dice: random.Random) -> None:
    """Kill the engine every few hundred batches, in the middle of one."""
    remaining = BATCHES_BETWEEN_KILLS

    def kill_when_due(event: Event) -> None:
        nonlocal remaining
        remaining -= isinstance(event, BatchDone)
        if remaining <= 0:
            remaining = round(BATCHES_BETWEEN_KILLS * (0.5 + dice.random()))
            tally.kills += 1
            wire.engine.kill()

    wire.engine.on_event = kill_when_due


async def soak(minutes: float, seed: int) -> list[str]:
    """Run the load; returns the problems that were found."""
    dice = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_model(Path(name))
        async with serving(folder, engine_max_restarts=10_000) as wire:
            warm = time.monotonic() + min(20.0, minutes * 12)
            await asyncio.gather(*(run_caller(warm, wire, tally, dice) for _ in range(CALLERS)))
            before = Resources.now()
            kill_repeatedly(wire, tally, dice)
            end = time.monotonic() + 60 * minutes
            await asyncio.gather(*(run_caller(end, wire, tally, dice) for _ in range(CALLERS)))
            wire.engine.on_event = lambda _: None
            await wire.health_becomes(SERVING)
            await wire.generate()
            dispatcher = wire.server.dispatcher
            while dispatcher.running_jobs:
                await wire.generate(steps=1)
            after = Resources.now()
            counts = dispatcher.counts
    print(f"calls {dict(tally.outcomes)}, kills {tally.kills}")
    print(f"jobs  accepted {counts.accepted}, ended {dict(counts.by_end)}")
    print(f"before {before}\nafter  {after}")
    problems = [
        f"{what}: {getattr(before, what)} before, {getattr(after, what)} after"
        for what in ("tasks", "threads", "files", "children")
        if getattr(after, what) > getattr(before, what)
    ]
    if after.rss - before.rss > MAX_GROWTH_BYTES:
        problems.append(f"memory grew by {(after.rss - before.rss) >> 20} MiB")
    if counts.accepted != counts.ended:
        problems.append(f"{counts.accepted} jobs accepted, {counts.ended} ended")
    if tally.outcomes["finished"] > counts.by_end[JobOutcome.FINISHED]:
        problems.append("more calls finished than jobs")
    if tally.outcomes["INTERNAL"] * 20 > tally.outcomes["finished"]:
        problems.append(f"{tally.outcomes['INTERNAL']} calls failed")
    unexpected = set(tally.outcomes) - {"finished", "cancelled", "INTERNAL"}
    problems += [f"{tally.outcomes[code]} calls ended in {code}" for code in sorted(unexpected)]
    return problems


def main() -> None:
    """Parse the command line, run the load, and print the problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    problems = asyncio.run(soak(options.minutes, options.seed))
    for line in problems:
        print(f"problem: {line}")
    if problems:
        raise SystemExit(1)
    print("no problems")


if __name__ == "__main__":
    main()
