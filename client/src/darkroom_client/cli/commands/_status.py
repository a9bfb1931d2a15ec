"""``darkroom status``: state, queue, rate and memory of a server."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from datetime import datetime

from darkroom_client._types.model import ModelRuntime
from darkroom_client._types.status import EngineStatus, ModelStatus, ServerState, ServerStatus
from darkroom_client.cli._connect import connect
from darkroom_client.cli._exit_codes import LATER
from darkroom_client.cli.commands._models import load_progress
from darkroom_client.cli.terminal._console import (
    Row,
    open_console,
    readable_bytes,
    readable_seconds,
    tabulate,
)

_ACCEPTING = (ServerState.READY, ServerState.RECOVERING)


def run(arguments: argparse.Namespace) -> int:
    """Print the status; 0 if the server accepts requests, 3 if not."""
    with connect(arguments) as client:
        status = client.status()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(status), default=datetime.isoformat))
    else:
        tabulate(open_console(), ("server", arguments.target or client.target), _rows(status))
    return 0 if status.state in _ACCEPTING else LATER


def _rows(status: ServerStatus) -> Iterator[Row]:
    yield "state", status.state
    yield "version", status.version
    yield "up", readable_seconds(status.uptime)
    yield "queue", f"{status.queued_jobs} of {status.max_queued_jobs}"
    yield "running", str(status.running_jobs)
    ended = ", ".join(f"{count} {how}" for how, count in status.ended_jobs.items() if count)
    yield "accepted", f"{status.accepted_jobs}" + (f" ({ended})" if ended else "")
    if status.uptime:
        finished = status.ended_jobs.get("finished", 0)
        yield "rate", f"{60 * finished / status.uptime:.1f} finished per minute since the start"
    yield "host memory", readable_bytes(status.host_memory_bytes)
    for model in status.models:
        yield f"model {model.id}", _model(model)
    for engine in status.engines:
        yield f"engine {engine.index}", _engine(engine)


def _model(model: ModelStatus) -> str:
    times = (
        f"{time.width}x{time.height}, {time.rows} rows: {1000 * time.seconds:.0f} ms per pass"
        for time in model.pass_times
    )
    state = f"{model.state}, {model.queued_jobs} queued, {model.running_jobs} running"
    return "; ".join((state, *_place(model), *_how_it_runs(model), *times))


def _place(model: ModelStatus) -> Iterator[str]:
    """Why it cannot be loaded, how far its load is, and its weights."""
    if model.state_reason:
        yield model.state_reason
    if model.load is not None:
        yield from load_progress(model.load)
    if model.weight_bytes:
        pinned = ", pinned" if model.pinned else ""
        yield f"weights {readable_bytes(model.weight_bytes)}{pinned}"


def _how_it_runs(model: ModelStatus) -> Iterator[str]:
    """The memory format, the denoiser's form and the row limit, if the server reports them."""
    if (runtime := model.runtime) is not None:
        denoiser = f", {runtime.denoiser} denoiser" if runtime.denoiser else ""
        yield f"{runtime.dtype} {_layouts(runtime)}, preset {runtime.preset}{denoiser}"
        if runtime.quantization:
            yield f"weights in {runtime.quantization}"
        if runtime.offload:
            yield f"offload {runtime.offload}"
    if model.max_rows:
        yield f"at most {model.max_rows} rows ({model.row_limit_source})"


def _layouts(runtime: ModelRuntime) -> str:
    """The layout of the denoiser's weights, and that of the VAE's if it is another."""
    own, vae = (
        "channels_last" if last else "contiguous"
        for last in (runtime.channels_last, runtime.vae_channels_last)
    )
    other = runtime.vae_channels_last not in (None, runtime.channels_last)
    return f"{own} (VAE {vae})" if other else own


def _engine(engine: EngineStatus) -> str:
    parts = [engine.device or "-", "ready" if engine.ready else "not ready"]
    parts.append(f"{engine.samples} images, {engine.rows_in_use} rows")
    if engine.restarts:
        parts.append(f"{engine.restarts} restarts")
    weights = {f"weights on {tier}": count for tier, count in engine.weight_bytes.items()}
    memory = {"host": engine.host_memory_bytes, **engine.memory_bytes, **weights}
    parts.extend(f"{kind} {readable_bytes(count)}" for kind, count in memory.items() if count)
    return ", ".join(parts)
