"""The record that reproduces an image, as far as the engine knows it."""

from functools import cache
from importlib.metadata import version

from darkroom_server.core.events import Replay
from darkroom_server.core.job import PromptSyntax
from darkroom_server.engine.components.schedulers import config_json
from darkroom_server.engine.sample import Sample


@cache
def library_versions(syntax: PromptSyntax) -> dict[str, str]:
    """The versions of the libraries that compute an image whose prompts are in ``syntax``."""
    weighted = ("compel",) if syntax is PromptSyntax.WEIGHTED else ()
    names = ("darkroom-server", "diffusers", "torch", "transformers", *weighted)
    return {name: version(name) for name in names}


def replay_of(sample: Sample, pixels_sha256: str) -> Replay:
    """The record of ``sample``, whose finished pixels have ``pixels_sha256``."""
    return Replay(
        scheduler_class=type(sample.scheduler).__name__,
        scheduler_config_json=config_json(sample.scheduler),
        device=str(sample.latents.device),
        library_versions=library_versions(sample.job.prompt_syntax),
        rows_in_last_pass=sample.rows_in_last_batch,
        pixels_sha256=pixels_sha256,
        memory_fallbacks=tuple(sorted(sample.memory_fallbacks)),
    )
