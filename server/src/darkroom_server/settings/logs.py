"""The settings of what the server tells people, beside its metrics."""

from dataclasses import dataclass
from typing import Annotated, Literal

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """What the server writes on standard error."""

    log_format: Annotated[
        Literal["auto", "console", "json"],
        Setting(
            "How log lines look.",
            choose="`auto` is `console` on a terminal and `json` elsewhere.",
        ),
    ] = "auto"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Setting("The least severe lines to write."),
    ] = "info"
    log_prompts: Annotated[
        bool,
        Setting(
            "Write prompts into the log.",
            choose="Prompts may be personal data. They are never written otherwise.",
        ),
    ] = False
    traces: Annotated[
        Literal["off", "otlp"],
        Setting(
            "Where OpenTelemetry's spans go.",
            choose="`otlp` needs `darkroom-server[otel]`; OpenTelemetry's own `OTEL_…` variables "
            "say where the collector is and what is sampled.",
        ),
    ] = "off"
