"""The record that reproduces an image, as far as the engine knows it."""

from functools import cache
from importlib.metadata import version

from darkroom_server.core.events import Replay
from darkroom_server.engine.components.schedulers import config_json
from darkroom_server.engine.sample import Sample


@cache
def library_versions() -> dict[str, str]:
    """The versions of the libraries that compute an image."""
    return {
        name: version(name) for name in ("darkroom-server", "diffusers", "torch", "transformers")
    }


def replay_of(sample: Sample, pixels_sha256: str) -> Replay:
    """The record of ``sample``, whose finished pixels have ``pixels_sha256``."""
    return Replay(
        scheduler_class=type(sample.scheduler).__name__,
        scheduler_config_json=config_json(sample.scheduler),
        device=str(sample.latents.device),
        library_versions=library_versions(),
        rows_in_last_pass=sample.rows_in_last_batch,
        pixels_sha256=pixels_sha256,
    )
