"""Settings of logs and traces."""

from dataclasses import dataclass
from typing import Annotated, Literal

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """What the server logs to standard error, and where it sends traces."""

    log_format: Annotated[
        Literal["auto", "console", "json"],
        Setting(
            "Format of log lines.",
            choose="`auto` is `console` on a terminal and `json` elsewhere.",
        ),
    ] = "auto"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Setting("The lowest level to log."),
    ] = "info"
    log_prompts: Annotated[
        bool,
        Setting(
            "Log prompts.",
            choose="Prompts may be personal data. Without this flag they are never logged.",
        ),
    ] = False
    traces: Annotated[
        Literal["off", "otlp"],
        Setting(
            "Where to send OpenTelemetry spans.",
            choose="`otlp` needs `darkroom-server[otel]`. OpenTelemetry's own `OTEL_…` variables "
            "set the collector's address and the sampling.",
        ),
    ] = "off"
