"""(e) Darkroom: ``darkroom-server serve`` unchanged, with a record of each batch."""

from collections.abc import Callable
from pathlib import Path

from bench.peers.servers.config import ServerConfig
from bench.peers.servers.trace import Trace
from darkroom_server import app, cli
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.engine import Engine
from darkroom_server.core.events import BatchDone, Event, SampleProgress
from darkroom_server.settings import Settings
from darkroom_server.settings.sources import engine_configs


class TracedEngine(ProcessEngine):
    """Records which requests share each batch."""

    trace: Trace

    def start(self, emit: Callable[[Event], None]) -> None:
        """Start the engine; see ``ProcessEngine``."""
        stepped: list[int] = []

        def tap(event: Event) -> None:
            match event:
                case SampleProgress():
                    stepped.append(int(event.job_id.rpartition("-")[2]))
                case BatchDone():
                    self.trace.record(event.seconds, stepped, event.ended_at)
                    stepped.clear()
            emit(event)

        super().start(tap)


def _form(config: ServerConfig) -> list[str]:
    """The options of the denoiser's form."""
    if not config.compiled:
        return ["--compile", "off"]
    folder = Path(config.compiled).parent
    return ["--compile", "cached", "--state-dir", str(folder.parent)]


def main() -> None:
    """Serve until SIGTERM."""
    config = ServerConfig.of_command_line(__doc__)
    trace = Trace(config.trace)

    def build_engines(settings: Settings) -> list[Engine]:
        engines = [TracedEngine(config) for config in engine_configs(settings, None)]
        for engine in engines:
            engine.trace = trace
        return list(engines)

    app.build_engines = build_engines
    runtime = config.runtime
    cli.main(
        [
            "serve",
            *("--model", f"demo={config.folder}"),
            *("--port", str(config.port), "--metrics-port", "0"),
            # What this machine's engine chose by itself, so that all peers run the same. The memory
            # layouts follow from it.
            *("--device", runtime.device, "--preset", runtime.preset, "--dtype", runtime.dtype),
            *("--max-rows", str(2 * config.max_batch_images), "--log-format", "json"),
            *_form(config),
        ]
    )


if __name__ == "__main__":
    main()
