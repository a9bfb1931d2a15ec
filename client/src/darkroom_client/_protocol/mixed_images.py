"""Reports a result whose images were not all generated in the same way."""

from darkroom_client._protocol.retries import log
from darkroom_client._types.result import GenerationResult


def warn_if_mixed(result: GenerationResult, address: str) -> None:
    """Log a warning if the images of ``result`` differ in ``GenerationResult.mixed``."""
    if mixed := result.mixed:
        log.warning(
            "%s: the images of request id %s were not all generated in the same way: %s",
            address,
            result.request_id,
            mixed_text(mixed),
        )


def mixed_text(mixed: dict[str, tuple[str, ...]]) -> str:
    """``GenerationResult.mixed`` in one line."""
    return "; ".join(f"{name} {', '.join(values)}" for name, values in mixed.items())
