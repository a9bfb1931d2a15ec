"""The caller's trace, if it has one (W3C Trace Context)."""


def current_traceparent() -> str | None:
    """The ``traceparent`` of the current OpenTelemetry span, None if there is none."""
    from opentelemetry import trace

    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
