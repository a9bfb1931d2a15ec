"""Mixed load with cancels, kills and attackers: `python -m tests.faults.soak --minutes 30`.

The server runs in processes of its own. At the end every accepted job must have ended, no
descriptor, thread or process may remain, and the memory of both processes must not grow.
"""

import argparse
import asyncio
import contextlib
import math
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client import AsyncClient, DarkroomError, Scheduler
from tests.engine.tiny import write_tiny_model
from tests.server.hostile.http2 import CONTINUATION, END_HEADERS, HEADERS, call_headers, peer
from tools.observe.server import Running, server

CALLERS = 12
ROUND_SECONDS = 110.0
"""Callers and attackers work that long; then the memory is read, when nobody does anything."""

QUIET_SECONDS = 5.0
ROUNDS_PER_ENGINE = 4
"""The engine is killed in the middle of that many rounds."""

MAX_GROWTH = 10.0
"""The most that a process may grow, in MB/h."""

KINDS = ("RssAnon", "VmSwap")
"""The kinds of memory that count, as proc(5) names them."""

MORE_THREADS = 5
"""Pools may grow to their sizes after the first round."""

STRANGER = "127.0.0.2"
"""The address of all attackers: the limits of an address must not affect others."""

SCHEDULERS = (Scheduler.DDIM, Scheduler.EULER, Scheduler.DPMPP_2M)


@dataclass
class Tally:
    """How the calls ended, how often the engine was killed, and what the attackers did."""

    calls: Counter[str] = field(default_factory=Counter)
    attacks: Counter[str] = field(default_factory=Counter)
    kills: int = 0


@dataclass(frozen=True)
class Holdings:
    """What the serving process holds: equal before and after if nothing leaks."""

    threads: int
    descriptors: int
    children: int

    @classmethod
    def of(cls, process: psutil.Process) -> "Holdings":
        """What ``process`` holds now."""
        return cls(
            threads=process.num_threads(),
            descriptors=process.num_fds(),
            children=len(process.children(recursive=True)),
        )


@dataclass
class Memory:
    """Quiet readings of processes that followed each other, by their ids: hours and megabytes."""

    readings: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def read(self, process: psutil.Process) -> None:
        """Note the anonymous memory of ``process`` now, resident or swapped out.

        The pages of libraries do not count: the kernel drops and reads them as it likes.
        """
        status = Path(f"/proc/{process.pid}/status").read_text("ascii")
        kilobytes = [re.search(rf"^{name}:\s+(\d+) kB$", status, re.M) for name in KINDS]
        size = sum(int(found[1]) for found in kilobytes if found) / 1e3
        self.readings.setdefault(process.pid, []).append((time.monotonic() / 3600, size))

    def slope(self) -> tuple[float, float]:
        """MB/h and their standard error, in common for all processes.

        The first reading of each process does not count: it is not warm.
        """
        points: list[tuple[float, float]] = []
        for readings in self.readings.values():
            warm = readings[1:]
            if len(warm) > 1:
                # Each process has its own level; the slope is what they have in common.
                at, size = (statistics.fmean(each) for each in zip(*warm, strict=True))
                points += [(a - at, s - size) for a, s in warm]
        spread = sum(a * a for a, _ in points)
        if len(points) < 3 or not spread:
            return math.nan, math.nan
        slope = sum(a * s for a, s in points) / spread
        rest = sum((s - slope * a) ** 2 for a, s in points) / (len(points) - 2)
        return slope, math.sqrt(rest / spread)


