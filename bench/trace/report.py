"""The sections of the trace: simulated, and over the real wire."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import Results
from bench.trace import policies
from bench.trace.figures import JUDGED, WITHIN
from bench.trace.peers.registry import PEERS
from bench.trace.policies import Policy

GOAL_LOAD = 0.9
BETTER = {
    "(a) and (b)": ((Policy.FIRST_COME, Policy.LRU), 1.3),
    "(c) and (d)": (tuple(PEERS), 1.5),
}
"""How many times the share in time of the better of some others."""

LABELS: Mapping[str, str] = {
    **{policy.value: label for policy, label in policies.LABELS.items()},
    **{name: peer.label for name, peer in PEERS.items()},
}


def name_of(run: Mapping[str, Any]) -> str:
    """What a run measures, but for its policy."""
    return f"{run['slice']}, {run['load']:g}"


def by_name(results: Results) -> dict[str, dict[str, Any]]:
    """The runs by what they measure, and by policy."""
    found: dict[str, dict[str, Any]] = {}
    for run in results.figures["runs"]:
        found.setdefault(name_of(run), {})[run["policy"]] = run
    return found


def goals(results: Results) -> list[Goal]:
    """Those of each part of the trace at ``GOAL_LOAD``, and the bound of every run of ours."""
    found = []
    for name, runs in by_name(results).items():
        ours = runs.get(Policy.OURS)
        if ours is None:
            continue
        for others, (names, bound) in BETTER.items():
            shares = [runs[each]["attainment"][str(JUDGED)] for each in names if each in runs]
            if ours["load"] == GOAL_LOAD and any(shares):
                found.append(
                    Goal(
                        f"{name}: in time (k = {JUDGED}), against the better of {others}",
                        ours["attainment"][str(JUDGED)] / max(shares),
                        bound,
                        True,
                    )
                )
        if (first := runs.get(Policy.FIRST_COME)) is not None:
            share = ours["loads"] / first["loads"]
            found.append(Goal(f"{name}: loads, against (a)", share, 0.5, False))
        # A load and the work of a batch may come on top of the bound.
        bound = results.settings["swap_wait"] + ours["longest_load"] + ours["longest_run"]
        found.append(
            Goal(f"{name}: longest wait for a model, of the bound", _wait(ours) / bound, 1.0, False)
        )
    return found


def describe(results: Results) -> list[str]:
    """The tables and the goals; the text before them is that of the benchmark."""
    parts = []
    for name, runs in by_name(results).items():
        parts += [_heading(name, runs, results), _table(runs)]
    return [*parts, goals_table("goal", goals(results)), *_possible(results)]


def _possible(results: Results) -> list[str]:
    """What no policy can do better."""
    bounds = results.figures.get("bounds", [])
    if not bounds:
        return []
    windows = [*bounds[0]["least_loads"]]
    rows = []
    for each in bounds:
        runs = next(r for r in by_name(results).values() if _load_of(r) == each["load"])
        first = runs.get(Policy.FIRST_COME)
        rows.append(
            [
                f"{each['load']:g}",
                "-" if first is None else f"{first['loads'] / 2:.0f}",
                *(str(each["least_loads"][window]) for window in windows),
                f"{each['backlog_alone']:.0f}",
                f"{each['backlog_in_full_batches']:.0f}",
            ]
        )
    heads = [
        "of the capacity",
        "half of (a)'s loads",
        "fewest loads in the order of arrival",
        *(f"within {window} s" for window in windows[1:]),
        "longest backlog, one after another, s",
        "in full batches, s",
    ]
    text = (
        "What no policy can do better: the loads of a policy that knows the whole trace before, "
        "if requests are served in the order of arrival, and at least if those that arrive "
        "within the same seconds may be served in any order (Belady's rule); and the most seconds "
        "of work that wait at once in a burst, if the device serves requests one after another, "
        "and if every batch is full."
    )
    return [text, table(heads, rows)]


def _load_of(runs: Mapping[str, Mapping[str, Any]]) -> float:
    return float(next(iter(runs.values()))["load"])


def _heading(name: str, runs: Mapping[str, Mapping[str, Any]], results: Results) -> str:
    """With the number of requests, if it is not that of all runs."""
    counts = sorted({run["requests"] for run in runs.values()})
    if counts == [results.figures.get("requests")]:
        return f"**{name} of the capacity**"
    return f"**{name} of the capacity, {' or '.join(map(str, counts))} requests**"


def _table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    heads = [
        "",
        f"in time, k = {' / '.join(map(str, WITHIN))}",
        "goodput, images/s",
        "p50 / p95 / p99, s",
        "loads (from disk)",
        "GB moved",
        "longest wait, s",
    ]
    rows = []
    for name, label in LABELS.items():
        if (run := runs.get(name)) is None:
            continue
        attained, latency = run["attainment"], run["latency"]
        rows.append(
            [
                label,
                " / ".join(f"{attained[str(k)]:.0%}" for k in WITHIN),
                f"{run['goodput']:.2f} of {run['images_per_second']:.2f}",
                " / ".join(f"{latency[each]:.1f}" for each in ("p50", "p95", "p99")),
                f"{run['loads']} ({run['from_disk']})",
                f"{run['bytes_moved'] / 1e9:.0f}",
                f"{_wait(run):.1f}",
            ]
        )
    return table(heads, rows)


def _wait(run: Mapping[str, Any]) -> float:
    return float(run["longest_wait"])


def intro(results: Results, how: str) -> str:
    """What is the same for both sections; ``how`` says what differs."""
    settings = results.settings
    source = {
        True: "a production trace (GenTD26, Lin et al., SoCC 2025)",
        False: "a trace made up in the shape of a production trace",
    }[results.figures["is_real_trace"]]
    return (
        f"Many models on one device: requests of {source}, with their order, images, steps, "
        f"kinds, LoRAs and models; all come from one caller. {how} The device holds "
        f"{settings['device_models']} models, and the host's memory {settings['host_models']}, "
        "those among them. A load takes as long as that of SDXL: 6.9 GB at 2 GB/s from disk to "
        "the host's memory, and at 20 GB/s from there to the device. One model is read while "
        "another one is copied, under every "
        f"policy. The load is a share of what one resident model does that serves one request "
        "after another; each hour of the trace is compressed until it asks for that much, and "
        "within it requests come in bursts as they did. A request is in time if its images come "
        "within k times what it takes alone with its model in memory; goodput counts the images of "
        "those within 5. The longest wait is that of a job for its model. `--swap-wait` is "
        f"{settings['swap_wait']:g} s, and the bound of the goal is that with one load and the "
        "longest lone request on top. The others are our own server with another policy: in (a) "
        "jobs go in the order of arrival, and one whose model is not there holds up those behind "
        "it; in (b) jobs of resident models go on, and a load begins for each job whose model is "
        "not there, in the order of arrival. In both, the model that was used longest ago makes "
        "room, and running models take turns batch by batch; with ours, a job of another model "
        "than the running ones enters the engine if it is more urgent than their jobs, or when "
        "they have ended; until it has waited for eight times its run time, others take free rows "
        "of the running model's batches before it."
    )


def peers_text(results: Results) -> list[str]:
    """What the other servers are, if there are any."""
    names = {run["policy"] for run in results.figures["runs"]}
    if not names & PEERS.keys():
        return []
    versions = results.figures["versions"]
    shown = ", ".join(f"{p} {v}" for each in versions.values() for p, v in each.items())
    return [
        "(c) and (d) are other servers, which get the same requests over HTTP at the same moments, "
        "with loads of the same length on a thread of their own. They call diffusers' pipelines: "
        f"once for at most {results.settings['max_batch_images']} images of waiting requests for "
        "one model whose steps, kind and adapters are equal. (c) is Ray Serve with "
        "`@serve.multiplexed` and `@serve.batch`: a request gets its model first, and the one that "
        "was used longest ago makes room. Requests that have got it are still served by it, for "
        "which a real device might have no room. (d) is Triton with explicit model control and its "
        "dynamic batcher. Its client loads a model before the first request for it, one after "
        "another, and unloads the one that was used longest ago; requests on their way end first. "
        "Its Python models pass their batches on to one process with the pipelines, because a "
        f"process for each would import torch at each load. Versions: {shown}."
    ]


def section_parts(results: Results, how: str) -> Sequence[str]:
    """The parts of a section."""
    return [intro(results, how), *peers_text(results), *describe(results)]
