"""Opens the trace writer, without importing OpenTelemetry if traces are off."""

from typing import TYPE_CHECKING

from darkroom_server.core.errors import StartupError

if TYPE_CHECKING:
    from darkroom_server.telemetry.spans import SpanWriter


def open_traces(wanted: str) -> "SpanWriter | None":
    """The span writer, None if ``wanted`` is "off". Raises ``StartupError``."""
    if wanted == "off":
        return None
    try:
        from darkroom_server.telemetry.spans import SpanWriter
    except ImportError as error:
        raise StartupError(
            f"--traces {wanted} needs OpenTelemetry ({error.name} is missing): "
            "pip install 'darkroom-server[otel]'"
        ) from None
    return SpanWriter()
