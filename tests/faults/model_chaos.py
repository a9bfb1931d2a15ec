"""Random loads and unloads under load: `python -m tests.faults.model_chaos --changes 1000`.

A real server and engine with tiny models, of which the device may hold two and the host's memory
two more. Callers generate images all the time. At the end every accepted job has the image that its
model makes alone, and neither memory nor descriptors have grown with the changes.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from darkroom.v1 import model_pb2
from tests.faults.served_models import load, pixels, serving, unload, write_models
from tests.faults.tapped import Wire

MODELS = ("owls", "toads", "moths", "fresh")
SEEDS = range(3)
CALLERS = 3
STEPS = 4
DEVICE_BYTES, HOST_BYTES = 2_600_000, 2_600_000
"""Two models of about 1.2 MB each."""

MOST_MIB_PER_1000 = 64.0
"""Growth of the engine's memory that is not taken for a leak: of measurements and their noise."""

MORE_DESCRIPTORS = 8


@dataclass
class Report:
    """What happened; ``mib`` and ``descriptors``: of the engine after each change."""

    changes: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    loads: Counter[str] = field(default_factory=Counter)

    @property
    def mib_per_1000(self) -> float:
        """The growth of the engine's memory in 1000 changes, after the first half of them."""
        settled = self.mib[len(self.mib) // 2 :]
        slope, _ = statistics.linear_regression(range(len(settled)), settled)
        return 1000 * slope


async def chaos(folder: Path, changes: int, seed: int) -> Report:
    """Make ``changes`` under load, and report."""
    dice, report = random.Random(seed), Report()
    async with serving(folder, budget=DEVICE_BYTES, host=HOST_BYTES) as wire:
        expected = {
            (model, number): await pixels(wire, model, seed=number, steps=STEPS)
            for model in MODELS
            for number in SEEDS
        }
        assert len({picture for (picture,) in expected.values()}) == len(expected)
        over = asyncio.Event()
        callers = [
            asyncio.create_task(_call(wire, random.Random(f"{seed} {n}"), expected, report, over))
            for n in range(CALLERS)
        ]
        await _change(wire, changes, dice, report)
        over.set()
        await asyncio.gather(*callers)
        assert not wire.server.dispatcher.counts.live
        for metric in wire.server.metrics.models.loads.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total") and sample.labels["outcome"] == "loaded":
                    report.loads[sample.labels["from"]] += int(sample.value)
    return report


async def _call(
    wire: Wire,
    dice: random.Random,
    expected: dict[tuple[str, int], list[str]],
    report: Report,
    over: asyncio.Event,
) -> None:
    while not over.is_set():
        model, number = dice.choice(MODELS), dice.choice(SEEDS)
        found = await pixels(wire, model, seed=number, steps=STEPS)
        report.answered += 1
        if found != expected[model, number]:
            report.wrong.append(f"{model} {number}")


async def _change(wire: Wire, changes: int, dice: random.Random, report: Report) -> None:
    assert wire.engine.pid is not None
    engine = psutil.Process(wire.engine.pid)
    pinned = ""
    for _ in range(changes):
        action, model = dice.choice(["load", "unload", "pin"]), dice.choice(MODELS)
        if action == "load":
            await load(wire, model)
        elif action == "unload":
            await unload(wire, model)
        else:
            # One at a time: the others must have room.
            if pinned:
                await _pin(wire, pinned, pinned=False)
            pinned = model
            await _pin(wire, model, pinned=True)
        report.changes[action] += 1
        report.mib.append(engine.memory_info().rss / 2**20)
        report.descriptors.append(engine.num_fds())


async def _pin(wire: Wire, model: str, *, pinned: bool) -> Any:
    return await wire.models.PinModel(model_pb2.PinModelRequest(model=model, pinned=pinned))


def main() -> int:
    """Run it and print what happened; 1 if something was wrong or has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), MODELS)
        report = asyncio.run(chaos(Path(folder), arguments.changes, arguments.seed))
    print(f"seed {arguments.seed}: {dict(report.changes)}, loads {dict(report.loads)}")
    print(f"{report.answered} jobs answered, {len(report.wrong)} of them wrong {report.wrong[:5]}")
    print(
        f"engine: {report.mib[0]:.0f} MiB at first, {report.mib[-1]:.0f} at last, "
        f"{report.mib_per_1000:+.1f} in 1000 changes; descriptors {report.descriptors[0]} at "
        f"first, {report.descriptors[-1]} at last"
    )
    grown = report.mib_per_1000 > MOST_MIB_PER_1000
    grown |= report.descriptors[-1] > report.descriptors[0] + MORE_DESCRIPTORS
    return int(bool(report.wrong) or grown)


if __name__ == "__main__":
    sys.exit(main())