async def run_caller(end: float, client: AsyncClient, tally: Tally, dice: random.Random) -> None:
    """One caller until the time ``end``: requests one by one, some cancelled at a random moment."""
    while time.monotonic() < end:
        call = asyncio.ensure_future(
            client.generate(
                "a star",
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
            tally.calls["finished"] += 1
        except asyncio.CancelledError:
            tally.calls["cancelled"] += 1
        except DarkroomError as error:
            tally.calls[type(error).__name__] += 1


async def attack(end: float, address: str, tally: Tally, dice: random.Random) -> None:
    """One attacker until the time ``end``: connections of a few seconds, one after the other."""
    attacks = (stall_watches, leave_streams_unread, read_slowly, flood_headers)
    while time.monotonic() < end:
        chosen = dice.choice(attacks)
        with contextlib.suppress(ConnectionError, TimeoutError):
            await chosen(address, dice)
        tally.attacks[chosen.__name__] += 1


async def stall_watches(address: str, dice: random.Random) -> None:
    """Watch the server's health and read nothing."""
    async with peer(address, window=0, source=STRANGER) as stranger:
        for _ in range(20):
            stranger.open("grpc.health.v1.Health/Watch")
        await stranger.writer.drain()
        await asyncio.sleep(dice.uniform(1, 10))


async def leave_streams_unread(address: str, dice: random.Random) -> None:
    """Begin generations and read no event."""
    async with peer(address, window=0, source=STRANGER) as stranger:
        for _ in range(dice.randint(1, 4)):
            stranger.open("darkroom.v1.GenerationService/GenerateStream", data=_request())
        await stranger.writer.drain()
        await asyncio.sleep(dice.uniform(1, 10))


async def read_slowly(address: str, dice: random.Random) -> None:
    """Read the events of a generation in small parts."""
    async with peer(address, window=16, source=STRANGER) as stranger:
        stream = stranger.open("darkroom.v1.GenerationService/GenerateStream", data=_request())

        async def read() -> None:
            async for _ in stranger.frames():
                stranger.allow(stream, 64)
                await asyncio.sleep(0.05)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(dice.uniform(1, 10)):
                await read()


async def flood_headers(address: str, dice: random.Random) -> None:
    """Send headers that name one entry of the HPACK table again and again, without an end."""
    async with peer(address, source=STRANGER) as stranger:
        for stream in range(1, 41, 2):
            # An indexed field of 3 kB, then references to it: each takes one byte on the wire.
            entry = b"\x40\x01x" + b"\x7f\xb9\x16" + b"v" * 3000
            stranger.send(HEADERS, 0, stream, call_headers("a/b") + entry)
            for _ in range(dice.randint(1, 4)):
                stranger.send(CONTINUATION, 0, stream, b"\xbe" * 4000)
            stranger.send(CONTINUATION, END_HEADERS, stream, b"\xbe" * 100)
        await stranger.writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                async for _ in stranger.frames():
                    pass


def _request() -> bytes:
    generation = generation_pb2.GenerateRequest(
        prompt="a star", width=64, height=64, steps=4, format=types_pb2.IMAGE_FORMAT_RAW_RGB
    )
    return generation_pb2.GenerateStreamRequest(generation=generation).SerializeToString()


def _engine_of(serving: psutil.Process) -> psutil.Process:
    """The process of the engine: the largest child."""
    children = serving.children(recursive=True)
    return sorted(children, key=lambda child: child.memory_info().rss)[-1]


async def run_load(
    seconds: float, client: AsyncClient, address: str, tally: Tally, dice: random.Random
) -> None:
    """Callers and attackers for ``seconds``."""
    end = time.monotonic() + seconds
    await asyncio.gather(
        *(run_caller(end, client, tally, dice) for _ in range(CALLERS)),
        *(attack(end, address, tally, dice) for _ in range(3)),
    )


async def settle(client: AsyncClient) -> Mapping[str, int]:
    """Wait until no job is left; the jobs by how they ended, and those "accepted"."""
    while True:
        status = await client.status()
        if not status.queued_jobs + status.running_jobs:
            return {"accepted": status.accepted_jobs, **status.ended_jobs}
        await asyncio.sleep(0.5)


async def kill_engine(serving: psutil.Process, tally: Tally) -> None:
    """Kill the engine in the middle of a round."""
    await asyncio.sleep(ROUND_SECONDS / 2)
    _engine_of(serving).kill()
    tally.kills += 1


async def soak(minutes: float, seed: int, running: Running) -> list[str]:
    """Run the load; returns the problems that were found."""
    dice, tally = random.Random(seed), Tally()
    serving = psutil.Process(running.pid)
    of_server, of_engine = Memory(), Memory()
    holdings: list[Holdings] = []
    rounds = max(3, round(minutes * 60 / (ROUND_SECONDS + QUIET_SECONDS)))
    async with AsyncClient(running.address, insecure=True, timeout=300) as client:
        for number in range(rounds):
            load = [run_load(ROUND_SECONDS, client, running.address, tally, dice)]
            if number % ROUNDS_PER_ENGINE == 0:
                load.append(kill_engine(serving, tally))
            await asyncio.gather(*load)
            await client.generate("a star", steps=1)
            counts = dict(await settle(client))
            await asyncio.sleep(QUIET_SECONDS)
            of_server.read(serving)
            of_engine.read(_engine_of(serving))
            holdings.append(Holdings.of(serving))
            print(f"round {number + 1} of {rounds}: {counts}", flush=True)
    before, after = holdings[0], holdings[-1]
    print(f"calls   {dict(tally.calls)}, kills {tally.kills}")
    print(f"attacks {dict(tally.attacks)}")
    print(f"jobs    {counts}")
    print(f"before  {before}\nafter   {after}")
    problems = [
        f"{what}: {getattr(before, what)} before, {getattr(after, what)} after"
        for what, more in (("threads", MORE_THREADS), ("descriptors", 0), ("children", 0))
        if getattr(after, what) > getattr(before, what) + more
    ]
    for name, memory in (("server", of_server), ("engine", of_engine)):
        slope, error = memory.slope()
        sizes = [[round(size) for _, size in each] for each in memory.readings.values()]
        print(f"memory of the {name}: {slope:+.1f} ± {error:.1f} MB/h, MB {sizes}")
        if math.isnan(slope):
            problems.append(f"too few readings of the {name}: run it for longer")
        if slope > MAX_GROWTH + 2 * error:
            problems.append(f"the {name} grows by {slope:.1f} MB/h")
    accepted = counts.pop("accepted")
    if accepted != sum(counts.values()):
        problems.append(f"{accepted} jobs accepted, {sum(counts.values())} ended")
    if tally.calls["finished"] > counts["finished"]:
        problems.append("more calls finished than jobs")
    if not tally.kills:
        problems.append("no engine was killed: run it for longer")
    if len(tally.attacks) < 4:
        problems.append(f"only these attacks ran: {sorted(tally.attacks)}")
    unexpected = set(tally.calls) - {"finished", "cancelled"}
    problems += [f"{tally.calls[kind]} calls ended in {kind}" for kind in sorted(unexpected)]
    return problems


def main() -> None:
    """Parse the command line, run the load, and print the problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_model(Path(name))
        flags = ("--model", f"tiny={folder}", "--result-bytes", "1000000", "--rows", "4")
        with server(*flags, "--engine-max-restarts", "10000") as running:
            problems = asyncio.run(soak(options.minutes, options.seed, running))
    for line in problems:
        print(f"problem: {line}")
    if problems:
        raise SystemExit(1)
    print("no problems")


if __name__ == "__main__":
    main()
