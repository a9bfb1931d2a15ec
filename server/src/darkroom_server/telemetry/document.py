"""The page on metrics: ``python -m darkroom_server.telemetry.document`` prints it."""

from darkroom_server.telemetry.metrics import Metrics
from darkroom_server.telemetry.metrics.catalogue import Declared

HEAD = """# Metrics

<!-- Made by `python -m darkroom_server.telemetry.document`; a test holds it current. -->

Prometheus reads `http://127.0.0.1:9464/metrics` (`--metrics-host`, `--metrics-port`); scrapers
that ask for OpenMetrics get exemplars with the trace id of a request. `/healthz` on the same port
answers 200 while `darkroom_ready` is 1, and 503 otherwise.

Units are seconds and bytes. Labels are bounded: no prompt, no seed and no name of a caller is ever
in one; a model that the server does not hold is `unknown`. Counters do not fall when an engine is
restarted: its numbers travel with its events to the serving process, which keeps the sums.

What is measured: on a GPU, the engine waits for the device once a pass, as it must to go on, and
the times of steps and stages are taken there, on the host's clock. A decode ends with its pixels
on the host. Prompts are encoded without waiting: two events in the device's queue, read after the
pass, say how long that took. Peaks are the allocator's, measured once a second for each class of
work. On a CPU they are of the process's resident memory, which counts pages and not tensors, and
are measured once a minute: small work may show less than it takes, and the first of its class
more.

What to look at first, and the alerts: [operations](operations.md).
"""


def document() -> str:
    """The page, as Markdown."""
    lines = [HEAD]
    for title, declared in Metrics().declared.items():
        lines.append(f"## {title}\n")
        lines += [_entry(each) for each in declared]
    return "\n".join(lines)


def _entry(metric: Declared) -> str:
    labels = f"{{{','.join(metric.labels)}}}" if metric.labels else ""
    buckets = ""
    if metric.buckets:
        buckets = f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}."
    return f"### `{metric.name}{labels}`\n\n{metric.kind}. {metric.help}{buckets}\n"


if __name__ == "__main__":
    print(document(), end="")
