"""The requests of a production trace, or of one that is made up in its shape."""

import csv
import gzip
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from bench.report.results import ROOT
from bench.workload.requests import IMAGES, Request

FILE = "genai-request-trace.csv.gz"

PLACE = ROOT.parent / "shared" / "data" / FILE
"""Where the trace is looked for if no path is given."""

HOUR = 3600.0


T = TypeVar("T")


class Kind(StrEnum):
    """What is done with a model, as the trace has it."""

    TEXT = "TXT_2_IMG"
    IMAGE = "IMG_2_IMG"
    INPAINT = "INPAINTING"


@dataclass(frozen=True, slots=True)
class TraceRequest(Request):
    """A request of the trace: ``group`` is that of its user, ``loras`` the number of its LoRAs."""

    model: str = ""
    kind: Kind = Kind.TEXT
    group: str = ""
    loras: int = 0


# The shape of GenTD26 (Lin et al., "Understanding Diffusion Model Serving in Production", SoCC
# 2025; Alibaba's cluster data, cluster-trace-v2026-GenAI), for a trace that is made up.

COUNT = 26_823
CHECKPOINTS = 86
FIRST_SHARES = (0.31, 0.15, 0.09, 0.08, 0.08, 0.04, 0.04, 0.03, 0.03, 0.03)
"""Of the requests, for the ten models that are used most; the others share the rest, the next one
always 6 % less than the one before."""

STEPS = {30: 0.907, 40: 0.05, 28: 0.01, 50: 0.01, 35: 0.01, 25: 0.005, 20: 0.008}
KINDS = {Kind.TEXT: 0.911, Kind.IMAGE: 0.082, Kind.INPAINT: 0.007}
LORAS = {0: 0.833, 1: 0.156, 2: 0.011}
GROUPS = 4_247
SAME_MODEL = 0.72
"""How often a user's next request is for the same model."""

DAYS = 23


def read(path: Path) -> list[TraceRequest]:
    """The requests in ``path``, a ``.csv.gz`` as Alibaba's ``lora_request_trace.csv``.

    They arrive at the moments of the trace, in seconds after its first request. The models are
    numbered by their first use.
    """
    found: list[TraceRequest] = []
    models: dict[str, str] = {}
    first: datetime | None = None
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["gmt_create"])
            first = first or at
            version = row["checkpoint_model_version_id"]
            found.append(
                TraceRequest(
                    index=len(found),
                    prompt="",
                    steps=int(float(row["num_inference_steps"] or 30)),
                    guidance_scale=7.5,
                    seed=len(found),
                    arrival=(at - first).total_seconds(),
                    images=int(float(row["num_images_per_prompt"] or 1)),
                    model=models.setdefault(version, f"m{len(models):02}"),
                    kind=Kind(row["predict_type"]),
                    group=row["groupId"],
                    loras=int(row["num_lora"] or 0),
                )
            )
    return found


def made_up(count: int = COUNT, seed: int = 0) -> list[TraceRequest]:
    """A trace of the same shape: users come by day, and ask several times, mostly for one model."""
    rng = random.Random(seed)
    shares = [*FIRST_SHARES]
    rest, tail = 1.0 - sum(shares), [0.94**n for n in range(CHECKPOINTS - len(shares))]
    shares += [rest * each / sum(tail) for each in tail]
    models = [f"m{number:02}" for number in range(CHECKPOINTS)]
    found: list[TraceRequest] = []
    per_group = COUNT / GROUPS
    while len(found) < count:
        group, at = f"g{len(found):05}", rng.randrange(DAYS) * 24 * HOUR
        at += rng.triangular(8.0, 24.0, 15.0) * HOUR
        (model,) = rng.choices(models, shares)
        while True:
            found.append(
                TraceRequest(
                    index=0,
                    prompt="",
                    steps=_choice(STEPS, rng),
                    guidance_scale=7.5,
                    seed=len(found),
                    arrival=at,
                    images=_choice(IMAGES, rng),
                    model=model,
                    kind=_choice(KINDS, rng),
                    group=group,
                    loras=_choice(LORAS, rng),
                )
            )
            if rng.random() < 1.0 / per_group or len(found) == count:
                break
            at += rng.expovariate(1.0 / 180.0)
            if rng.random() >= SAME_MODEL:
                (model,) = rng.choices(models, shares)
    found.sort(key=lambda request: request.arrival)
    first = found[0].arrival
    return [replace(r, index=i, arrival=r.arrival - first) for i, r in enumerate(found)]


def hours(requests: Sequence[TraceRequest]) -> Iterator[tuple[int, list[TraceRequest]]]:
    """The requests of each hour that has some, with its number."""
    hour: list[TraceRequest] = []
    for request in requests:
        if hour and request.arrival // HOUR != hour[0].arrival // HOUR:
            yield int(hour[0].arrival // HOUR), hour
            hour = []
        hour.append(request)
    if hour:
        yield int(hour[0].arrival // HOUR), hour


def slice_from(requests: Sequence[TraceRequest], *, busy: bool, count: int) -> list[TraceRequest]:
    """``count`` consecutive requests from the busiest hour on, or from a median one.

    The median is that of the hours with requests.
    """
    found = list(hours(requests))
    by_size = sorted(found, key=lambda each: (len(each[1]), each[0]))
    _, hour = by_size[-1] if busy else by_size[len(by_size) // 2]
    begin = min(hour[0].index, max(0, len(requests) - count))
    return [replace(r, index=i) for i, r in enumerate(requests[begin : begin + count])]


def at_load(requests: Sequence[TraceRequest], steps_per_second: float) -> list[TraceRequest]:
    """``requests`` with their time compressed: each hour asks for ``steps_per_second`` of images.

    Within an hour the moments keep their distances in proportion: users come in bursts as they do.
    Hours as they are would be idle at night, and many times over the capacity by day.
    """
    began = 0.0
    compressed = []
    for number, hour in hours(requests):
        seconds = sum(request.images * request.steps for request in hour) / steps_per_second
        compressed += [
            replace(r, arrival=began + seconds * (r.arrival / HOUR - number)) for r in hour
        ]
        began += seconds
    first = compressed[0].arrival
    return [replace(request, arrival=request.arrival - first) for request in compressed]


def shares_of_models(requests: Sequence[TraceRequest]) -> list[float]:
    """The share of each model, the most used first."""
    counts = Counter(request.model for request in requests)
    return [count / len(requests) for _, count in counts.most_common()]


def _choice(shares: Mapping[T, float], rng: random.Random) -> T:
    (found,) = rng.choices(list(shares), list(shares.values()))
    return found
