"""Prints docs/metrics.md: ``python -m darkroom_server.telemetry.document``."""

from darkroom_server.telemetry.metrics import Metrics
from darkroom_server.telemetry.metrics.catalogue import Declared

HEAD = """# Metrics

<!-- Made by `python -m darkroom_server.telemetry.document`; a test checks that it is current. -->

Prometheus scrapes `http://127.0.0.1:9464/metrics` (`--metrics-host`, `--metrics-port`). Scrapers
that ask for OpenMetrics get exemplars with the trace id of a request. `/healthz` on the same port
answers 200 while `darkroom_ready` is 1, and 503 otherwise.

Units are seconds and bytes. The set of label values is bounded: a label never holds a prompt, a
seed or a caller's name, and a model that the server does not serve is `unknown`. Counters do not
fall when an engine restarts: the engine sends its numbers with its events to the serving process,
which keeps the sums.

How times are measured: on a GPU the engine waits for the device once per batch, which it must do
anyway, and takes the times of steps and stages there, on the host's clock. A decode ends when its
pixels are on the host. Prompts are encoded without waiting: two CUDA events, read after the batch,
give the time.

How peaks are measured: by torch's allocator, once a second for each class of work. On a CPU, by the
process's resident memory, once a minute. Resident memory counts pages, not tensors, so small work
may show less than it takes, and the first work of a class more.

What to look at first, and the alerts: [operations](operations.md).
"""


def document() -> str:
    """Return the page as Markdown."""
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
